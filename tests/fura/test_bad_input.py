"""What FuRA refuses: one sentence with the module's name, and the model left as it was."""

import pytest
import torch
from fura_models import LANGUAGE, inputs_for, perturb, tiny_llama, tiny_llava
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fura_vlm.fura import FuraConfig, FuraError, FuraLinear, export_delta


def fura_layers(model):
    return [module for module in model.modules() if isinstance(module, FuraLinear)]


def refused(model, match, error=FuraError, **config):
    """Adding the adapter raises one sentence, and leaves no trace in the model."""
    names = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(error, match=match) as caught:
        get_peft_model(model, FuraConfig(**config))
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == names


def test_target_that_matches_nothing():
    refused(tiny_llama(), "q_porj", ValueError, target_modules=["q_porj"])


def test_an_entry_that_matches_nothing_is_named(caplog):
    with caplog.at_level("WARNING", logger="fura_vlm"):
        targets = ["q_proj", "v_porj", "layers.0.self_attn.k_proj"]
        get_peft_model(tiny_llama(), FuraConfig(target_modules=targets, block_size_pattern={r"0\..*k_proj": 6, "k": 8}))
    assert caplog.messages == [
        "FuRA: 'v_porj' in target_modules matches no module.",
        "FuRA: 'k' in block_size_pattern matches no adapted module.",
    ]


TOWER = r"^model\.vision_tower\..*exclude_modules=r'\.\*vision_tower\.\*'"


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], r".*\.q_proj", r"(?!vision_tower).*\.q_proj", "all-linear", None]
)
def test_vision_tower_is_not_adapted_unasked(targets):
    refused(tiny_llava(), TOWER, target_modules=targets)


def test_vision_tower_left_out_or_asked_for():
    def adapted(**config):
        return {layer.module_name for layer in fura_layers(get_peft_model(tiny_llava(), FuraConfig(**config)))}

    way_out = adapted(target_modules=["q_proj", "v_proj"], exclude_modules=r".*vision_tower.*")
    assert len(way_out) == 4 and all("language_model" in name for name in way_out)
    linear = adapted(target_modules="all-linear", exclude_modules=r".*vision_tower.*")
    assert len(linear) == 14 + 2 and "model.multi_modal_projector.linear_1" in linear
    assert len(adapted(target_modules=LANGUAGE)) == 14
    asked = adapted(target_modules=r".*(vision_tower|language_model).*q_proj")
    assert sum("vision_tower" in name for name in asked) == 2 and len(asked) == 4


def test_an_adapter_of_the_tower_loads_again(tmp_path):
    targets = r".*vision_tower.*(q|v)_proj"
    model = perturb(get_peft_model(tiny_llava(), FuraConfig(target_modules=targets)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path)
    with torch.no_grad():
        inputs = inputs_for(model)
        torch.testing.assert_close(model(**inputs).logits, loaded(**inputs).logits, rtol=0, atol=1e-5)
        assert not torch.equal(model(**inputs).logits, tiny_llava()(**inputs).logits)


def test_a_tower_on_its_own_is_no_intruder():
    tower = tiny_llava().model.vision_tower
    assert len(fura_layers(get_peft_model(tower, FuraConfig(target_modules=["q_proj"])))) == 2


def test_modules_that_are_no_linear():
    llama = tiny_llama()
    refused(llama, r"^model\.embed_tokens: .*Embedding", target_modules=["embed_tokens"])
    refused(llama, r"^model\.layers\.0\.mlp: .*LlamaMLP", target_modules=["mlp"])
    attention = nn.ModuleDict({"mha": nn.MultiheadAttention(16, 2)})
    refused(attention, r"^mha\.out_proj: ", target_modules=["out_proj"])
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))
    refused(normed, r"^0: a parametrization", target_modules=["0"])
    convolution = nn.Sequential(nn.Conv2d(3, 3, 3))
    refused(convolution, r"^0: .*Conv2d", target_modules=["0"])


def test_weight_that_is_not_2d():
    model = nn.ModuleDict({"deep": nn.Linear(16, 16)})
    model["deep"].weight = nn.Parameter(torch.zeros(2, 16, 16))
    refused(model, r"^deep: .*2-D.*\(2, 16, 16\)", target_modules=["deep"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite(value):
    model = tiny_llama()
    model.model.layers[1].self_attn.v_proj.weight.data[3, 4] = value
    refused(model, r"^model\.layers\.1\.self_attn\.v_proj: .*NaN or Inf", target_modules=["q_proj", "v_proj"])
    assert len(fura_layers(get_peft_model(model, FuraConfig(target_modules=["q_proj"])))) == 2


def test_a_second_adapter_that_fails_leaves_the_first():
    model = perturb(get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj"])))
    model.base_model.model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    keys = set(model.state_dict())
    trained = [p.requires_grad_("layers.0" in name) for name, p in model.named_parameters() if "fura_" in name]
    with pytest.raises(ValueError, match="v_proj"):
        model.add_adapter("second", FuraConfig(target_modules=["q_proj", "v_proj"]))
    assert [p.requires_grad for p in trained] == [True, True, False, False]
    assert set(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"] and len(fura_layers(model)) == 2


def test_an_adapter_with_other_blocks_is_not_loaded_into_this_one(tmp_path):
    """As on resuming with a changed configuration."""
    q_proj = dict(target_modules=["q_proj"])
    get_peft_model(tiny_llama(), FuraConfig(**q_proj, num_blocks=2)).save_pretrained(tmp_path / "two")
    get_peft_model(tiny_llama(), FuraConfig(**q_proj, train_singular_values=False)).save_pretrained(tmp_path / "frozen")
    model = get_peft_model(tiny_llama(), FuraConfig(**q_proj))
    first = r"^model\.layers\.0\.self_attn\.q_proj: the saved adapter's "
    with pytest.raises(FuraError, match=first + r"fura_dR is \[2, 24, 24\] .* 'default' \[6, 8, 8\]; .*blocks"):
        model.load_adapter(tmp_path / "two", "default")
    with pytest.raises(FuraError, match=first + r"fura_ds is none .*train_singular_values"):
        model.load_adapter(tmp_path / "frozen", "default")
    state = {key: value for key, value in model.state_dict().items() if ".fura_" in key}
    basis = {key: value for key, value in state.items() if "fura_V" in key}
    with pytest.raises(FuraError, match=first + "fura_dR is none"):
        model.load_state_dict(basis, strict=False)
    model.load_state_dict({key: value for key, value in state.items() if key not in basis}, strict=False)
    model.load_adapter(tmp_path / "two", "beside")
    blocks = {name: adapter.blocks for name, adapter in fura_layers(model)[0].fura_adapters.items()}
    assert blocks == {"default": (6, 8), "beside": (2, 24)}


def test_an_exported_adapter_does_not_take_the_place_of_a_trained_one(tmp_path):
    """Nor the other way round: nothing of it would be loaded."""
    trained = perturb(get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj"])))
    trained.save_pretrained(tmp_path / "trained")
    export_delta(trained, tmp_path / "exported")
    exported = PeftModel.from_pretrained(tiny_llama(), tmp_path / "exported")
    for model, other in ((trained, "exported"), (exported, "trained")):
        with pytest.raises(FuraError, match=r"^model\.layers\.0\.self_attn\.q_proj: .*load .* under another name"):
            model.load_adapter(tmp_path / other, "default")
        model.load_adapter(tmp_path / other, "beside")


def test_an_offloaded_base_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu",
             "model.layers.0": "cpu", "model.layers.1": "disk"}  # fmt: skip
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map=where, offload_folder=tmp_path / "offload")
    refused(base, r"^model\.layers\.1\.self_attn\.q_proj: accelerate keeps", target_modules=["q_proj"])


def test_awkward_dimensions(caplog):
    model = nn.ModuleDict({"odd": nn.Linear(257, 8), "fine": nn.Linear(16, 8)})
    refused(model, r"^odd: .*257.*66,049.*block_size_pattern=\{'odd': 257\}", target_modules=["fine", "odd"])
    allowed = get_peft_model(model, FuraConfig(target_modules=["odd"], block_size_pattern={"odd": 257}))
    assert fura_layers(allowed)[0].fura_adapters["default"].blocks == (1, 257)
    small = nn.ModuleDict({"small": nn.Linear(13, 8), "fine": nn.Linear(16, 8)})
    with caplog.at_level("WARNING", logger="fura_vlm"):
        get_peft_model(small, FuraConfig(target_modules=["small", "fine"], block_size_pattern={"fine": 4}))
    assert caplog.messages == ["FuRA: small (of 1 such) has a prime dimension, 13, and is one single block."]
    refused(nn.ModuleDict({"x": nn.Linear(12, 8)}), "^x: num_blocks=5", target_modules=["x"], num_blocks=5)


def test_tied_weights():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=20,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        refused(model, r"^lm_head: .*tied to model\.embed_tokens.*untie", target_modules=["lm_head"])
    assert len(fura_layers(get_peft_model(model, FuraConfig(target_modules="all-linear")))) == 14
    shared = nn.Linear(16, 16)
    twice = nn.ModuleDict({"first": shared, "second": nn.ModuleDict({"again": shared})})
    refused(twice, r"^first: .*tied to second\.again", target_modules=["first"])
    pair = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    pair["b"].weight = pair["a"].weight
    refused(pair, "^b: .*tied to a,", target_modules=["b"])


def test_merging_twice_and_unmerging_nothing():
    model = perturb(get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj"])))
    with pytest.warns(UserWarning, match=r"^model\.layers\.0\.self_attn\.q_proj: no adapter is merged"):
        model.unmerge_adapter()
    model.merge_adapter()
    once = [layer.base_layer.weight.clone() for layer in fura_layers(model)]
    with pytest.warns(UserWarning, match=r"^model\.layers\.0\.self_attn\.q_proj: default is merged already") as seen:
        model.merge_adapter()
    assert len(seen) == 1
    twice = [layer.base_layer.weight for layer in fura_layers(model)]
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    with pytest.raises(ValueError, match="unmerge"):
        model.delete_adapter("default")


def test_merging_an_adapter_that_is_not_there():
    model = get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj"]))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(FuraError, match="there is no adapter nobody, only default"):
            merge(adapter_names=["nobody"])
    assert len(fura_layers(model)) == 2


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_of_a_broken_adapter(how):
    model = perturb(get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj", "v_proj"])))
    broken = fura_layers(model)[2]
    weights = [layer.base_layer.weight.clone() for layer in fura_layers(model)]
    broken.fura_dR["default"].data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.self_attn\.q_proj: merging default gives NaN"):
        getattr(model, how)(safe_merge=True)
    layers = fura_layers(model)
    assert len(layers) == 4 and not any(layer.merged for layer in layers)
    assert all(torch.equal(layer.base_layer.weight, w) for layer, w in zip(layers, weights, strict=True))


def test_what_fails_leaves_merged_what_was_merged():
    model = perturb(get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj"])))
    model.add_adapter("broken", FuraConfig(target_modules=["q_proj"]))
    fura_layers(model)[1].fura_dR["broken"].data.fill_(float("nan"))
    model.merge_adapter(["default"])
    weights = [layer.base_layer.weight.clone() for layer in fura_layers(model)]

    def as_it_was():
        layers = fura_layers(model)
        return all(layer.merged_adapters == ["default"] for layer in layers) and all(
            torch.equal(layer.base_layer.weight, w) for layer, w in zip(layers, weights, strict=True)
        )

    with pytest.raises(FuraError, match="gives NaN"):
        model.merge_adapter(["broken"], safe_merge=True)
    assert as_it_was()
    with pytest.raises(ValueError, match="q_porj"):
        model.add_adapter("third", FuraConfig(target_modules=["q_porj"]))
    assert as_it_was()
    model.unmerge_adapter()
    base = [layer.self_attn.q_proj.weight for layer in tiny_llama().model.layers]
    assert all(torch.equal(layer.base_layer.weight, w) for layer, w in zip(fura_layers(model), base, strict=True))


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_looks_at_what_is_written(how):
    """A number that float16 cannot hold becomes Inf only when the merged weight is rounded to it."""
    base = tiny_llama(torch.float16)
    base.model.layers[1].self_attn.q_proj.weight.data.mul_(1e5)
    model = perturb(get_peft_model(base, FuraConfig(target_modules=["q_proj"])), scale=3)
    with pytest.raises(FuraError, match=r"^model\.layers\.1\.self_attn\.q_proj: merging default .* in float16; "):
        getattr(model, how)(safe_merge=True)
    assert not any(layer.merged for layer in fura_layers(model))
