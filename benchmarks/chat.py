"""Tokens per second of the chat's engine against a bare ``generate`` with a streamer, on LLaVA-1.5-7B's shapes.

    python benchmarks/chat.py [--tokens 256] [--repeats 5]      one GPU; random weights, so nothing is downloaded

Each pair is measured one after the other, with the adapter on, from the question to the last token.
"""

import argparse
import queue
import statistics
import threading
import time

import torch
from peft import get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from fura_vlm import FuraConfig
from fura_vlm.chat.engine import Engine, Sampling
from fura_vlm.training.config import TARGET_MODULES

IMAGE_TOKENS, IMAGE_TOKEN, TEXT_TOKENS = 576, 32000, 64

parser = argparse.ArgumentParser(description="Tokens per second of the chat's engine.")
parser.add_argument("--tokens", type=int, default=256)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--together", type=int, default=8, help="answers written at once in the second part")
parser.add_argument("--tiny", action="store_true", help="two small layers, to try the script without a GPU")
options = parser.parse_args()

small = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4}
text = LlamaConfig(
    vocab_size=32064, max_position_embeddings=4096, **(small if options.tiny else {"intermediate_size": 11008})
)
vision = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
if options.tiny:
    vision.num_hidden_layers = 2
config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
with torch.device(device):
    torch.set_default_dtype(dtype)
    llava = LlavaForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
model = get_peft_model(llava, FuraConfig(target_modules=TARGET_MODULES, task_type="CAUSAL_LM")).eval()
llava.generation_config.eos_token_id = -1  # random weights: every answer has full length

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
def bare() -> float:
    """Tokens per second of ``generate`` with a streamer that another thread reads."""
    placed = {name: value.to(device) for name, value in inputs.items()}
    placed["pixel_values"] = placed["pixel_values"].to(dtype)
    streamer = Tokens()
    reader = threading.Thread(target=lambda: list(iter(streamer.queue.get, None)))
    reader.start()
    started = time.monotonic()
    model.generate(**placed, streamer=streamer, do_sample=False, max_new_tokens=options.tokens)
    reader.join()
    return options.tokens / (time.monotonic() - started)


def chat(engine: Engine, rows: int) -> float:
    started = time.monotonic()
    sampling = Sampling(max_new_tokens=options.tokens)
    generations = [engine.submit(inputs, "default", sampling) for _ in range(rows)]
    while not all(generation.done for generation in generations):
        time.sleep(0.002)
    assert not any(generation.error for generation in generations), generations[0].error
    return rows * options.tokens / (time.monotonic() - started)


def median(measure) -> float:
    measure()  # once to warm up
    return statistics.median(measure() for _ in range(options.repeats))


name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
print(f"{name}, {dtype}, prompt {ids.shape[1]} tokens, {options.tokens} new, median of {options.repeats}")
alone = median(bare)
print(f"generate with a streamer   {alone:8.1f} tokens/s")
engine = Engine(model, max_rows=options.together)
one = median(lambda: chat(engine, 1))
print(f"the chat, one answer       {one:8.1f} tokens/s, {one / alone:.1%}")
many = median(lambda: chat(engine, options.together))
print(f"the chat, {options.together} answers       {many:8.1f} tokens/s in all")
engine.close()
