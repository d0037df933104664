"""Tokens per second of the chat's engine, without and with CUDA graphs, against a bare ``generate`` with a streamer, on
LLaVA-1.5-7B's shapes.

    python benchmarks/chat.py [--tokens 128] [--pairs 3] > benchmarks/results/chat.md

One GPU; random weights, so nothing is downloaded. Prints a table in Markdown. They take turns, with a FuRA adapter on
unless it says otherwise. Rates of the chat are those after the first token, as it is there that graphs help; the time
of the first is given beside them. The limit is how often the weights could be read from the GPU's memory.
"""

import argparse
import datetime
import os
import queue
import statistics
import sys
import threading
import time

import peft
import torch
import transformers
from peft import get_peft_model
from shapes import random_llava, reads_per_second
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from fura_vlm import FuraConfig
from fura_vlm.chat.engine import Engine, Generation, Sampling
from fura_vlm.families.llava import Llava, named_config

IMAGE_TOKENS, IMAGE_TOKEN, TEXT_TOKENS = 576, 32000, 64
ENGINES = {"launched one by one": False, "CUDA graphs": True}
READ_SECONDS = 0.1  # how often the page looks at what has been written

parser = argparse.ArgumentParser(description="Tokens per second of the chat's engine.")
parser.add_argument("--tokens", type=int, default=128)
parser.add_argument("--pairs", type=int, default=3)
parser.add_argument("--together", type=int, default=8, help="answers written at once in the second part")
parser.add_argument("--tiny", action="store_true", help="many small layers, to try the script without a GPU")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
torch.manual_seed(0)
if options.tiny:
    text = LlamaConfig(vocab_size=32064, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    vision = named_config("7b").vision_config
    vision.num_hidden_layers = 2
    with torch.device(device):
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
        llava = LlavaForConditionalGeneration(config).eval().to(dtype)
else:
    llava = random_llava(IMAGE_TOKEN)
for settings in (llava.generation_config, llava.config.text_config):
    settings.eos_token_id = None  # random weights may write any token: none ends an answer
llava.generation_config.pad_token_id = 0
layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
fura = FuraConfig(target_modules=layers, init_weights=False, task_type="CAUSAL_LM")
model = get_peft_model(llava, fura).eval()
family = Llava(None, llava.config)

ids = torch.randint(5, 31000, (1, 1 + IMAGE_TOKENS + TEXT_TOKENS))
ids[0, 1 : 1 + IMAGE_TOKENS] = IMAGE_TOKEN
inputs = {
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
    "pixel_values": torch.randn(1, 3, 336, 336),
}


class Tokens(BaseStreamer):
    """Hands tokens to a reader in another thread, as a chat needs them."""

    def __init__(self):
        self.queue = queue.Queue()

    def put(self, value):
        self.queue.put(value)

    def end(self):
        self.queue.put(None)


@torch.inference_mode()
def bare(length: int) -> tuple[float, list[int]]:
    """Tokens per second of ``generate`` with a streamer that another thread reads, and the tokens."""
    streamer, read = Tokens(), []
    reader = threading.Thread(target=lambda: read.extend(iter(streamer.queue.get, None)))
    reader.start()
    started = time.monotonic()
    placed = {name: value.to(device) for name, value in inputs.items()}
    placed["pixel_values"] = placed["pixel_values"].to(dtype)
    model.generate(**placed, streamer=streamer, do_sample=False, max_new_tokens=length)
    ended = time.monotonic()
    reader.join()
    return length / (ended - started), [int(token) for token in read[1:]]  # the first are the prompt's


def chat(engine: Engine, length: int, adapters: list[str | None]) -> tuple[float, float, list[int]]:
    """Of as many answers at once: tokens per second after the first, all together; seconds until the first one's first
    token; and its tokens."""
    generations = [engine.submit(inputs, adapter, Sampling(max_new_tokens=length)) for adapter in adapters]
    wait(generations)
    wait([engine.submit(inputs, "default", Sampling(max_new_tokens=1))])  # leaves the adapter on, for ``generate``
    seconds = max(generation.ended for generation in generations) - max(generation.began for generation in generations)
    first = generations[0]
    return len(adapters) * (length - 1) / seconds, first.began - first.asked, first.tokens


def wait(generations: list[Generation]) -> None:
    while not all(generation.done for generation in generations):
        time.sleep(READ_SECONDS)
    failed = next((generation.error for generation in generations if generation.error), None)
    assert failed is None, failed
    assert all(len(generation.tokens) == generation.sampling.max_new_tokens for generation in generations)


def limit() -> float | None:
    """Tokens per second of one answer if reading the decoder's weights and the head once took all of the time."""
    parts = family.parts(llava)
    # A token reads one row of the embeddings, and adapters are no part of the limit.
    read = [p for name, p in parts.decoder.named_parameters() if "embed_tokens" not in name and "fura" not in name]
    return reads_per_second([*read, *parts.head.parameters()])


cases = {
    "one answer, the base": [None],
    "one answer": ["default"],
    f"{options.together} answers together": ["default"] * options.together,
    "side by side: adapter and base": ["default", None],
}
most, rows, same = limit(), [], True
engines = {name: Engine(model, family, max_rows=options.together, graphs=graphs) for name, graphs in ENGINES.items()}
for engine in engines.values():  # each knows what adapter it has turned on itself; from here on all know the same
    wait([engine.submit(inputs, "default", Sampling(max_new_tokens=1))])
for name, adapters in cases.items():
    for engine in engines.values():
        chat(engine, 8, adapters), chat(engine, 8, adapters)  # to warm up, and to record
    found = {engine: [] for engine in engines}
    alone = []
    for _ in range(options.pairs):
        (rate, expected) = bare(options.tokens)
        alone.append(rate)
        for label, engine in engines.items():
            torch.cuda.reset_peak_memory_stats() if device == "cuda" else None
            rate, first, written = chat(engine, options.tokens, adapters)
            memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
            found[label].append((rate, first, memory))
            same = same and (adapters != ["default"] or written == expected)
            print(f"{name}, {label}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
    for label, measured in found.items():
        rate, first, memory = (statistics.median(column) for column in zip(*measured, strict=True))
        share = f"{rate / most:.0%}" if most and len(adapters) == 1 else ""
        rows.append(
            f"| {name} | {label} | {rate:.1f} | {share} | {1000 * first:.0f} | {memory:.2f} | "
            f"{statistics.median(alone):.1f} |"
        )
for engine in engines.values():
    engine.close()

hardware = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"
versions = f"torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}"
shapes = "small layers, not the 7B's" if options.tiny else "LLaVA-1.5-7B's shapes"
print("# The chat against a bare `generate`\n")
print(f"{datetime.date.today()}, {hardware}, {dtype}, {versions}.")
print(f"{shapes}, a FuRA adapter on, a prompt of {ids.shape[1]} tokens, {options.tokens} new ones.")
print("The rates are medians of turns one after the other.")
print("Every answer alone is that of `generate`.\n" if same else "An answer alone differs from that of `generate`.\n")
print(f"    python {' '.join(sys.argv)}\n")
print("| the chat | steps | tokens/s in all, after the first | of the limit | first, ms | GiB | `generate` |")
print("|---|---|---:|---:|---:|---:|---:|")
print("\n".join(rows))
