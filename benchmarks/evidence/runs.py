"""The queue of a study: which run is next, several at a time on one GPU, and one row for each that is done.

Rows are lines of JSON, ``rows.jsonl``, written one by one as runs end; a run that has a row is not made again. First
each method is trained with each of its learning rates, then with other seeds at the rate that was best on the
validation parts. The tests have no say in that.
"""

from __future__ import annotations

import fcntl
import gc
import json
import math
import multiprocessing
import os
import platform
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch

from evidence import changes, scoring
from evidence.configuration import EvidenceError, Study, Variant
from evidence.data import Data, load
from evidence.methods import build, linear_names, train_config
from evidence.methods import load as load_model
from evidence.training import Stopped, autocast, train
from fura_vlm.modelling.load import load_family
from fura_vlm.training.methods import method_of

BASE = "base"  # the method of the row of the model as it is


@dataclass(frozen=True)
class Run:
    """A run: a method with a learning rate and a seed, or the base, which has neither.

    Args:
        variant: the method's name, or ``BASE``.
        rate, seed: None for the base.
        phase: ``search``, ``seeds`` or ``base``.
        settings: of the study and the method, see ``Study.settings``.
    """

    variant: str
    rate: float | None
    seed: int | None
    phase: str
    settings: str

    @property
    def key(self) -> tuple:
        return self.variant, self.rate, self.seed, self.settings

    def __str__(self) -> str:
        return self.variant if self.rate is None else f"{self.variant}, rate {self.rate:g}, seed {self.seed}"


# ------------------------------------------------------------------------------------------------------------ rows


def read_rows(file: Path) -> list[dict]:
    """The rows of a file, which need not exist. A last line that was cut off, as by a full disk, is left out.

    Raises:
        EvidenceError: another line is no row.
    """
    if not file.is_file():
        return []
    lines = file.read_text("utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            row["variant"], row["settings"], row["tests"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                continue
            raise EvidenceError(f"{file}, line {number}: it is no row of a study; remove the line") from error
        rows.append(row)
    return rows


def append_row(file: Path, row: dict) -> None:
    """Adds a row with a single write, and has it on the disk. What is left of a row that was cut off is taken away."""
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = os.lseek(handle, 0, os.SEEK_END)
        whole = os.pread(handle, end, 0).rfind(b"\n") + 1
        if whole < end:
            os.ftruncate(handle, whole)
        os.lseek(handle, 0, os.SEEK_END)
        os.write(handle, line)
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other process writes the rows of this folder.

    Raises:
        EvidenceError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EvidenceError(f"{folder} is in use by another process: wait for it, or stop it") from error
        yield


def validation(row: dict) -> float:
    """What a row's learning rate is chosen by: the mean over the validation parts. Nothing for a run that diverged."""
    return -math.inf if row["loss"] is None else mean(row["validation"].values())


def chosen_rate(study: Study, variant: Variant, rows: Iterable[dict], settings: str) -> float | None:
    """The learning rate that a method was best with on validation, over ``search_seeds``; of equals the smallest. None
    if a run of the search is missing. A method with a single rate has no search."""
    if len(variant.rates) == 1:
        return variant.rates[0]
    reached = {
        (row["rate"], row["seed"]): validation(row)
        for row in rows
        if (row["variant"], row["settings"]) == (variant.name, settings)
    }
    means = {}
    for rate in variant.rates:
        found = [reached.get((rate, seed)) for seed in study.search_seeds]
        if None in found:
            return None
        means[rate] = mean(found)
    return max(variant.rates, key=lambda rate: (means[rate], -rate))


def wanted(study: Study, rows: list[dict], data: str) -> Iterator[Run]:
    """The runs that can be made now, as far as what was found in rows says which; those first that say most.

    Methods of a lower tier come first; of a tier first the search, with the middle of each method's rates before its
    ends, and as soon as a method's search is done its runs with other seeds, one of each method after the other.
    """
    yield Run(BASE, None, None, "base", study.settings(None, data))
    for tier in sorted({variant.tier for variant in study.methods}):
        mine = [variant for variant in study.methods if variant.tier == tier]
        search = [
            (place, number, Run(variant.name, rate, seed, "search", study.settings(variant, data)))
            for number, variant in enumerate(mine)
            if len(variant.rates) > 1
            for place, rate in enumerate(_middle_first(variant.rates))
            for seed in study.search_seeds
        ]
        yield from (run for _, _, run in sorted(search, key=lambda each: each[:2]))
        for seed in study.seeds:
            for variant in mine:
                settings = study.settings(variant, data)
                rate = chosen_rate(study, variant, rows, settings)
                if rate is not None:
                    yield Run(variant.name, rate, seed, "seeds", settings)


def _middle_first(rates: tuple[float, ...]) -> list[float]:
    return sorted(rates, key=lambda rate: abs(rates.index(rate) - (len(rates) - 1) / 2))


def missing(study: Study, rows: list[dict], data: str) -> list[Run]:
    """``wanted`` without what has a row."""
    done = {(row["variant"], row["rate"], row["seed"], row["settings"]) for row in rows}
    return [run for run in wanted(study, rows, data) if run.key not in done]


# ------------------------------------------------------------------------------------------------------- one run


class Runner:
    """Makes runs, one after the other, in one process. The data and the base are read once."""

    def __init__(self, study: Study, device: str):
        self.study, self.device = study, device
        if device == "cuda":
            torch.set_float32_matmul_precision("high")
        self.data: Data = load(study.folder / "data.pt")
        self.family = load_family(study.model, conversation=study.conversation)
        self.base = load_model(study, None, self.family, device)
        self.directions: dict[str, changes.Directions] = {}  # of the base, as far as they were asked for

    def __call__(self, run: Run, is_over: Callable[[], bool] = lambda: False) -> dict:
        """The row of a run.

        Raises:
            Stopped: ``is_over`` said so.
        """
        begun = time.monotonic()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row = {"study": self.study.name, "variant": run.variant, "rate": run.rate, "seed": run.seed,
               "phase": run.phase, "settings": run.settings}  # fmt: skip
        model, variant = self.base, None
        if run.variant != BASE:
            variant = self.study.variant(run.variant)
            base = self.base
            if method_of(train_config(self.study, variant)).four_bits:
                base = load_model(self.study, variant, self.family, self.device)
            torch.manual_seed(run.seed)  # for the weights that LoRA draws
            model = build(base, self.study, variant, self.family)
            trained = train(model, self.data, self.family, self.study, variant, run.rate, run.seed, is_over)
            last = trained.losses[-max(1, len(trained.losses) // 20) :]
            row |= {"steps": trained.steps, "trained": trained.trained, "loss": finite(mean(last)),
                    "train_seconds": round(time.monotonic() - begun, 1)}  # fmt: skip
        else:
            row |= {"steps": 0, "trained": 0, "loss": 0.0, "train_seconds": 0.0}
        row |= self._scores(model, is_over)
        if variant is not None:
            row |= self._changes(model, variant, run)
        row["seconds"] = round(time.monotonic() - begun, 1)
        row["date"] = time.strftime("%Y-%m-%d")
        row["machine"] = torch.cuda.get_device_name() if self.device == "cuda" else f"CPU, {platform.machine()}"
        row["torch"] = torch.__version__
        if self.device == "cuda":
            row["memory"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        return row

    def _scores(self, model, is_over: Callable[[], bool]) -> dict:
        scorer = scoring.Scorer(model, self.family, autocast(self.study, self.device))
        found: dict = {"validation": {}, "tests": {}, "right": {}}
        for place, parts in (("validation", self.data.validation), ("tests", self.data.tests)):
            for name, part in parts.items():
                if is_over():
                    raise Stopped
                right = scorer.score(part, self.data)
                found[place][name] = 100 * mean(right)
                if place == "tests":
                    found["right"][name] = packed(right)
        return found | {"perplexity": finite(scorer.perplexity(self.data.plain))}

    def _changes(self, model, variant: Variant, run: Run) -> dict:
        if method_of(train_config(self.study, variant)).four_bits:  # no plain weights to compare
            return {}
        model.requires_grad_(False)
        names = linear_names(self.base, self.study, self.family)
        found: dict = {"change": changes.sizes(model, self.base, names)}
        if run.phase == "seeds" and run.seed == self.study.seeds[0] and self.study.spectrum:
            chosen = [name for name in names if {*name.split(".")} & {str(number) for number in self.study.spectrum}]
            found["spectra"] = changes.spectra(model, self.base, chosen, self.directions)
        return found


def finite(value: float) -> float | None:
    """None in the place of what JSON has no number for."""
    return value if math.isfinite(value) else None


def packed(right: list[bool]) -> str:
    """Which questions were answered right, a bit each, the first one the highest, as hexadecimal digits."""
    bits = "".join("01"[value] for value in right)
    return f"{int(bits or '0', 2):0{-(-len(right) // 4)}x}"


# ------------------------------------------------------------------------------------------------------ the queue


def work(study: Study, device: str, jobs: int, minutes: float | None, say: Callable[[str], None] = print) -> int:
    """Makes what is missing of a study; returns how many rows were written.

    Args:
        jobs: processes that make runs at the same time, on the same GPU; 0 makes them in this one.
        minutes: no run goes on after so many; None: until all is done. A run that would not be done in time, by how
            long those before it took, is not begun.

    Raises:
        EvidenceError: the data are missing, another process works in the same folder, or a run failed.
    """
    deadline = math.inf if minutes is None else time.time() + 60 * minutes
    with alone(study.folder), _interruptible() as interrupted:

        def is_over() -> bool:
            return interrupted.is_set() or time.time() >= deadline

        with _Processes(study, device, jobs, deadline) if jobs else _Here(study, device, is_over) as made:
            return _work(study, made, deadline, is_over, say)


def _work(study: Study, made, deadline: float, is_over: Callable[[], bool], say: Callable[[str], None]) -> int:
    file = study.folder / "rows.jsonl"
    fingerprint = load(study.folder / "data.pt").fingerprint
    written, failed, running = 0, {}, {}
    while True:
        rows = read_rows(file)
        todo = [run for run in missing(study, rows, fingerprint) if run.key not in failed and run.key not in running]
        over = is_over()
        if over:
            made.stop()
        for run in [] if over else todo:
            if made.free(len(running)) and time.time() + expected(run, rows) < deadline:
                running[run.key] = run
                made.begin(run)
        if not running:
            if todo:
                say(f"{written} rows written; {len(todo)} runs are left as far as is known: the same command goes on")
            break
        done = made.next()
        if done is None:
            continue
        run, row, trouble = done
        del running[run.key]
        if row is not None:
            append_row(file, row)
            written += 1
            say(f"{run}: validation {mean(row['validation'].values()):.1f}, {row['seconds']:.0f} s")
        elif trouble is not None:
            failed[run.key] = trouble
            say(f"{run} failed: {trouble}")
    if failed:
        raise EvidenceError(
            f"{len(failed)} runs failed, the first with {next(iter(failed.values()))}: mend that (of memory, fewer "
            "--jobs), and give the same command again"
        )
    return written


def expected(run: Run, rows: list[dict]) -> float:
    """The seconds that a run will take: the median of its method's so far, or of all; 0 before there are any."""
    of = [row["seconds"] for row in rows if row["variant"] == run.variant]
    of = of or [row["seconds"] for row in rows if row["variant"] != BASE]
    return median(of) if of else 0.0


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Inside, SIGINT and SIGTERM set an event and do nothing else."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Here:
    """Makes runs in this process, one when it is asked for."""

    def __init__(self, study: Study, device: str, is_over: Callable[[], bool]):
        self.runner, self.is_over, self.run = Runner(study, device), is_over, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def free(self, running: int) -> bool:
        return running == 0

    def begin(self, run: Run) -> None:
        self.run = run

    def stop(self) -> None:
        pass  # what is_over says is enough

    def next(self):
        return _made(self.runner, self.run, self.is_over)


class _Processes:
    """Makes runs in processes of their own."""

    def __init__(self, study: Study, device: str, jobs: int, deadline: float):
        context = multiprocessing.get_context("spawn")  # CUDA does not go through a fork
        self.jobs, self.asked, self.done = jobs, context.Queue(), context.Queue()
        self.stopped = context.Event()
        given = study, device, jobs, deadline, self.asked, self.done, self.stopped
        self.processes = [context.Process(target=_serve, args=given, daemon=True) for _ in range(jobs)]

    def __enter__(self):
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_):
        self.stop()
        for _ in self.processes:
            self.asked.put(None)
        for process in self.processes:
            process.join(30)
            if process.is_alive():
                process.kill()

    def free(self, running: int) -> bool:
        return running < self.jobs

    def begin(self, run: Run) -> None:
        self.asked.put(run)

    def stop(self) -> None:
        self.stopped.set()

    def next(self):
        """The next run that has ended, or None after a second without one.

        Raises:
            EvidenceError: a process is gone, as when the system had no memory for it.
        """
        try:
            return self.done.get(timeout=1)
        except queue.Empty:
            gone = [process for process in self.processes if not process.is_alive()]
            if gone:
                raise EvidenceError(
                    f"A process of the study has ended with {gone[0].exitcode}: look above for the reason; without one "
                    "memory may have run out, so try fewer --jobs"
                ) from None
            return None


def _serve(study: Study, device: str, jobs: int, deadline: float, asked, done, stopped) -> None:
    """A process that makes runs until it gets None."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all; the first process decides
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    runner = Runner(study, device)
    while (run := asked.get()) is not None:
        done.put(_made(runner, run, lambda: stopped.is_set() or time.time() >= deadline))


def _made(runner: Runner, run: Run, is_over: Callable[[], bool]) -> tuple[Run, dict | None, str | None]:
    """A run with its row, or with what went wrong, or with neither if it was given up."""
    try:
        return run, runner(run, is_over), None
    except Stopped:
        return run, None, None
    except Exception as error:
        traceback.print_exc()
        return run, None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        gc.collect()  # the loss that a model was given holds on to it
        if runner.device == "cuda":
            torch.cuda.empty_cache()
