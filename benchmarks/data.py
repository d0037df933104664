"""The data path: how fast a mixture is tokenized and indexed, what a start costs, whether memory stays flat as the
mixture grows, and whether the verifier is bound by the decoder.

    python benchmarks/data.py [--records 20000 80000 320000] [--images 1500]

The mixture is generated: kinds and lengths of records are about those of LLaVA v1.5's 665k (per record 1.5 kB, 6 %
text only and long), the words are those of the installed packages' descriptions, and a BPE tokenizer of Vicuna's size
and form is trained on them. No image is decoded for the index. Each figure comes from a process of its own.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions
from pathlib import Path

import psutil
from PIL import Image

parser = argparse.ArgumentParser(description="The data path, measured.")
parser.add_argument("--records", type=int, nargs="*", default=[20_000, 80_000, 320_000])
parser.add_argument("--images", type=int, default=1500)
parser.add_argument("--folder", help="where to work; by default a temporary folder")
parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)  # what the processes of their own do, and to what

# Of 1000 records: how many, turns, and characters of all turns (mean). From the mixture's composition (table 7 of
# arXiv 2310.03744) and its size, 1.03 GB for 665,298 records.
KINDS = {
    "text only (ShareGPT)": (61, 8, 8000),
    "conversation": (87, 8, 1300),
    "detail": (35, 2, 900),
    "reasoning": (115, 2, 1300),
    "questions with short answers": (702, 10, 600),
}


def corpus() -> str:
    text = "\n".join(text for d in distributions() if (text := d.metadata.get_payload()))
    return text.replace("\u0120", " ")  # a word with it makes transformers take the tokenizer for GPT-2's


def write_mixture(path: Path, records: int, text: str) -> None:
    rng = random.Random(0)
    kinds = [kind for kind, (share, *_) in KINDS.items() for _ in range(share)]
    with path.open("w") as file:
        file.write("[")
        for number in range(records):
            kind = rng.choice(kinds)
            _, turns, mean = KINDS[kind]
            conversations = []
            for turn in range(turns):
                length = max(4, int(rng.lognormvariate(0, 0.8) / 1.38 * mean / turns))
                start = rng.randrange(len(text) - length)
                value = text[start : start + length].strip().replace("<", "(") or "Yes"
                conversations.append({"from": ("human", "gpt")[turn % 2], "value": value})
            record = {"id": f"{number:012d}", "conversations": conversations}
            if "text only" not in kind:
                record["image"] = f"coco/train2017/{number:012d}.jpg"
                conversations[0]["value"] = "<image>\n" + conversations[0]["value"]
            file.write((",\n" if number else "") + json.dumps(record))
        file.write("]")


def write_processor(folder: Path, text: str) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    from fura_vlm.families.llava import make_processor, named_config

    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    options = {"vocab_size": 32_000, "special_tokens": special, "max_token_length": 16, "show_progress": False}
    bpe.train_from_iterator([text], trainers.BpeTrainer(**options))
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True, pad_token="<pad>")
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    make_processor(tokenizer, 336, 14).save_pretrained(folder)
    config = named_config("7b")
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.save_pretrained(folder)


def step(name: str, path: str) -> None:
    """One measurement: prints seconds, the growth of the peak of memory in MiB, a figure, and seconds of the cores."""
    from fura_vlm.data.index import open_index
    from fura_vlm.modelling.load import load_family

    path = Path(path)
    family = load_family(str(path.parent / "processor"))
    family.tokenizer(["warm"])
    before, started, worked = forget_peak(), time.perf_counter(), time.process_time()
    if name == "json":
        told = len(json.loads(path.read_text()))
    else:
        index = open_index(path, path.parent, family, 2048, path.parent / "index", progress=False)
        told = len(index.problems)
        if name == "start":
            dataset, _ = index.dataset(family, "none")
            dataset[int(dataset.has_image.argmin())]  # a row without picture
            told = int(dataset.lengths.mean())
    took, work = time.perf_counter() - started, time.process_time() - worked
    print(json.dumps([took, max(0, peak() - before), told, work]))


def forget_peak() -> float:
    """Memory in use, in MiB, from which the peak is measured anew (Linux, proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss / 2**20


def peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measured(name: str, path: Path) -> list:
    command = [sys.executable, __file__, "--step", name, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def indexes(folder: Path, sizes: list[int]) -> None:
    text = corpus()
    write_processor(folder / "processor", text)
    print("The index: making it, a start from it, and `json.loads` of the mixture, which it saves every process.\n")
    print(
        "| records | MB | made, records/s | a core's second | peak MiB | MB | start s | peak MiB | json s | peak MiB |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for records in sizes:
        path = folder / f"{records}.json"
        write_mixture(path, records, text)
        build, build_peak, _, work = measured("index", path)
        start, start_peak, mean, _ = measured("start", path)
        parsed, parsed_peak, *_ = measured("json", path)
        size = sum(file.stat().st_size for file in Path(f"{path}.index").rglob("*.arrow"))
        row = [records, path.stat().st_size / 1e6, records / build, records / work, build_peak, size / 1e6]
        row += [start, start_peak, parsed, parsed_peak]
        print("| " + " | ".join(f"{figure:,.{2 if figure < 10 else 0}f}" for figure in row) + " |", flush=True)
        shutil.rmtree(f"{path}.index")
        path.unlink()
    print("\nPeaks are what a process grows by over its state with all libraries loaded.")
    print(f"Mean length of a row: {mean} tokens, 576 of them an image's where there is one.")


def decode(paths: list[str]) -> None:
    """The pure decoder loop: what no verifier can be faster than."""
    for path in paths:
        with Image.open(path) as image:
            image.load()


def write_images(folder: Path, number: int) -> list[str]:
    """Photo-like JPEGs of COCO's size, 640 x 480; every 50 share their content."""
    (folder / "coco/train2017").mkdir(parents=True)
    paths = []
    for index in range(number):
        path = folder / f"coco/train2017/{index:012d}.jpg"
        if index < 50:
            picture = Image.effect_noise((160, 120), 60 + index).resize((640, 480), Image.Resampling.BICUBIC)
            Image.merge("RGB", [picture, picture.rotate(180), picture.transpose(0)]).save(path, quality=90)
        else:
            path.write_bytes(Path(paths[index % 50]).read_bytes())
        paths.append(str(path))
    return paths


def verifier(folder: Path, number: int) -> None:
    from fura_vlm.data.verify import verify_images

    paths = write_images(folder / "pictures", number)
    mixture = folder / "pictures.json"
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Yes"}]
    mixture.write_text(
        json.dumps([{"image": os.path.relpath(path, folder / "pictures"), "conversations": turns} for path in paths])
    )
    cores = len(os.sched_getaffinity(0))

    def loop() -> None:
        with ProcessPoolExecutor(cores) as pool:
            list(pool.map(decode, [paths[i::cores] for i in range(cores)]))

    def ours() -> None:
        found = verify_images(mixture, folder / "pictures", folder / "report", cores, progress=False)
        assert sum(counts.good for counts in found.values()) == number
        (folder / "report/good.txt").unlink()

    loop()  # files are in memory now
    print(f"\n{number} JPEGs of 640 x 480, {cores} processes; images a second, and of a core's second.\n")
    print("| | pure decoder loop | verifier | ratio | loop, a core's second | verifier | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for run in range(1, 4):
        (fast, work), (slow, more) = timed(loop), timed(ours)
        figures = [number / fast, number / slow, fast / slow, number / work, number / more, work / more]
        print(f"| run {run} | " + " | ".join(f"{figure:,.{2 if figure < 10 else 0}f}" for figure in figures) + " |")


def timed(job) -> tuple[float, float]:
    """Seconds, and seconds of all cores, in this process and those that it has started and seen end."""

    def worked() -> float:
        used = os.times()
        return used.user + used.system + used.children_user + used.children_system

    started, before = time.perf_counter(), worked()
    job()
    return time.perf_counter() - started, worked() - before


def main(options: argparse.Namespace, folder: Path) -> None:
    if options.records:
        indexes(folder, options.records)
    if options.images:
        verifier(folder, options.images)


if __name__ == "__main__":
    options = parser.parse_args()
    if options.step:
        step(*options.step)
    else:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            main(options, Path(folder))
