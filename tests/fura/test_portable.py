"""Fingerprint of the base, export for inference, spectrum report."""

import json

import pytest
import torch
from fura_models import CASES, inputs_for, perturb, tiny_llama, tiny_neox
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from fura_vlm.fura import FuraConfig, FuraLinear, export_delta, plot_spectrum, spectrum_report, spectrum_table


def fura_layers(model):
    return [module for module in model.modules() if isinstance(module, FuraLinear)]


@torch.no_grad()
def logits(model):
    return model(**inputs_for(model)).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def saved(tmp_path, build=tiny_llama, **config):
    model = perturb(get_peft_model(build(), FuraConfig(**{"target_modules": "all-linear", **config})))
    model.save_pretrained(tmp_path)
    return model


def test_fingerprint_names_every_adapted_layer(tmp_path):
    model = saved(tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"]
    assert set(found) == {layer.module_name for layer in fura_layers(model)}
    assert found["model.layers.0.self_attn.k_proj"].startswith("24x48 float ")
    assert len(set(found.values())) == 14


@pytest.mark.parametrize("entry", [(0, 0), (47, 47), (20, 31)])
def test_another_base_is_refused_and_the_first_difference_named(tmp_path, entry):
    """Also a base that differs in half of two layers' entries only, whichever half."""
    saved(tmp_path)
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.1)
        weight = other.model.layers[1].self_attn.o_proj.weight
        weight[entry[0] // 24 * 24 : entry[0] // 24 * 24 + 24] += 0.01
    with pytest.raises(ValueError, match="^model.layers.1.self_attn.o_proj: .* load it over the base"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not fura_layers(other)
    with pytest.raises(ValueError, match="^model.layers.0.self_attn.q_proj: "):
        tiny_llama(seed=1).load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="^model.layers.0.mlp.down_proj: .*this model lacks it"):
        PeftModel.from_pretrained(tiny_neox(), tmp_path)


def test_wrong_shape_is_refused_by_name(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    saved(tmp_path)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99,
    )  # fmt: skip
    torch.manual_seed(0)
    other = LlamaForCausalLM(config)
    for layer, same in zip(other.model.layers, tiny_llama().model.layers, strict=True):
        layer.self_attn = same.self_attn
    with pytest.raises(ValueError, match="^model.layers.0.mlp.gate_proj: .* 96x48, .* 64x48"):
        PeftModel.from_pretrained(other, tmp_path)


def test_the_same_base_in_another_dtype_is_the_same_base(tmp_path):
    model = perturb(get_peft_model(tiny_llama(torch.bfloat16), FuraConfig(target_modules="all-linear")))
    model.save_pretrained(tmp_path)
    wide = PeftModel.from_pretrained(tiny_llama(torch.bfloat16).float(), tmp_path)
    assert (logits(wide) - logits(model).float()).abs().max() < 0.05


def test_a_merged_base_is_another_base(tmp_path):
    merged = saved(tmp_path).merge_and_unload()
    with pytest.raises(ValueError, match="^model.layers.0.self_attn.q_proj"):
        PeftModel.from_pretrained(merged, tmp_path)


def test_loading_beside_a_merged_adapter_unmerges_it_first(tmp_path):
    model = saved(tmp_path)
    expected = logits(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="is unmerged before"):
        model.load_adapter(tmp_path, "again")
    assert not any(layer.merged for layer in fura_layers(model))
    assert torch.equal(logits(model), expected)
    model.set_adapter("again")
    close(logits(model), expected)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_export(case, side, low_cpu_mem_usage, tmp_path):
    """D alone: the same outputs, about half the size, merges, cannot be trained."""
    build, targets = case
    model = perturb(get_peft_model(build(), FuraConfig(target_modules=targets, train_side=side)))
    expected = logits(model)
    model.save_pretrained(tmp_path / "full")
    assert export_delta(model, tmp_path / "delta") == tmp_path / "delta"
    assert torch.equal(logits(model), expected) and not model.peft_config["default"].delta_only

    full, delta = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("full", "delta"))
    assert all(key.endswith(".fura_D") for key in delta)
    ratio = sum(t.numel() for t in delta.values()) / sum(t.numel() for t in full.values())
    assert 0.4 < ratio < 0.55
    small, large = ((tmp_path / kind / "adapter_model.safetensors").stat().st_size for kind in ("delta", "full"))
    assert small < 0.6 * large

    loaded = PeftModel.from_pretrained(build(), tmp_path / "delta", low_cpu_mem_usage=low_cpu_mem_usage)
    close(logits(loaded), expected)
    assert loaded.get_model_status().available_adapters == ["default"]
    assert not any("fura" in name for name, _ in loaded.named_parameters())
    other = build()
    other.load_adapter(str(tmp_path / "delta"))
    close(logits(other), expected)
    close(logits(loaded.merge_and_unload()), expected)
    with pytest.raises(ValueError, match="cannot be trained"):
        PeftModel.from_pretrained(build(), tmp_path / "delta", is_trainable=True)


def test_export_of_a_named_adapter_in_bfloat16_with_a_saved_module(tmp_path):
    model = get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj"]))
    config = FuraConfig(target_modules=["v_proj"], modules_to_save=["lm_head"], init_weights=False)
    model.add_adapter("other", config)
    model.set_adapter("other")
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["other"].weight.add_(0.1)
    expected = logits(model)
    folder = export_delta(model, tmp_path, "other", dtype=torch.bfloat16)
    assert folder == tmp_path / "other"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {t.dtype for key, t in tensors.items() if "fura_D" in key} == {torch.bfloat16}
    loaded = PeftModel.from_pretrained(tiny_llama(), folder)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0.01)
    assert (logits(loaded) - logits(tiny_llama())).abs().max() > 0.05
    with pytest.raises(ValueError, match="no adapter 'nobody'"):
        export_delta(model, tmp_path, "nobody")


def test_spectrum_report(tmp_path):
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[:, 8:16] = 0.0
        base.model.layers[0].self_attn.q_proj.weight[:, 16] *= 1e-9
    model = get_peft_model(base, FuraConfig(target_modules=CASES["llama"][1], train_side="input"))
    model.add_adapter("rows", FuraConfig(target_modules=["down_proj"], train_side="output", singular_floor=0.7))
    report = spectrum_report(model)
    assert [entry.module for entry in report] == [layer.module_name for layer in fura_layers(model)]
    for entry in report:
        weight = base.get_submodule(entry.module).base_layer.weight.double()
        svd = torch.stack([torch.linalg.svdvals(block) for block in weight.split(entry.block_size, dim=1)])
        torch.testing.assert_close(entry.values, svd, rtol=1e-6, atol=1e-7)
    first = report[0]
    assert first.guarded == 9 and sum(entry.guarded for entry in report[1:]) == 0
    assert first.condition[2] > 1e7 and torch.isinf(first.condition[1])
    assert torch.equal(first.condition[0], first.values[0, 0] / first.values[0, -1])
    rows = spectrum_report(model, "rows")
    assert len(rows) == 2 and rows[0].side == "output"
    s = torch.stack([torch.linalg.svdvals(b) for b in base.model.layers[0].mlp.down_proj.weight.double().split(8)])
    torch.testing.assert_close(rows[0].values, s, rtol=1e-6, atol=1e-7)
    assert rows[0].guarded == int((s < 0.7 * s[:, :1]).sum()) > 0

    table = spectrum_table(report).splitlines()
    assert len(table) == 2 + 14 + 1
    assert table[-1].startswith("| all 14 |") and table[-1].endswith("| 9 of 768 |")
    assert table[2].startswith("| model.layers.0.self_attn.q_proj | 6 x 8 |") and "| 9 of 48 |" in table[2]
    plot_spectrum(report, tmp_path / "spectrum.png")
    from PIL import Image

    picture = Image.open(tmp_path / "spectrum.png").convert("RGB")
    assert picture.width > 1000 and len(picture.getcolors(1 << 20)) > 20
    with pytest.raises(ValueError, match="no FuRA adapter 'x'"):
        spectrum_report(model, "x")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        spectrum_report(model)


def test_spectrum_of_layers_without_one(tmp_path):
    """A weight of zeros, as projections begin in some models, and one of rank 1."""
    base = tiny_llama()
    for layer, columns in zip(base.model.layers, (0, 1), strict=True):
        layer.self_attn.q_proj.weight.data.zero_()[:, :columns] = 1.0
    report = spectrum_report(get_peft_model(base, FuraConfig(target_modules=["q_proj"])))
    assert all(torch.isinf(entry.condition).all() for entry in report)
    assert [entry.guarded for entry in report] == [48, 47]
    plot_spectrum(report, tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").stat().st_size > 10_000
