"""Samples a second of the evaluation, end to end, on the shapes of LLaVA-1.5-7B.

    python benchmarks/evaluation.py                                      random weights, on a GPU
    python benchmarks/evaluation.py --model data/tiny-llava --samples 64 --sizes 8    a model with weights, anywhere

A sample is a JPEG of 640 x 480 pixels, noise over a gradient, and a question; with the conversation around it that is
576 image tokens and about 64 of text, in five lengths. It gets 16 new tokens, as a task of lmms-eval asks for them. End
to end is from the file in memory to the answer as text, with the start of the processes that prepare the pictures.
"batch 1" is how lmms-eval's own LLaVA goes, one sample after the other, in one process. "model only" has its inputs on
the GPU; the last line is with transformers' own cache, which copies all keys and values for each new token.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import transformers
from PIL import Image
from shapes import family_of_336, random_llava

from fura_vlm.evaluation.generation import Answerer, Prepared, Question
from fura_vlm.modelling.load import load_base, load_family

ARGUMENTS = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16, "until": ["\n\n"]}
THINGS = ("car", "red car", "small red car", "car and the tree", "red car and the old tree")
QUESTION = "Is the {} to the left of the {}?\nAnswer the question using a single word or phrase."


def questions(number: int) -> list[Question]:
    """Questions of several lengths, each with its picture."""
    rng = np.random.default_rng(0)
    gradient = np.linspace(0, 200, 640)[None, :, None]
    files = []
    for _ in range(min(number, 64)):
        buffer = io.BytesIO()
        pixels = gradient + rng.integers(0, 56, (480, 640, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())

    texts = [QUESTION.format(thing, thing) for thing in THINGS]
    return [
        Question(f"question {n}", texts[n % len(texts)], partial(pictures, files[n % len(files)]), ARGUMENTS)
        for n in range(number)
    ]


def pictures(file: bytes) -> list[Image.Image]:
    return [Image.open(io.BytesIO(file)).convert("RGB")]


def seconds(device: torch.device, call) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def end_to_end(answerer: Answerer, asked: list[Question]) -> tuple[float, float]:
    """Samples a second, and the share of the time in which the model waited for pictures."""
    taken = seconds(answerer.device, lambda: sum(map(len, answerer.answers(asked))))
    return len(asked) / taken, answerer.waited / taken


@torch.inference_mode()
def model_only(answerer: Answerer, asked: list[Question], own: bool = True, repeats: int = 2) -> dict[str, float]:
    """Seconds of one batch as a whole, of its pictures (tower and projector), of all before the first new token, and
    of the other fifteen.
    """
    prepared = Prepared(answerer.family, asked, answerer.dtype)
    inputs = [prepared[number] for number in range(len(asked))]
    batch = {name: value.to(answerer.device) for name, value in answerer.family.batch(inputs).items()}

    def generate(new: int) -> None:
        arguments = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
        how = answerer.how(arguments) if own else {}
        pad = answerer.family.tokenizer.pad_token_id
        answerer.model.generate(**batch, **arguments, **how, pad_token_id=pad)

    def best(call) -> float:
        return min(seconds(answerer.device, call) for _ in range(repeats))

    generate(2)
    whole, first = best(lambda: generate(ARGUMENTS["max_new_tokens"])), best(lambda: generate(1))
    pictures = best(lambda: answerer.model.get_image_features(pixel_values=batch["pixel_values"]))
    return {"whole": whole, "pictures": pictures, "prefill": first - pictures, "decode": whole - first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a LLaVA with weights; by default random ones of the 7B's shapes, on a GPU")
    parser.add_argument("--tokenizer", default="data/tiny-llava", help="processor for the random weights")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256], help="batch sizes")
    parser.add_argument("--single", type=int, default=12, help="samples of the runs one at a time")
    parser.add_argument("--workers", type=int, help="processes that prepare pictures")
    parser.add_argument("--output", type=Path, help="folder for evaluation.md")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    if options.model:
        llava = load_base(options.model, dtype).to("cuda" if cuda else "cpu")
        family = load_family(options.model)
    elif cuda:
        family = family_of_336(options.tokenizer)
        llava = random_llava(family.run_id)
    else:
        parser.error("the 7B shapes need a GPU; name a small model with --model")

    asked = questions(options.samples)
    first_of_each = Prepared(family, asked[: len(THINGS)], dtype)
    lengths = [first_of_each[number]["input_ids"].shape[-1] for number in range(len(first_of_each))]
    alike = asked[2 :: len(THINGS)]  # questions of one length, as the suite puts them into a batch
    lines, first = [], []

    def row(name: str, rate: float, *cells: str) -> None:
        first.append(rate)
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if cuda else ""
        lines.append(f"| {' | '.join([name, f'{rate:.2f}', f'{rate / first[0]:.1f}', *cells, peak])} |")
        print(lines[-1], flush=True)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def whole(name: str, answerer: Answerer, number: int) -> None:
        end_to_end(answerer, asked[: 2 * answerer.batch_size])  # warms up, and finds what fits
        rate, waited = end_to_end(answerer, asked[:number])
        row(f"{name}, end to end", rate, f"{100 * waited:.1f} %", "", "", "")

    def model(name: str, answerer: Answerer, own: bool = True) -> None:
        batch = list(itertools.islice(itertools.cycle(alike), answerer.batch_size))
        spent = model_only(answerer, batch, own)
        shares = [f"{100 * spent[part] / spent['whole']:.0f} %" for part in ("pictures", "prefill", "decode")]
        row(f"{name}, model only", len(batch) / spent["whole"], "", *shares)

    single = Answerer(llava, family, dtype, 1, num_workers=0)
    whole("batch 1", single, options.single)
    model("batch 1", single)
    for size in options.sizes:
        answerer = Answerer(llava, family, dtype, size, num_workers=options.workers)
        whole(f"batch {size}", answerer, options.samples)
        if answerer.batch_size < size:
            lines[-1] = lines[-1].replace(f"batch {size}", f"batch {size}, cut to {answerer.batch_size}")
            break
        model(f"batch {size}", answerer)
    answerer = Answerer(llava, family, dtype, options.sizes[0], num_workers=options.workers)
    model(f"batch {options.sizes[0]}, transformers' cache", answerer, own=False)

    hardware = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    text = "\n".join([
        f"# Evaluation: {'the shapes of LLaVA-1.5-7B' if not options.model else options.model}, {dtype}",
        "",
        f"{time.strftime('%Y-%m-%d')}, {hardware}, {os.cpu_count()} CPU cores, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}.",
        f"{options.samples} samples of {min(lengths)} to {max(lengths)} tokens (mean {mean(lengths):.0f}), "
        f"{ARGUMENTS['max_new_tokens']} new; {answerer.num_workers} processes prepare pictures.",
        f"`python benchmarks/evaluation.py {' '.join(sys.argv[1:])}`",
        "",
        "| | samples/s | of batch 1 | waits for pictures | tower | prefill | decode | peak, GiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *lines,
    ])  # fmt: skip
    print("\n" + text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "evaluation.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
