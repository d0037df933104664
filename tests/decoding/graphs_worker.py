"""Runs whole steps as a graph has them, over the same memory and with the attention kernel, in Triton's interpreter,
which must be chosen before Triton is imported; prints what it found as JSON, one object a line. Instead of a graph's
being replayed, the step is run again."""

import json
import logging
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from family_models import _text
from peft import get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, LlamaConfig

from fura_vlm import FuraConfig
from fura_vlm.chat.engine import Engine
from fura_vlm.chat.partner import Sampling
from fura_vlm.decoding import attention
from fura_vlm.decoding.rows import Decoder, Rows
from fura_vlm.families.text import Language

torch.set_num_threads(1)
WORDS = 97


def make(config_class, dtype=torch.float32, std=0.2, **settings):
    config = config_class(vocab_size=WORDS, **_text(**settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=std)
    for settings in (model.generation_config, model.config):
        settings.eos_token_id = None
    return model.to(dtype)


def read(model, length):
    ids, cache = torch.randint(0, WORDS, (1, length)), DynamicCache()
    token = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)
    return cache, token


def changing(name, config_class, **settings):
    """Rows of very different lengths that come and go, one in the middle replaced, against the model's own steps."""
    model = make(config_class, **settings)
    family = Language(None, model.config)
    graphs, plain = Rows(Decoder(model, family, graphs=True)), Rows(Decoder(model, family))
    torch.manual_seed(1)
    errors, sizes, number = [], set(), 0

    def add(length):
        nonlocal number
        cache, token = read(model, length)
        for rows in (graphs, plain):
            rows.add(number, cache, token, 0)
        number += 1

    def steps(count):
        for _ in range(count):
            expected, found = plain.step(), graphs.step()
            assert graphs.rows == plain.rows
            errors.extend(((found - expected).norm(dim=1) / expected.norm(dim=1)).tolist())
            sizes.update(graphs._graphs.sizes)
            graphs.last = plain.last = expected.argmax(-1)

    for length in (3, 200, 40):  # three rows are rounded up to four
        add(length)
        steps(2)
    for rows in (graphs, plain):
        rows.keep([0, 2])
    steps(2)
    add(70)  # in the slot of the one that has gone
    steps(2)
    for length in (1, 64):
        add(length)
    steps(2)
    for rows in (graphs, plain):
        rows.keep([3])
    steps(2)
    report(f"changing {name}", error=max(errors), steps=len(errors), sizes=sorted(sizes), failed=graphs._graphs.failed)


class Faulty:
    """A decoder that does something wrong where a graph is recorded."""

    records = True

    def __init__(self, decoder, fault):
        self._decoder, self._fault = decoder, fault
        self.text_config, self.dtype = decoder.text_config, decoder.dtype

    def __call__(self, tokens, positions, cache, mask=None):
        places = attention._state.places
        if places is None or self._fault == "none":
            return self._decoder(tokens, positions, cache, mask)
        if self._fault == "positions":
            positions = positions + 1
        elif self._fault == "a row's position":
            positions = positions + (torch.arange(len(positions)) == 1)
        elif self._fault == "tokens":
            tokens = tokens.roll(1)
        elif self._fault == "a key too few":
            places = places - 1
        elif self._fault == "a key too many":
            places = places + 1
        with attention.attending(places):
            return self._decoder(tokens, positions, cache, mask)


class Sentences(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def faults(name, dtype, std, layers):
    model = make(LlamaConfig, dtype, std, num_hidden_layers=layers)
    decoder = Decoder(model, Language(None, model.config), graphs=True)
    for fault in ("none", "positions", "a row's position", "tokens", "a key too few", "a key too many"):
        heard = Sentences()
        logging.getLogger("fura_vlm.decoding.graphs").addHandler(heard)
        torch.manual_seed(2)
        rows = Rows(Faulty(decoder, fault))
        for number, length in enumerate((60, 30, 9)):
            rows.add(number, *read(model, length), 0)
        rows.step()
        logging.getLogger("fura_vlm.decoding.graphs").removeHandler(heard)
        report(f"fault {name}: {fault}", failed=rows._graphs.failed, said=heard.said)


def engine():
    """Two adapters and the base side by side through the chat's engine, against ``generate``."""
    torch.manual_seed(0)
    fura = FuraConfig(target_modules=r".*_proj", init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(make(LlamaConfig), fura).eval()
    model.add_adapter("other", fura)
    for name, parameter in model.named_parameters():
        if "fura_dR" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    asked = [(torch.randint(0, WORDS, (1, length)), adapter) for length, adapter in
             ((5, "default"), (70, "default"), (20, None), (7, "default"), (11, "other"))]  # fmt: skip
    expected = []
    for ids, adapter in asked:
        model.set_adapter(adapter or "default")
        with torch.inference_mode(), model.disable_adapter() if adapter is None else torch.inference_mode():
            written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6,
                                     do_sample=False, pad_token_id=0)  # fmt: skip
        expected.append(written[0, ids.shape[1] :].tolist())
    engine = Engine(model, Language(None, model.config), graphs=True)
    recorded = set()
    for turn in ("first", "second"):  # the second time with the graphs of the first
        answers = [engine.submit({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, adapter,
                                 Sampling(max_new_tokens=6)) for ids, adapter in asked]  # fmt: skip
        while not all(answer.done for answer in answers):
            recorded |= {(key[0], size) for key, rows in list(engine._batches.items()) for size in rows._graphs.sizes}
            engine._thread.join(0.005)
        assert all(answer.error is None for answer in answers), [answer.error for answer in answers]
        report(f"engine, {turn}", same=[answer.tokens == own for answer, own in zip(answers, expected, strict=True)],
               different=len({tuple(own) for own in expected}), recorded=len(recorded))  # fmt: skip
    engine.close()


def report(case, **values):
    print(json.dumps({"case": case, **values}), flush=True)


with torch.inference_mode():
    changing("llama", LlamaConfig)
    changing("gemma3", Gemma3TextConfig, layer_types=["sliding_attention", "full_attention"], sliding_window=8,
             head_dim=16)  # fmt: skip
    faults("float32", torch.float32, 0.2, 2)
    faults("float32, attention that hardly tells keys apart", torch.float32, 0.02, 2)
    faults("float16", torch.float16, 0.2, 2)
    faults("deep", torch.float16, 0.2, 8)
engine()
