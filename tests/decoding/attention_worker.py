"""Runs the attention kernel in Triton's interpreter, which must be chosen before Triton is imported; prints relative
errors as JSON, one object a line. The interpreter has no bfloat16 products; float16 stands in."""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import transformers
from family_models import _text
from transformers import DynamicCache

from fura_vlm.decoding import attention
from fura_vlm.decoding.rows import Decoder, Rows
from fura_vlm.families.text import Language

torch.set_num_threads(1)


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def kernel(rows, heads, kv_heads, size, columns, dtype, window=None):
    """Against softmax(q k / sqrt(size)) v in float64, each row over its own columns; beyond them there is rubbish."""
    torch.manual_seed(0)
    query = torch.randn(rows, heads, 1, size).to(dtype)
    key, value = (torch.randn(rows, kv_heads, columns, size).to(dtype) for _ in range(2))
    places = torch.randint(0, columns, (rows,))
    places[0] = columns - 1
    expected = torch.empty(rows, 1, heads, size, dtype=torch.float64)
    for row, place in enumerate(places.tolist()):
        first = 0 if window is None else max(0, place + 1 - window)
        for head in range(heads):
            k, v = (states[row, head * kv_heads // heads, first : place + 1].double() for states in (key, value))
            weights = (k @ query[row, head, 0].double() / size**0.5).softmax(0)
            expected[row, 0, head] = weights @ v
        key[row, :, place + 1 :], value[row, :, place + 1 :] = float("nan"), float("inf")
    found = attention.attend(query, key, value, places, size**-0.5, window)
    report(f"kernel {rows} {heads} {kv_heads} {size} {columns} {dtype} {window}", half=dtype == torch.float16,
           error=error(found, expected))  # fmt: skip


def model(name, config_class, **settings):
    """Rows of a model that come and go, written with the kernel and with transformers' own attention."""
    config = config_class(vocab_size=97, **_text(**settings))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    written = {}
    for implementation in ("sdpa", attention.NAME):
        model.config._attn_implementation = implementation
        rows, logits = Rows(Decoder(model, Language(None, config))), []
        torch.manual_seed(1)
        for number, length in enumerate((5, 30, 11)):
            ids = torch.randint(0, 97, (1, length))
            cache = DynamicCache()
            token = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)
            rows.add(number, cache, token, 0)
            for _ in range(7):
                if implementation == "sdpa":
                    logits.append(rows.step())
                else:
                    cache = rows._cache
                    cache.make_room()
                    cache.width = cache.columns  # as a graph has it
                    with attention.attending(cache.places[: len(rows.rows)]):
                        logits.append(rows._decoder(rows.last, cache.places[: len(rows.rows)], cache))
                    cache.width = None
                    cache.advance()
                rows.last = logits[-1].argmax(-1)
        written[implementation] = logits
    errors = [error(a, b) for a, b in zip(written[attention.NAME], written["sdpa"], strict=True)]
    report(f"model {name}", error=max(errors), steps=len(errors))


def report(case, **values):
    print(json.dumps({"case": case, **values}), flush=True)


with torch.inference_mode():
    for dtype in (torch.float32, torch.float16):
        kernel(3, 4, 4, 16, 200, dtype)
        kernel(2, 6, 2, 64, 130, dtype)
        kernel(1, 2, 2, 40, 64, dtype)
        kernel(2, 4, 1, 16, 200, dtype, window=50)
    model("llama", transformers.LlamaConfig)
    model("gemma3", transformers.Gemma3TextConfig, layer_types=["sliding_attention", "full_attention"],
          sliding_window=8, head_dim=16)  # fmt: skip
