"""What TRL hands to vLLM of a model with FuRA: the merged weights, by a plain model's names, and then the base again.

vLLM itself is not needed for that, and no test here has run it.
"""

import torch
from accelerate import Accelerator
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from fura_vlm import FuraConfig


def test_weights_are_those_of_the_merged_model(small_model):
    plain = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in plain.named_parameters()}
    model = get_peft_model(plain, FuraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    sender = object.__new__(VLLMGeneration)  # without vLLM
    sender.model, sender._dist = model, DistributedBackend(Accelerator(cpu=True))
    sent = {name: weight.clone() for name, weight in sender._iter_named_params()}
    assert sent.keys() == before.keys()
    again = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    for name, weight in before.items():
        adapted = name.replace(".weight", ".base_layer.weight")
        assert torch.equal(again.get(adapted, again.get(name)), weight)  # bit for bit: nothing drifts from step to step
    merged = dict(model.merge_and_unload().named_parameters())
    assert all(torch.equal(sent[name], merged[name]) for name in sent)
    changed = {name for name in sent if not torch.equal(sent[name], before[name])}
    assert len(changed) == 2 * 7
