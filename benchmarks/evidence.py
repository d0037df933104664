"""The study of docs/evidence.md: each method at its own best learning rate, with several seeds, and what it forgets.

    python benchmarks/evidence.py text --prepare --data FOLDER         tokens, once; FOLDER has LLM-Adapters' records
    python benchmarks/evidence.py text --jobs 4 --minutes 9            as many runs as there is time for
    python benchmarks/evidence.py text --tables                        Markdown and pictures of what is there

A study is a file of benchmarks/evidence (text, text-paper-protocol, pictures, better, better-pictures), or another
YAML file. Runs are rows of runs/evidence/STUDY/rows.jsonl. The same command goes on where the last one stopped, and
makes nothing twice.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

import torch
from evidence import pictures, tables, texts
from evidence.configuration import EvidenceError, Study, read_study
from evidence.data import save
from evidence.runs import missing, read_rows, work

from fura_vlm.errors import FuraVLMError
from fura_vlm.modelling.load import load_family


def prepare(study: Study, arguments: argparse.Namespace) -> None:
    """Writes the data of a study."""
    module, kind = {"text": (texts, texts.TextData), "pictures": (pictures, pictures.PictureData)}[study.kind]
    given = {"folder": arguments.data, "plain": arguments.plain, "limit": arguments.limit}
    try:
        settings = kind(**study.data | {name: value for name, value in given.items() if value is not None})
    except TypeError as error:
        raise EvidenceError(f"{study.name}: its data have a setting that is unknown or missing ({error})") from error
    family = load_family(study.model, conversation=study.conversation)
    data = module.prepare(study, family, settings)
    fingerprint = save(data, study.folder / "data.pt")
    parts = {**data.validation, **{f"test of {name}": part for name, part in data.tests.items()}}
    print(
        f"{study.folder / 'data.pt'} ({fingerprint}): {len(data.train)} records to train on, {len(data.plain)} tokens"
    )
    print(", ".join(f"{name} {len(part)}" for name, part in parts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a file of benchmarks/evidence without its ending, or a path")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prepare", action="store_true", help="read and encode the data")
    what.add_argument("--list", action="store_true", help="the runs that can be made now, in their order")
    what.add_argument("--tables", action="store_true", help="write tables and pictures of the rows")
    parser.add_argument("--minutes", type=float, help="no run goes on after so many")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; 0 makes them in this process")
    parser.add_argument("--data", help="of --prepare: the folder of LLM-Adapters' records")
    parser.add_argument("--plain", help="of --prepare: a text of plain English, or a wheel of gensim")
    parser.add_argument("--limit", type=int, help="of --prepare: the most records of each part, for a try")
    parser.add_argument("--methods", help="only these methods of the study, with commas between them")
    parser.add_argument("--model", help="another folder of the base")
    parser.add_argument("--output", help="another folder for data, rows and tables")
    arguments = parser.parse_args()
    file = Path(arguments.study)
    if file.suffix != ".yaml":
        file = Path(__file__).parent / "evidence" / f"{arguments.study}.yaml"
    changes = {name: getattr(arguments, name) for name in ("model", "output") if getattr(arguments, name)}
    try:
        study = read_study(file, **changes)
        if arguments.methods:
            study = replace(
                study, methods=tuple(study.variant(name) for name in arguments.methods.split(",")), compare={}
            )
        if arguments.prepare:
            prepare(study, arguments)
        elif arguments.tables:
            print(tables.write(study))
        elif arguments.list:
            fingerprint = tables.fingerprint(study)
            print(*missing(study, read_rows(study.folder / "rows.jsonl"), fingerprint), sep="\n")
        else:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            written = work(study, device, arguments.jobs, arguments.minutes, lambda line: print(line, flush=True))
            print(f"{written} rows added to {study.folder / 'rows.jsonl'}")
    except FuraVLMError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
