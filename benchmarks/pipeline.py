"""The whole training pipeline against the model alone, method by method, on one GPU.

    python benchmarks/pipeline.py                       LLaVA-1.5-7B shapes, random weights: FuRA and LoRA r=128
    python benchmarks/pipeline.py --methods fura --no-compile --checkpointing --batch 16        other forms
    python benchmarks/pipeline.py --static              lengths rounded up to 64 and a graph for each of them
    python benchmarks/pipeline.py --methods fura fura-fp8        FuRA without and with --fp8_backward
    python benchmarks/pipeline.py --tiny                the embedded model, runs on a CPU

The pipeline is the trainer's own: picture files are decoded, padded to a square, resized and normalised by the data
loader's workers; batches are grouped by modality and length, collated, copied; FuraTrainer steps, under DeepSpeed
where it can be imported. Pictures are scenes of the embedded mixture at 336 pixels, JPEG and PNG by turns.
Lengths are drawn by source as in the 665k mixture: the sources and their sizes are LLaVA-1.5's (arXiv 2310.03744,
table 7). The lengths of their texts are log-normal guesses that add up to the published size of the file, 1.03 GB;
only ShareGPT has no pictures, and is cut at 2048.

Each method runs in a process of its own: first steps that compile and warm up, then steps that are timed; then the
very same batches once more, already on the device, with nothing but forward, backward and optimizer. Tokens are those
of records, padding not counted. The epoch is the drawn mixture's tokens at the pipeline's rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from a checkout that is not installed

import numpy as np
import torch
from shapes import family_of_336, random_llava
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from fura_vlm.data.collator import Collator
from fura_vlm.data.images import load_image
from fura_vlm.data.sampler import ModalityLengthSampler
from fura_vlm.embedded.scenes import draw, make_scene
from fura_vlm.families.messages import Message, Picture, Text
from fura_vlm.modelling.load import load_base, load_family
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.methods import compile_layers, prepare
from fura_vlm.training.trainer import FuraTrainer

ROOT = Path(__file__).parents[1]
MAX_LENGTH = 2048
SYSTEM, ROLES = 35, 9  # tokens of Vicuna's system prompt, and of the roles and the end of each question and answer
BYTES_A_TOKEN = 4.2  # of English, with Vicuna's tokenizer
SOURCES = {  # records, questions a record, bytes of a record's text, spread of their logarithm, share of the answers
    "LLaVA": (157_712, 2.25, 1050, 0.45, 0.75),
    "ShareGPT": (40_688, 3.5, None, 0.9, 0.75),  # what the others leave of the file
    "VQAv2": (82_783, 5.4, 260, 0.25, 0.2),
    "GQA": (72_140, 13.1, 650, 0.25, 0.2),
    "OKVQA": (8_998, 1, 110, 0.3, 0.2),
    "OCRVQA": (80_000, 4.8, 350, 0.2, 0.4),
    "A-OKVQA": (66_160, 1, 250, 0.2, 0.05),
    "TextCaps": (21_953, 1, 270, 0.15, 0.4),
    "RefCOCO": (48_447, 5, 550, 0.3, 0.5),
    "VG": (86_417, 10, 950, 0.2, 0.5),
}
RECORDS = sum(source[0] for source in SOURCES.values())
FILE_BYTES = 1.03e9  # of llava_v1_5_mix665k.json
JSON_BYTES = 89, 62  # of a record, and of a question and its answer, besides the text


@dataclasses.dataclass
class Setting:
    """What is measured; the same for every method."""

    tiny: bool
    batch: int
    accumulation: int
    warmup: int
    steps: int
    workers: int
    compile: bool
    static: bool
    checkpointing: bool
    budget: float
    deepspeed: str
    rows: int
    files: int


# ---------------------------------------------------------------------------------------------------------- data


def mixture(rows: int, image_tokens: int, max_length: int, scale: float = 1.0):
    """Tokens of each row, whether it has a picture, and the share of its text that is answers.

    Args:
        rows: how many to draw; in the proportions of the sources.
        scale: of the texts' lengths.
    """
    rng = np.random.default_rng(0)
    names = list(SOURCES)
    drawn = rng.choice(len(names), rows, p=[SOURCES[name][0] / RECORDS for name in names])
    columns = {name: (SOURCES[name][1], mean_bytes(name), *SOURCES[name][3:]) for name in names}
    questions, size, spread, answers = (np.array([columns[name][k] for name in names])[drawn] for k in range(4))
    has_image = np.array([name != "ShareGPT" for name in names])[drawn]
    size = rng.lognormal(np.log(size) - spread**2 / 2, spread)
    text = scale * (SYSTEM + ROLES * questions + size / BYTES_A_TOKEN)
    lengths = np.minimum(text + has_image * image_tokens, max_length).astype(int)
    return lengths, has_image, answers


def mean_bytes(name: str) -> float:
    """Of the text of a source's record."""
    records, _, size, *_ = SOURCES[name]
    if size is not None:
        return size
    others = sum(source[0] * source[2] for source in SOURCES.values() if source[2] is not None)
    json_bytes = sum(source[0] * (JSON_BYTES[0] + JSON_BYTES[1] * source[1]) for source in SOURCES.values())
    return (FILE_BYTES - json_bytes - others) / records


def padding(lengths: np.ndarray, has_image: np.ndarray, batch: int, accumulation: int, multiple: int) -> float:
    """The share of padding in an epoch, lengths rounded up to a multiple."""
    order = np.fromiter(ModalityLengthSampler(lengths, has_image, batch, 1, accumulation), int)
    rows = lengths[order[: len(order) // batch * batch]].reshape(-1, batch)
    return 1 - rows.sum() / (-(-rows.max(1) // multiple) * multiple * batch).sum()


def write_picture(task: tuple[int, int, str]) -> None:
    number, size, folder = task
    picture = draw(dataclasses.replace(make_scene(0, "train", number), canvas=(size, size)))
    if number % 2:
        picture.save(f"{folder}/{number}.png")
    else:
        picture.save(f"{folder}/{number}.jpg", quality=90)


class Rows(Dataset):
    """Rows of the drawn lengths. Each is encoded, cut and spread when it is asked for; ``ConversationDataset`` has the
    first two behind it.
    """

    def __init__(self, family, folder: Path, image_tokens: int, setting: Setting):
        self.family, self.files = family, sorted(folder.glob("*.*g"))
        self.max_length = 400 if setting.tiny else MAX_LENGTH
        scale = 0.1 if setting.tiny else 1.0
        wanted, self.has_image, self.answers = mixture(setting.rows, image_tokens, self.max_length, scale)
        tokenizer = family.tokenizer
        self.word = next(w for w in ("red", "the", "a") if len(tokenizer.encode(f" {w} {w}")) == 3)
        bare = [len(self._tokens(n, 1, 1)["input_ids"]) for n in (self._first(False), self._first(True))]
        self.words = np.maximum(wanted - np.array(bare)[self.has_image * 1] + 2, 2)
        self.lengths = np.minimum(self.words - 2 + np.array(bare)[self.has_image * 1], self.max_length)

    def _first(self, with_image: bool) -> int:
        return int(np.flatnonzero(self.has_image == with_image)[0])

    def _tokens(self, row: int, asked: int, answered: int) -> dict[str, np.ndarray]:
        pictures = (Picture(""),) * int(self.has_image[row])
        question = Message("user", (*pictures, Text(" ".join([self.word] * asked))))
        answer = Message("assistant", (Text(" ".join([self.word] * answered)),))
        [encoded] = self.family.encode([([question, answer], [(336, 336)] * len(pictures))])
        ids, labels = self.family.spread(self.family.cut(encoded, self.max_length))
        return {"input_ids": ids, "labels": labels}

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, row: int) -> dict:
        room = int(min(self.words[row], self.max_length * 0.9))  # a question that leaves room for an answer
        answered = max(1, round(self.answers[row] * room))
        item = self._tokens(row, max(1, int(self.words[row]) - answered), answered)
        item = {key: torch.from_numpy(value) for key, value in item.items()}
        images = [load_image(self.files[row % len(self.files)])] if self.has_image[row] else []
        return item | {"pictures": self.family.pixels(images)}


def decoding_rate(rows: Rows, seconds: float = 3.0) -> float:
    """Rows with pictures a second, made on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with_image = np.flatnonzero(rows.has_image)
    rows[with_image[0]]
    start, number = time.process_time(), 0
    while time.process_time() - start < seconds:
        number += 1
        rows[with_image[number % len(with_image)]]
    torch.set_num_threads(threads)
    return number / (time.process_time() - start)


# --------------------------------------------------------------------------------------------------------- model


EMBEDDED = str(ROOT / "data/tiny-llava")


def family_for(tiny: bool):
    return load_family(EMBEDDED) if tiny else family_of_336(EMBEDDED)


def model_for(tiny: bool, family):
    return load_base(EMBEDDED, torch.float32) if tiny else random_llava(family.run_id)


class Timed(FuraTrainer):
    """The trainer with a clock for the steps after the warm-up, which keeps their batches."""

    def __init__(self, *args, warmup: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.warmup, self.kept, self.started, self.graphs = warmup, [], None, []
        self.add_callback(StopsTheClock(self))

    def get_batch_samples(self, *args, **kwargs):
        if self.state.global_step == self.warmup and self.started is None:
            synchronize()
            self.graphs.append(compiled_graphs())
            self.started = time.perf_counter()
        step = super().get_batch_samples(*args, **kwargs)
        if self.started is not None:
            self.kept.append(step)
        return step


class StopsTheClock(TrainerCallback):
    """Stops it when the last step is done."""

    def __init__(self, trainer: Timed):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        print(f"    step {state.global_step} of {state.max_steps}", flush=True)
        if state.global_step == state.max_steps:
            synchronize()
            self.trainer.seconds = time.perf_counter() - self.trainer.started
            self.trainer.graphs.append(compiled_graphs())


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compiled_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def train_config(method: str) -> TrainConfig:
    """The settings of one of TrainConfig's methods, or of fura-fp8, FuRA with FP8 in its backward pass."""
    plain = method.removesuffix("-fp8")
    return TrainConfig(method=plain, fp8_backward=method != plain)


def make_trainer(method: str, setting: Setting, folder: Path, kind: type[Timed] = Timed) -> Timed:
    """The trainer of a method, with all of the pipeline behind it. The folder has the pictures."""
    cuda = torch.cuda.is_available()
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    if deepspeed:
        if not cuda:
            os.environ["DS_ACCELERATOR"] = "cpu"
        with socket.socket() as free:
            free.bind(("", 0))
            port = str(free.getsockname()[1])
        os.environ |= {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the loader's workers are parallel enough
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as a run sets it
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=setting.batch,
        gradient_accumulation_steps=setting.accumulation,
        max_steps=setting.warmup + setting.steps,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        bf16=cuda,
        tf32=True if cuda else None,
        use_cpu=not cuda,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        deepspeed=str(ROOT / setting.deepspeed) if deepspeed else None,
        dataloader_num_workers=setting.workers,
        dataloader_persistent_workers=setting.workers > 0,
        accelerator_config={"non_blocking": True} if cuda else None,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
            if setting.checkpointing
            else {}
        ),
    )
    started = time.perf_counter()
    family = family_for(setting.tiny)
    model = prepare(model_for(setting.tiny, family), train_config(method), family)
    synchronize()
    print(f"  {method}: model and adapter in {time.perf_counter() - started:.0f} s", flush=True)
    if setting.static:
        torch._dynamo.config.recompile_limit = 128
        for layer in family.parts(model).decoder.layers:
            layer.compile(dynamic=False)
    elif setting.compile:
        compile_layers(model, family, setting.budget)
    rows = Rows(family, folder, family.picture_tokens, setting)
    return kind(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=Collator(family, pad_to_multiple_of=64 if setting.static else 8),
        family=family,
        mm_projector_lr=2e-5,
        group_by_modality_length=True,
        warmup=setting.warmup,
    )


def measure(method: str, setting: Setting, folder: Path) -> dict:
    """A row of the table."""
    cuda, trainer = torch.cuda.is_available(), make_trainer(method, setting, folder)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    logged = [row for row in trainer.state.log_history if "mfu" in row and row["step"] > setting.warmup]
    batches = [batch for step, _ in trainer.kept for batch in step]
    tokens = sum(batch["attention_mask"].sum().item() for batch in batches)
    places = sum(batch["input_ids"].numel() for batch in batches)
    alone = model_only(trainer, trainer.kept)
    samples = sum(len(batch["input_ids"]) for batch in batches)
    return {
        "method": method,
        "tokens/s": tokens / trainer.seconds,
        "tokens/s, model only": tokens / alone,
        "pipeline / model": alone / trainer.seconds,
        "samples/s": samples / trainer.seconds,
        "padding": 1 - tokens / places,
        "mfu": float(np.mean([row["mfu"] for row in logged])) if logged else None,
        "peak GiB": peak,
        "recompilations": trainer.graphs[1] - trainer.graphs[0],
        "graphs": trainer.graphs[1],
        "last loss": next(row["loss"] for row in reversed(trainer.state.log_history) if "loss" in row),
        "deepspeed": trainer.is_deepspeed_enabled,
        "timed": f"{samples} samples, {len(batches)} batches",
    }


def model_only(trainer: FuraTrainer, steps: list) -> float:
    """Seconds for the same batches without loader, copies, callbacks and logging."""
    engine, optimizer = trainer.model_wrapped, trainer.optimizer
    deepspeed = hasattr(engine, "set_gradient_accumulation_boundary")
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    engine.train()
    for timed in (steps[:1], steps):
        synchronize()
        started = time.perf_counter()
        for batches, items in timed:
            for number, batch in enumerate(batches, start=1):
                loss = engine(**trainer._prepare_inputs(dict(batch)), num_items_in_batch=items).loss
                if deepspeed:
                    engine.set_gradient_accumulation_boundary(number == len(batches))
                    engine.backward(loss, scale_wrt_gas=False)
                else:
                    loss.backward()
            if deepspeed:
                engine.step()
            else:
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        synchronize()
    return time.perf_counter() - started


# -------------------------------------------------------------------------------------------------------- report


def table(rows: list[dict], epoch_tokens: float) -> str:
    lines = [
        "| method | tokens/s | model only | pipeline / model | samples/s | padding | MFU | peak, GiB "
        "| recompilations | 665k epoch, h |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
        peak = "" if row["peak GiB"] is None else f"{row['peak GiB']:.1f}"
        lines.append(
            f"| {row['method']} | {row['tokens/s']:,.0f} | {row['tokens/s, model only']:,.0f} "
            f"| {100 * row['pipeline / model']:.1f} % | {row['samples/s']:.2f} | {100 * row['padding']:.2f} % | {mfu} "
            f"| {peak} | {row['recompilations']} | {epoch_tokens / row['tokens/s'] / 3600:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["fura", "lora"], help="TrainConfig's, or fura-fp8")
    parser.add_argument("--batch", type=int, default=8, help="records at once")
    parser.add_argument("--accumulation", type=int, default=16, help="batches in an optimizer step")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the clock starts: new lengths take longer")
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count()))
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--budget", type=float, default=1.0, help="the compiler's activation_memory_budget")
    parser.add_argument("--deepspeed", default="scripts/zero1.json", help="its configuration")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, help="a Markdown file")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a method, in the folder of --output
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("the 7B shapes need a GPU; --tiny runs anywhere")
    values = vars(options)
    setting = Setting(**{field.name: values[field.name] for field in dataclasses.fields(Setting)})
    if options.child:
        (options.output / "row.json").write_text(json.dumps(measure(options.child, setting, options.output)))
        return

    rows = []
    image_tokens, max_length, scale, size = (64, 400, 0.1, 112) if options.tiny else (576, MAX_LENGTH, 1.0, 336)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with ProcessPoolExecutor() as pool:
            tasks = [(number, size, folder) for number in range(options.files)]
            list(pool.map(write_picture, tasks, chunksize=16))
        print(f"{options.files} pictures of {size} pixels in {time.perf_counter() - started:.0f} s", flush=True)
        family = family_for(options.tiny)
        a_core = decoding_rate(Rows(family, Path(folder), image_tokens, setting))
        print(f"one core makes {a_core:.0f} rows with pictures a second", flush=True)
        for method in options.methods:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", method, "--output", folder]
            done = subprocess.run(command, check=False)
            if done.returncode:
                print(f"  {method} failed", flush=True)
                continue
            rows.append(json.loads(Path(folder, "row.json").read_text()))
            print(json.dumps(rows[-1]), flush=True)

    lengths, has_image, _ = mixture(RECORDS, image_tokens, max_length, scale)
    multiple = 64 if options.static else 8
    share = padding(lengths, has_image, options.batch, options.accumulation, multiple)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    form = "no compilation" if not (options.compile or options.static) else "layers compiled"
    form += " for each length" if options.static else ""
    form += ", gradient checkpointing" if options.checkpointing else ""
    zero = f"DeepSpeed with {options.deepspeed}" if rows and rows[0]["deepspeed"] else "without DeepSpeed"
    head = (
        f"# The pipeline: {'the embedded model' if options.tiny else 'LLaVA-1.5-7B shapes, random weights'}\n\n"
        f"{time.strftime('%Y-%m-%d')}, {device}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{zero}, {options.batch} records x {options.accumulation}, {form}, {options.workers} workers; "
        f"{options.steps} steps after {options.warmup}.\n"
        f"`python benchmarks/pipeline.py {' '.join(sys.argv[1:])}`\n\n"
        f"One core decodes and prepares {a_core:.0f} pictures a second. The drawn mixture of {RECORDS:,} records has "
        f"{lengths.mean():.0f} tokens a record; padding in its whole epoch {100 * share:.2f} %.\n\n"
    )
    text = head + table(rows, lengths.sum()) + "\n"
    print("\n" + text)
    if options.output:
        options.output.write_text(text)
    if len(rows) < len(options.methods):
        sys.exit(1)


if __name__ == "__main__":
    main()
