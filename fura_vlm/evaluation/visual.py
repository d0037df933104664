"""The visual suite: GQA, ScienceQA, TextVQA and POPE, or other tasks of lmms-eval, which does the work."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from statistics import mean

from filelock import FileLock

from fura_vlm.evaluation.base import Suite
from fura_vlm.evaluation.config import EvalConfig
from fura_vlm.evaluation.scores import Sample, TaskScore, sample, score
from fura_vlm.evaluation.source import Source
from fura_vlm.processes import agree

EMBEDDED = Path("data/benchmarks")
RECIPE = "recipe.json"  # what write_benchmarks leaves beside the benchmarks

BENCHMARKS = ("gqa", "scienceqa", "textvqa", "pope")
"""The benchmarks of the published scores, in the order of ``TASKS``."""

PUBLISHED = {
    "7B full fine-tuning": {
        "scores": {"gqa": 62.0, "scienceqa": 66.8, "textvqa": 58.2, "pope": 85.9},
        "source": "LLaVA-1.5, arXiv 2310.03744",
    },
    "7B LoRA": {
        "scores": {"gqa": 62.9, "scienceqa": 68.4, "textvqa": 58.2, "pope": 86.4},
        "source": "DoRA, arXiv 2402.09353",
    },
    "7B DoRA": {
        "scores": {"gqa": 62.9, "scienceqa": 69.9, "textvqa": 57.0, "pope": 87.2},
        "source": "DoRA, arXiv 2402.09353",
    },
}
"""Published results of LLaVA-1.5-7B on the real benchmarks, in percent, in the paper's protocol."""


class Visual(Suite):
    settings = frozenset({"protocol", "num_workers", "max_new_tokens"})
    packages = ("lmms-eval",)

    def __init__(self, config: EvalConfig, source: Source):
        super().__init__(config, source)
        self._data = _data(config.data, source)
        self.data = self._data or "hub"
        self.protocol = "own choice" if config.tasks else config.protocol
        name = "eval-embedded" if self._is_embedded else "eval"
        self.folder = name + ("-paper" if config.protocol == "paper" else "")

    @property
    def _is_embedded(self) -> bool:
        """Whether these are the project's own benchmarks, wherever they are and made already or not."""
        return self._data is not None and (self._data == str(EMBEDDED) or (Path(self._data) / RECIPE).is_file())

    def load(self) -> None:
        from fura_vlm.evaluation.tasks import TASKS, load_tasks

        _quiet()
        if self._data == str(EMBEDDED):
            agree(_make_embedded)
        self.max_new_tokens = self.config.max_new_tokens or (16 if self._is_embedded else None)
        names = self.config.tasks or list(TASKS[self.config.protocol])
        self.tasks = load_tasks(names, self._data, self.config.limit, self.max_new_tokens)

    def run(self, source: Source, folder: Path) -> tuple[dict[str, TaskScore], list[Sample]] | None:
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager

        outcome = simple_evaluate(
            model=self._model(source, str(folder / "answers")),
            tasks=[loaded.task for loaded in self.tasks.values()],
            task_manager=TaskManager(include_defaults=False),
            limit=self.config.limit,
            bootstrap_iters=0,
            log_samples=True,
            # Scoring needs no pictures, and lmms-eval then decodes none; TextVQA writes a file for its server.
            cli_args=Namespace(output_path=str(folder), process_with_media=False),
        )
        if outcome is None:
            return None
        reached, samples = {}, []
        for name, loaded in self.tasks.items():
            rows = sorted(outcome["samples"][name], key=lambda row: row["doc_id"])
            metrics = {
                key.removesuffix(",none"): value
                for key, value in outcome["results"][name].items()
                if key.endswith(",none") and "stderr" not in key and isinstance(value, (int, float))
            }
            reached[name] = score(loaded, rows, metrics)
            samples += [sample(name, loaded, row) for row in rows]
        return reached, samples

    def _model(self, source: Source, cache: str):
        """What answers lmms-eval's questions."""
        if self.config.server is not None:
            from fura_vlm.evaluation.served import Served

            return Served(source, self.config.batch_size, cache)
        from fura_vlm.evaluation.lmms_model import FuraVLM

        return FuraVLM(
            pretrained=source.base,
            adapter=source.adapter,
            processor=source.processor,
            batch_size=self.config.batch_size,
            dtype=self.config.dtype,
            num_workers=self.config.num_workers,
            cache=cache,
        )

    def published(self, scores: dict[str, TaskScore]) -> dict[str, dict]:
        if self._is_embedded:
            return {}
        of = {task: _benchmark(task) for task in scores}
        whole = sorted(map(str, of.values())) == sorted(BENCHMARKS)
        return {
            name: {
                "scores": {task: method["scores"][of[task]] for task in scores if of[task]},
                "average": mean(method["scores"].values()) if whole else None,
                "source": method["source"],
            }
            for name, method in PUBLISHED.items()
        }

    def notes(self, scores: dict[str, dict[str, TaskScore]], published: bool) -> list[str]:
        one = next(iter(scores.values()))
        lines = []
        if any(each.yes_no for each in one.values()):
            lines = [
                "The interval of POPE's F1 follows from Wilson's interval of the share true yes / (true yes + false "
                "yes + false no).",
                "In POPE, what a model says is what it answered, whatever the right answer is; lmms-eval's yes ratio "
                "counts the right answers. Tuned against base, its answers count as right or wrong.",
            ]
        if published:
            lines.append("Published: LLaVA-1.5-7B on the real benchmarks in the paper's protocol.")
            if self.protocol != "paper":
                lines.append(
                    "lmms-eval's tasks differ from that protocol in TextVQA (no OCR tokens), in POPE (one F1 over all "
                    "questions) and in how sentences are read: --protocol paper follows it."
                )
        return lines

    def pictures(self, task: str, document: int) -> list:
        return self.tasks[task].pictures_of(document)


def _benchmark(task: str) -> str | None:
    from fura_vlm.evaluation.tasks import TASKS

    return next((BENCHMARKS[names.index(task)] for names in TASKS.values() if task in names), None)


def _data(data: str, source: Source) -> str | None:
    """The folder with the data, or ``None`` for the hub."""
    if data == "hub":
        return None
    if data == "auto":
        from fura_vlm.embedded.tiny import is_embedded

        return str(EMBEDDED) if is_embedded(source.config()) else None
    return str(EMBEDDED) if data == "embedded" else data


def _make_embedded() -> None:
    from fura_vlm.embedded.benchmarks import write_benchmarks

    with FileLock(EMBEDDED.with_name(f"{EMBEDDED.name}.lock.tmp")):  # an evaluation in another folder makes them too
        if write_benchmarks(EMBEDDED):
            print(f"The embedded benchmarks are in {EMBEDDED}")


def _quiet() -> None:
    """Hides lmms-eval's log lines below a warning."""
    import lmms_eval.models  # noqa: F401  sets up its own log when it is imported
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")
