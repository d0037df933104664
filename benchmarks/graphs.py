"""Is a recorded step right, how fast is it, and where does its time go? On a Llama-7B's shapes with random weights.

    python benchmarks/graphs.py [--seconds 100]

One GPU, under 100 seconds; prints each line as it comes, and ends with ``end``. What would begin after ``--seconds`` is
left out, and said so. In this order:

a. the attention kernel alone against ``scaled_dot_product_attention`` in float64, beside torch's own in the same dtype;
b. a whole step of decoders of 2, 8 and 32 layers: the model's own against the kernel without a graph, that against the
   graph, and as the yardstick the model's own with one row against the same with more;
c. milliseconds and tokens per second of the graph alone, of its attention alone, and of the chat's engine, of the limit
   that the memory's bandwidth sets, without and with a FuRA adapter; and the kernels that take the most of a step.

``--tiny`` runs the same on small shapes in Triton's interpreter, to try the script without a GPU; its times say
nothing.
"""

import argparse
import os
import sys
import time

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import peft
import torch
import transformers
from peft import get_peft_model
from shapes import reads_per_second
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from fura_vlm import FuraConfig
from fura_vlm.chat.engine import Engine
from fura_vlm.chat.partner import Sampling
from fura_vlm.decoding.attention import attend, attending, moved, watching
from fura_vlm.decoding.graphs import MARGIN, ROUNDING, check, record, repeat
from fura_vlm.decoding.rows import Decoder, Rows
from fura_vlm.errors import first_line
from fura_vlm.families.text import Language

STARTED = time.monotonic()

parser = argparse.ArgumentParser(description="CUDA graphs of a decoder's step: right, and how fast?")
parser.add_argument("--seconds", type=float, default=100, help="nothing begins after these")
parser.add_argument("--tokens", type=int, default=128, help="of an answer of the engine")
parser.add_argument("--tiny", action="store_true", help="small shapes in Triton's interpreter")
options = parser.parse_args()
device = "cpu" if options.tiny else "cuda"
half = torch.float16 if options.tiny else torch.bfloat16  # the interpreter has no bfloat16 products
PROMPT = 21 if options.tiny else 641
LENGTHS = (PROMPT, 30, 5) if options.tiny else (PROMPT, 64, 300)  # three rows are rounded up to four
REPEATS = 1 if options.tiny else 50


def say(text: str) -> None:
    print(f"{time.monotonic() - STARTED:6.1f} s  {text}", flush=True)


def part(title: str, run, *arguments) -> None:
    """Runs one part; one that fails is no reason to leave out the others."""
    if time.monotonic() - STARTED > options.seconds:
        say(f"{title}: left out, the time is over")
        return
    try:
        run(title, *arguments)
    except Exception as error:
        say(f"{title}: FAILED, {type(error).__name__}: {first_line(error)}")
    if device == "cuda":
        torch.cuda.empty_cache()


def differ(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative difference of a row."""
    found, expected = (states.flatten(1).double() for states in (found[: len(expected)], expected))
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


def milliseconds(run, repeats: int = REPEATS) -> float:
    """Of one of many runs."""
    run()
    if device == "cpu":
        started = time.monotonic()
        for _ in range(repeats):
            run()
        return 1000 * (time.monotonic() - started) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def recorded(run):
    """What runs it again, and its results."""
    return repeat(run, None) if device == "cpu" else record(run, torch.cuda.graph_pool_handle())


# ------------------------------------------------------------------------------------------------- a. attention alone


def kernel(title: str, dtype: torch.dtype, kv_heads: int, window: int | None) -> None:
    lengths = (1, 15, 63, 64, 130) if options.tiny else (1, 63, 64, 641, 2000)
    heads, size, columns = (4, 16, 192) if options.tiny else (32, 128, 2048)
    torch.manual_seed(0)
    rows = len(lengths)
    query = torch.randn(rows, heads, 1, size, device=device).to(dtype)
    key, value = (torch.randn(rows, kv_heads, columns, size, device=device).to(dtype) for _ in range(2))
    places = torch.tensor(lengths, device=device) - 1
    column = torch.arange(columns, device=device)
    seen = column <= places[:, None]
    if window is not None:
        seen &= column > places[:, None] - window
    # What is not seen is rubbish for the kernel, and zero for torch's own, whose mask does not take away NaN.
    hidden = (column > places[:, None])[:, None, :, None]
    key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)

    def own(dtype):
        states = (states.to(dtype) for states in (query, key, value))
        found = scaled_dot_product_attention(*states, attn_mask=seen[:, None, None], enable_gqa=kv_heads != heads)
        return found.transpose(1, 2)

    rubbish = key.masked_fill(hidden, float("nan")), value.masked_fill(hidden, float("inf"))
    found, exact = attend(query, *rubbish, places, size**-0.5, window), own(torch.float64)
    allowed = 1e-5 if dtype == torch.float32 else MARGIN * ROUNDING[dtype]
    for row, length in enumerate(lengths):
        ours, theirs = (differ(states[row : row + 1], exact[row : row + 1]) for states in (found, own(dtype)))
        verdict = "ok" if ours <= allowed else "WRONG"
        say(f"{title}, length {length:4}: kernel {ours:.1e}, torch's own {theirs:.1e}  {verdict}")


# ------------------------------------------------------------------------------------------------------ b. whole steps


def make(layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """Random weights as transformers makes them, those that write to the residual stream divided by sqrt(2 layers)."""
    shapes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 320}
    config = LlamaConfig(num_hidden_layers=layers, **(shapes if options.tiny else {}))
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data /= (2 * layers) ** 0.5
    for settings in (model.generation_config, model.config):
        settings.eos_token_id = None  # none ends an answer
    return model


def read(model, length: int) -> tuple[DynamicCache, torch.Tensor]:
    ids, cache = torch.randint(3, 300, (1, length), device=device), DynamicCache()
    return cache, model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)


def filled(model, lengths) -> tuple[Rows, list]:
    """Rows of these lengths, and what they were made of."""
    rows, prompts = Rows(Decoder(model, Language(None, model.config), graphs=True)), []
    for number, length in enumerate(lengths):
        prompts.append(read(model, length))
        rows.add(number, *prompts[-1], 0)
    return rows, prompts


def own_step(rows: Rows) -> list[torch.Tensor]:
    with watching() as seen:
        logits = rows._plain()
    return [*seen, logits]


def kernel_step(rows: Rows, size: int):
    """The step as it is recorded, for that many rows."""
    cache, tokens = rows._cache, rows.last.new_zeros(size)
    tokens[: len(rows.rows)] = rows.last

    def run() -> list[torch.Tensor]:
        cache.width = cache.columns
        try:
            with attending(cache.places[:size]), watching() as seen:
                logits = rows._decoder(tokens, cache.places[:size] + 0, cache)
            return [*seen, logits]
        finally:
            cache.width = None

    return run


def step(title: str, layers: int, dtype: torch.dtype) -> None:
    compare(title, make(layers, dtype))


def compare(title: str, model) -> None:
    rows, prompts = filled(model, LENGTHS)
    dtype = rows._decoder.dtype
    own = own_step(rows)
    with moved(ROUNDING[dtype], rows.last.device):
        near = own_step(rows)
    run = kernel_step(rows, 4)
    alone, (replay, graph) = run(), recorded(run)
    replay()
    first = Rows(rows._decoder)
    first.add(0, *prompts[0], 0)
    single = own_step(first)[-1]
    logits = own[-1]
    agree = (graph[-1][: len(logits)].argmax(-1) == logits.argmax(-1)).sum().item()
    exact = "exactly" if torch.equal(graph[-1][: len(logits)], alone[-1][: len(logits)]) else "not exactly"
    say(
        f"{title}: logits, model's own to kernel {differ(alone[-1], logits):.1e}; kernel to graph "
        f"{differ(graph[-1], alone[-1][: len(logits)]):.1e} ({exact} the same); yardsticks: own in 3 rows to 1 row "
        f"{differ(logits[:1], single):.1e}, own with a rounding more in attention {differ(near[-1], logits):.1e}; "
        f"the same best token in {agree} of {len(logits)} rows"
    )
    say(f"{title}: attention of layer 1, own to graph {differ(graph[0], own[0]):.1e}, "
        f"of the last {differ(graph[-2], own[-2]):.1e}")  # fmt: skip
    try:
        say(f"{title}: the program's check: ok, at most {check(graph, own, near):.2f} of what rounding explains")
    except RuntimeError as error:
        say(f"{title}: the program's check: REFUSED, {error}")


# ------------------------------------------------------------------------------------------------------------ c. rates


def most(model) -> float | None:
    """Steps per second if reading the decoder's weights and the head once took all of the time; adapters, of which an
    answer reads 2 % more, are no part of it."""
    read = [p for name, p in model.named_parameters() if "embed_tokens" not in name and "fura" not in name]
    return reads_per_second(read)


def share(steps: float, model) -> str:
    limit = most(model)
    return f"{steps / limit:.0%} of the limit of {limit:.0f}" if limit else "no limit known for this device"


@torch.inference_mode()
def alone(title: str, model, count: int, profiled: bool) -> None:
    rows, _ = filled(model, [PROMPT] * count)
    own = milliseconds(rows._plain, min(10, REPEATS))
    replay, _ = recorded(kernel_step(rows, count))
    each = milliseconds(replay)
    say(f"{title}: the graph alone {each:.2f} ms a step, {1000 * count / each:.0f} tokens/s, "
        f"{share(1000 / each, model)}; launched one by one {own:.1f} ms")  # fmt: skip
    cache, config = rows._cache, model.config
    size = config.hidden_size // config.num_attention_heads
    query = torch.randn(count, config.num_attention_heads, 1, size, device=device).to(rows._decoder.dtype)

    def attention() -> list[torch.Tensor]:
        return [attend(query, layer.keys[:count], layer.values[:count], cache.places[:count], size**-0.5)
                for layer in cache.layers]  # fmt: skip

    took = milliseconds(recorded(attention)[0])
    taken = sum(2 * sum(cache.lengths) * layer.keys.shape[1] * size * layer.keys.element_size()
                for layer in cache.layers)  # fmt: skip
    say(f"{title}: its attention alone {took:.3f} ms, {took / each:.0%} of the step; {taken / 2**20:.0f} MiB read, "
        f"{taken / took / 1e6:.0f} GB/s")  # fmt: skip
    if profiled:
        kernels_of(title, replay)


def kernels_of(title: str, replay) -> None:
    """The GPU's time of one replay by kernel, from torch.profiler."""
    if device == "cpu":
        say(f"{title}: no kernels to profile on a CPU")
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        replay()
        torch.cuda.synchronize()
    found = [(event.self_device_time_total, event.count, event.key) for event in profiler.key_averages()]
    found = sorted((row for row in found if row[0] > 0), reverse=True)
    total = sum(row[0] for row in found) or 1
    say(f"{title}: {sum(row[1] for row in found)} kernels, {total / 1000:.2f} ms in them; those that take the most:")
    for took, count, name in found[:12]:
        say(f"    {took / 1000:7.3f} ms {took / total:5.1%} {count:5} x {name[:90]}")


def engine(title: str, model, adapter: str | None, count: int) -> None:
    base = model.get_base_model()
    writer = Engine(model, Language(None, base.config), max_rows=count, graphs=True)
    length = 3 if options.tiny else options.tokens
    ids = torch.randint(3, 300, (1, PROMPT))

    def chat(length: int):
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answers = [writer.submit(asked, adapter, Sampling(max_new_tokens=length)) for _ in range(count)]
        while not all(answer.done for answer in answers):
            time.sleep(0.01)
        failed = next((answer.error for answer in answers if answer.error), None)
        if failed:
            raise RuntimeError(failed)
        seconds = max(answer.ended for answer in answers) - max(answer.began for answer in answers)
        return count * (length - 1) / seconds, answers[0].began - answers[0].asked

    try:
        chat(count + (1 if options.tiny else 4))  # to record: newcomers come one after the other
        rate, first = chat(length)
        kept = list(writer._kept.values()) + list(writer._batches.values())
        used = any(rows._graphs is not None and not rows._graphs.failed and rows._graphs.sizes for rows in kept)
        say(f"{title}: the engine {rate:.0f} tokens/s after the first, {share(rate / count, base)}, first token after "
            f"{1000 * first:.0f} ms; {'with' if used else 'WITHOUT'} graphs")  # fmt: skip
    finally:
        writer.close()


# ---------------------------------------------------------------------------------------------------------------------

name = "Triton's interpreter" if options.tiny else torch.cuda.get_device_name()
say(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}")
heads, many = (4, 2) if options.tiny else (32, 8)
with torch.inference_mode():
    for dtype in (torch.float32, half):
        label = str(dtype).removeprefix("torch.")
        for kv_heads, window in ((heads, None), (heads // 4, None), (heads // 4, 50)):
            form = f"a. {label}, {heads} heads on {kv_heads}" + (f", window {window}" if window else "")
            part(form, kernel, dtype, kv_heads, window)
    few = (1, 2) if options.tiny else (2, 8)
    for layers, dtype in ((few[0], torch.float32), (few[1], torch.float32), (few[0], half), (few[1], half)):
        part(f"b. {layers} layers, {str(dtype).removeprefix('torch.')}", step, layers, dtype)
model = make(2 if options.tiny else 32, half)
layers = model.config.num_hidden_layers
with torch.inference_mode():
    part(f"b. {layers} layers, {str(half).removeprefix('torch.')}", compare, model)
part("c. base, 1 row", alone, model, 1, True)
part(f"c. base, {many} rows", alone, model, many, False)
fura = FuraConfig(target_modules=r".*_proj", init_weights=False, task_type="CAUSAL_LM")
say("making a FuRA adapter")
adapted = get_peft_model(model, fura).eval()
say("made")
with torch.inference_mode():
    part(f"b. {layers} layers with an adapter, {str(half).removeprefix('torch.')}", compare, model)
part("c. adapter, 1 row", alone, model, 1, True)
part(f"c. adapter, {many} rows", alone, model, many, False)
for adapter in ("default", None):
    for count in (1, many):
        label = f"c. {'adapter' if adapter else 'base'}, {count} row{'s' if count > 1 else ''}"
        part(label, engine, adapted, adapter, count)
say("end")
sys.stdout.flush()
