"""What an adapter's tensors are called, in its file, in a model and in a checkpoint: each release reads the others'."""

import pytest
import torch
from fura_models import inputs_for, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fura_vlm.fura import FuraConfig, export_delta

N, b = 6, 8
SHAPES = {"fura_dR": (N, b, b), "fura_ds": (N, b), "fura_V": (N, b, b), "fura_s0": (N, b)}
MODULES = [f"model.layers.{number}.self_attn.o_proj" for number in (0, 1)]


def tensors(module: str) -> dict[str, torch.Tensor]:
    """By the name that a part has in a file; the basis orthonormal, the singular values from large to small."""
    generator = torch.Generator().manual_seed(sum(map(ord, module)))
    made = {part: torch.randn(shape, generator=generator) for part, shape in SHAPES.items()}
    made["fura_V"] = torch.linalg.qr(made["fura_V"])[0].contiguous()
    made["fura_s0"] = made["fura_s0"].abs().add(0.5).sort(descending=True).values
    return {part: value if part in ("fura_V", "fura_s0") else value * 0.3 for part, value in made.items()}


@pytest.fixture
def folder(tmp_path):
    """An adapter of two Linears, written by hand, with a configuration that knows no base."""
    save_file(
        {f"base_model.model.{module}.{part}": value for module in MODULES for part, value in tensors(module).items()},
        tmp_path / "adapter_model.safetensors",
    )
    made = get_peft_model(tiny_llama(), FuraConfig(target_modules=["o_proj"]))
    config = made.peft_config["default"]
    config.inference_mode = True
    config.save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def answer(model):
    return model(**inputs_for(model)).logits


@pytest.fixture
def expected():
    """The same function with dense weights: ``W_j V diag(1 / s0) diag(s0 + ds) (V^T + dR)`` beside what V leaves out,
    which is nothing, since a block here has full rank."""
    model = tiny_llama().double()
    for module in MODULES:
        part = {name: value.double() for name, value in tensors(module).items()}
        V, s0 = part["fura_V"], part["fura_s0"]
        adapted = V @ torch.diag_embed((s0 + part["fura_ds"]) / s0) @ (V.mT + part["fura_dR"])
        weight = model.get_submodule(module).weight.data
        weight.copy_(torch.cat([block @ adapted[j] for j, block in enumerate(weight.split(b, dim=1))], dim=1))
    return answer(model).float()


def close(found, expected):
    assert (expected - answer(tiny_llama())).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["peft", "peft with little memory", "transformers", "a training checkpoint"])
def test_names_of_a_file_and_of_a_model(how, folder, expected):
    model = tiny_llama()
    if how == "transformers":
        model.load_adapter(str(folder), "default")
        start = ""
    elif how == "a training checkpoint":
        model = get_peft_model(model, FuraConfig(target_modules=["o_proj"]))
        start = "base_model.model."
        saved = {f"{start}{name}.{part}.default": value for name in MODULES for part, value in tensors(name).items()}
        assert not model.load_state_dict(saved, strict=False).unexpected_keys
    else:
        model = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=how != "peft")
        start = "base_model.model."
    close(answer(model), expected)
    names = {name for name in model.state_dict() if "fura_" in name}
    assert names == {f"{start}{module}.{part}.default" for module in MODULES for part in SHAPES}
    trained = {name for name, _ in model.named_parameters() if "fura_" in name}
    assert trained == {name for name in names if "fura_dR" in name or "fura_ds" in name}


def test_what_is_loaded_is_saved_under_the_same_names(folder, tmp_path):
    model = PeftModel.from_pretrained(tiny_llama(), folder)
    model.save_pretrained(tmp_path / "again")
    first, again = (load_file(at / "adapter_model.safetensors") for at in (folder, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_names_of_an_exported_adapter(folder, expected, tmp_path):
    export_delta(PeftModel.from_pretrained(tiny_llama(), folder), tmp_path / "delta")
    names = set(load_file(tmp_path / "delta" / "adapter_model.safetensors"))
    assert names == {f"base_model.model.{module}.fura_D" for module in MODULES}
    close(answer(PeftModel.from_pretrained(tiny_llama(), tmp_path / "delta")), expected)
