"""What a FuRA adapter loses as a LoRA, rank by rank: the error of its update, and the answers that change.

    python benchmarks/lora.py runs/tiny-fura [--ranks 4 16 64 128] [--questions 400] [--output FILE.md]

Any run will do whose base is at hand; the questions are a file of records, by default the embedded mixture's held-out
ones. PEFT's ``convert_to_lora`` makes the LoRA, which is the nearest update of its rank. Rows are written as they come;
a second start goes on behind them. The embedded model takes minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import convert_to_lora, get_peft_model, set_peft_model_state_dict

from fura_vlm.evaluation.heldout import Answer, answer_questions, exact_match, load_questions, normalise
from fura_vlm.fura.update import UPDATE_HEAD, update_report, update_rows
from fura_vlm.modelling.load import find_parts, load_any, load_base
from fura_vlm.tables import Table

HEAD = [*UPDATE_HEAD, "answers changed", "right, %"]


def score(answers: list[Answer]) -> str:
    return f"{100 * exact_match(answers)['mean']:.1f}"


def changed(answers: list[Answer], before: list[Answer]) -> str:
    number = sum(normalise(a.predicted) != normalise(b.predicted) for a, b in zip(answers, before, strict=True))
    return f"{number} of {len(before)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64, 128])
    parser.add_argument("--data", default="data/embedded/eval.json")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("runs/lora.md"))
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = options.output.read_text().splitlines() if options.output.is_file() else []
    done = {line.split("|")[1].strip() for line in lines if line.startswith("| ")}

    def write(*cells: str) -> None:
        with options.output.open("a") as file:
            for line in Table(HEAD, [cells]).markdown().splitlines()[2 if done else 0 :]:
                print(line, flush=True)
                print(line, file=file)
        done.add(cells[0])

    records = load_questions(options.data)
    step = max(1, len(records) // options.questions)
    records = records[::step][: options.questions]  # of all kinds: a file has them in order
    model, family = load_any(options.run)
    model = model.float().to(device)
    tuned = answer_questions(model, family, records)
    report = update_report(model)
    with model.disable_adapter():
        if "no adapter" not in done:
            plain = answer_questions(model, family, records)
            write("no adapter", "100.0%", "", "", "0", "", changed(plain, tuned), score(plain))
    if "FuRA" not in done:
        numbers = sum(each.trained for each in report)
        write("FuRA", "0.0%", "", "", f"{numbers:,}", "1.00", changed(tuned, tuned), score(tuned))
    for rank in options.ranks:
        if str(rank) in done:
            continue
        config, state = convert_to_lora(model, rank)
        lora = get_peft_model(load_base(find_parts(options.run)[0], torch.float32), config).to(device)
        set_peft_model_state_dict(lora, state)
        answers = answer_questions(lora.eval(), family, records)
        write(*update_rows(report, [rank])[0], changed(answers, tuned), score(answers))


if __name__ == "__main__":
    main()
