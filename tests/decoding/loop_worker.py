"""Runs ``generate`` with the loop of CUDA graphs in Triton's interpreter, which must be chosen before Triton is
imported, beside ``generate`` as it is; prints what it found as JSON, one object a line. Instead of a graph's being
replayed, the step is run again. With real graphs, on a GPU: python tests/decoding/loop_worker.py FOLDER cuda
"""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = str(int(sys.argv[2:] != ["cuda"]))

import torch
from family_models import BUILDERS
from family_talk import PICTURES
from peft import LoraConfig, get_peft_model
from transformers import FalconConfig, FalconForCausalLM

from fura_vlm import FuraConfig
from fura_vlm.decoding.loop import Loop, stay
from fura_vlm.families.messages import Message, Picture, Text
from fura_vlm.families.text import Language
from fura_vlm.modelling.load import load_base, load_family

torch.set_num_threads(1)
FOLDER, DEVICE = Path(sys.argv[1]), "cuda" if sys.argv[2:] == ["cuda"] else "cpu"
QUESTIONS = ["What is this?", "How many are there in the picture? Describe it please.", "Is it red?"]
GREEDY = {"do_sample": False, "max_new_tokens": 5}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 5}


def asked(family, numbers, text):
    content = (*[Picture("")] * len(numbers), Text(text))
    return family.inputs([Message("user", content)], [PICTURES[number] for number in numbers])


def write(model, family, inputs, seed=0, **arguments):
    batch = {name: value.to(DEVICE) for name, value in family.batch(inputs).items()}
    torch.manual_seed(seed)
    ids = model.generate(**batch, pad_token_id=family.tokenizer.pad_token_id, **arguments)
    return ids[:, batch["input_ids"].shape[1] :].tolist()


def both(case, model, family, loop, inputs, **arguments):
    """The same with and without the loop; and whether the loop's graphs are those of the call before."""
    before = dict(loop._rows._graphs._graphs) if loop._rows._graphs else {}
    found = write(model, family, inputs, custom_generate=loop, **arguments)
    expected = write(model, family, inputs, **arguments)
    rows = loop._rows
    print(json.dumps({"case": case, "same": found == expected, "different": len({tuple(row) for row in expected}),
                      "answers": expected, "failed": rows.failed, "graphs": rows._graphs.sizes if rows._graphs else [],
                      "lengths": sorted({sum(token != family.tokenizer.pad_token_id for token in row)
                                         for row in expected})}), flush=True)  # fmt: skip
    kept = bool(before) and loop._rows._graphs._graphs == before
    print(json.dumps({"case": f"{case}, graphs", "kept": kept}), flush=True)


def load(name):
    folder = str(FOLDER / name)
    if not Path(folder).exists():
        BUILDERS[name](Path(folder))
    family = load_family(folder)
    model = load_base(folder, torch.float32).eval().to(DEVICE)
    return model, family


@torch.no_grad()
def families():
    """Rows of different lengths, with one, two and no pictures, then fewer rows, then more and longer ones."""
    for name in BUILDERS:
        model, family = load(name)
        loop = Loop(model, family)
        pictures = [(1,), (), (2, 3)] if family.sees else [()] * 3
        inputs = [asked(family, numbers, text) for numbers, text in zip(pictures, QUESTIONS, strict=True)]
        both(f"{name}, greedy", model, family, loop, inputs, **GREEDY)
        both(f"{name}, fewer", model, family, loop, inputs[:1], **GREEDY)
        both(f"{name}, sampled", model, family, loop, [*inputs, inputs[1], inputs[1]], **SAMPLED)


@torch.no_grad()
def ends():
    """Answers that end at different places."""
    model, family = load("text")
    inputs = [asked(family, (), text) for text in QUESTIONS] * 3
    longest = write(model, family, inputs, **SAMPLED | {"max_new_tokens": 20})
    model.generation_config.eos_token_id = [longest[0][3], longest[1][9]]
    loop = Loop(model, family)
    both("ends", model, family, loop, inputs, **SAMPLED | {"max_new_tokens": 20})
    both("ends again", model, family, loop, inputs, **GREEDY | {"max_new_tokens": 20, "repetition_penalty": 1.3})


def adapters():
    """Trained in place between two calls, as by reward; another adapter; none; a model in another place."""
    for name, config in (
        ("fura", FuraConfig(target_modules=r".*_proj", init_weights=False, task_type="CAUSAL_LM")),
        ("lora", LoraConfig(target_modules=r".*_proj", init_lora_weights=False, task_type="CAUSAL_LM")),
    ):
        torch.manual_seed(0)
        plain, family = load("text")
        model = get_peft_model(plain, config)
        loop = Loop(model, family)
        stay(model)
        inputs = [asked(family, (), text) for text in QUESTIONS]
        for step in range(3):
            model.eval()
            with torch.no_grad():
                both(f"{name}, step {step}", model, family, loop, inputs, **GREEDY)
            model.train()
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=30.0)
            batch = {name: value.to(DEVICE) for name, value in family.batch(inputs[:1]).items()}
            model(**batch).logits.float().log_softmax(-1)[0, :, 5].mean().backward()
            with torch.no_grad():
                if step:  # as DeepSpeed writes, without a new version
                    for parameter in (p for p in model.parameters() if p.grad is not None):
                        parameter.data.sub_(parameter.grad.data, alpha=30.0)
                else:
                    optimizer.step()
        model.eval()
        with torch.no_grad():
            both(f"{name}, trained", model, family, loop, inputs, **GREEDY)
            with model.disable_adapter():
                both(f"{name}, base", model, family, loop, inputs, **GREEDY)
            model.add_adapter("other", config)
            model.set_adapter("other")
            model.eval()
            both(f"{name}, other", model, family, loop, inputs, **GREEDY)
            for parameter in plain.parameters():
                parameter.data = parameter.data * 1.1  # as a change of dtype or device leaves it: elsewhere
            both(f"{name}, moved", model, family, loop, inputs, **GREEDY)


@torch.no_grad()
def own_attention():
    """A model that looks at the name of its attention itself, as it may: nothing is recorded."""
    config = FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = FalconForCausalLM(config).eval().to(DEVICE)
    loop = Loop(model, Language(None, config))
    print(json.dumps({"case": "falcon", "able": loop.able, "attention": config._attn_implementation}), flush=True)


families()
ends()
own_attention()
adapters()
