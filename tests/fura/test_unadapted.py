"""Weights that no adapter can be put on, and GPT-2's, which are Linears in another order."""

import copy
import logging

import pytest
import torch
from fura_models import inputs_for, perturb, tiny_gpt2, tiny_llama
from fura_reference import ExplicitFura
from peft import convert_to_lora, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from fura_vlm.fura import FuraConfig, FuraError

MOE = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=32, num_experts_per_tok=2,
)  # fmt: skip


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=4))


def qwen():
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=8, head_dim=8))


def said(caplog, model, **config):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fura_vlm"):
        get_peft_model(model, FuraConfig(**config))
    return [record.message for record in caplog.records if "experts" in record.message]


@pytest.mark.parametrize("build", [mixtral, qwen])
def test_experts_of_three_dimensions_are_told_once(build, caplog):
    for targets in ("all-linear", None, r".*(q_proj|down_proj)"):
        messages = said(caplog, build(), target_modules=targets)
        assert len(messages) == 1, targets
        assert messages[0].startswith("FuRA: model.layers.0.mlp.experts.") and "stays as it is" in messages[0]
        assert "(of 4 such)" in messages[0] or targets == r".*(q_proj|down_proj)"
    # who names other modules alone, leaves them out, or trains them in full, has not missed them
    assert said(caplog, build(), target_modules=["q_proj"]) == []
    assert said(caplog, build(), target_modules="all-linear", exclude_modules=r".*experts.*") == []
    assert said(caplog, build(), target_modules="all-linear", modules_to_save=["experts"]) == []


def test_dense_models_are_not_told_of_experts(caplog):
    assert said(caplog, tiny_llama(), target_modules="all-linear") == []
    convolutional = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(16, 16))
    assert said(caplog, convolutional, target_modules="all-linear") == []


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_conv1d_trains_as_the_linear_that_it_is(side):
    """The explicit factorisation of the transposed weight: 25 steps, to 1e-11 in float64; and the merged weight."""
    torch.manual_seed(0)
    base = Conv1D(48, 24).double()
    nn.init.normal_(base.bias)
    model = get_peft_model(nn.ModuleDict({"lin": base}), FuraConfig(target_modules=["lin"], train_side=side))
    layer = model.base_model.model["lin"]
    before = base.weight.detach().clone()
    reference = ExplicitFura(before.T, base.bias.detach(), layer.fura_adapters["default"].blocks[0], side)
    layer.fura_V["default"] = reference.R_start.mT.contiguous()
    layer.fura_s0["default"] = reference.s_start.clone()
    optimizers = [
        torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2) for module in (model, reference)
    ]
    x, target = torch.randn(50, 24).double(), torch.randn(50, 48).double()
    for _ in range(25):
        for optimizer, module in zip(optimizers, (layer, reference), strict=True):
            optimizer.zero_grad()
            (module(x) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer(x), reference(x), rtol=0, atol=1e-11)
    change = layer.get_delta_weight("default")
    assert change.abs().max() > 1e-2
    torch.testing.assert_close(before + change, reference.weight().data.T, rtol=0, atol=1e-11)
    expected = layer(x).detach()
    merged = copy.deepcopy(model).merge_and_unload()["lin"]
    assert type(merged) is Conv1D and merged.weight.is_contiguous()
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-12)


def test_a_conv1d_converts_to_lora():
    model = perturb(get_peft_model(tiny_gpt2(), FuraConfig(target_modules=["c_attn", "c_fc"])))
    with torch.no_grad():
        expected = model(**inputs_for(model)).logits
        config, state = convert_to_lora(model, 32)  # the full rank
        lora = get_peft_model(tiny_gpt2(), config)
        set_peft_model_state_dict(lora, state)
        torch.testing.assert_close(lora.eval()(**inputs_for(model)).logits, expected, rtol=0, atol=1e-3)


def test_all_linear_adapts_every_conv1d_of_a_gpt2():
    model = get_peft_model(tiny_gpt2(), FuraConfig())
    assert len(model.targeted_module_names) == 2 * 4


def test_a_weighted_mixture_is_refused_with_a_way_that_exists():
    model = perturb(get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj"])))
    model.add_adapter("second", FuraConfig(target_modules=["q_proj"]))
    with pytest.raises(FuraError, match=r"set_adapter\(\['first', 'second'\]\).*merge_adapter"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mixture")
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.merged_adapters == ["default", "second"]
