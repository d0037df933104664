"""FuRA as PEFT users use an adapter: against a tiny Llama, a tiny LLaVA and a GPT-NeoX."""

import copy
import json

import pytest
import torch
from fura_models import CASES, LANGUAGE, inputs_for, perturb, tiny_llama, tiny_llava, tiny_neox
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from fura_vlm.fura import FuraConfig, FuraLinear


def fura_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FuraLinear)}


@torch.no_grad()
def logits(model, **extra):
    return model(**inputs_for(model), **extra).logits


def adapted(case, seed=0, **config):
    build, targets = case
    return perturb(get_peft_model(build(), FuraConfig(target_modules=targets, **config)), seed)


def close(a, b, atol=1e-5):
    """One function of the same numbers. Not bit for bit: where tensors lie in memory decides, on some CPUs, in
    which order a product is summed, and loaded ones lie elsewhere."""
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_config_round_trip(tmp_path):
    config = FuraConfig(
        target_modules=["a", "b"], exclude_modules=["c"], layers_to_transform=[0, 2], layers_pattern="layers",
        modules_to_save=["head"], bias="fura_only", train_side="output", num_blocks=4,
        block_size_pattern={"a": 8},
        train_singular_values=False, singular_floor=1e-3, basis_dtype="float64", base_fingerprint={"a": "x"},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    for loader in (FuraConfig, PeftConfig):
        loaded = loader.from_pretrained(tmp_path)
        assert isinstance(loaded, FuraConfig)
        assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "FURA"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_side": "left"}, "train_side"),
        ({"bias": "lora_only"}, "bias"),
        ({"num_blocks": 2, "block_size": 2}, "not both"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"block_size": -1}, "block_size"),
        ({"block_size": "8"}, "block_size"),
        ({"block_size_pattern": {"q": 0}}, r"block_size_pattern\['q'\]"),
        ({"block_size_pattern": {"q": 8.0}}, r"block_size_pattern\['q'\]"),
        ({"block_size_pattern": {"*q": 8}}, "not a regular expression"),
        ({"block_size_pattern": ["q"]}, "block_size_pattern"),
        ({"singular_floor": "1e-3"}, "singular_floor"),
        ({"singular_floor": 2.0}, "singular_floor"),
        ({"basis_dtype": "int8"}, "basis_dtype"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ["q"], "layers_pattern": "layers"}, "layers_pattern"),
    ],
)
def test_bad_config(fields, message):
    with pytest.raises(ValueError, match=message):
        FuraConfig(**fields)


def test_registering_twice_is_harmless():
    import importlib

    import peft

    import fura_vlm.fura

    before = len(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    importlib.reload(fura_vlm.fura)
    assert len(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING) == before
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["FURA"] is FuraConfig
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["FURA"] == "fura_"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("side", ["input", "output"])
def test_save_and_load(case, side, low_cpu_mem_usage, tmp_path, monkeypatch):
    """The loaded adapter is the saved one, bit for bit, and nothing is decomposed to get there."""
    model = adapted(case, train_side=side)
    expected = logits(model)
    assert (expected - logits(case[0]())).abs().max() > 1e-3
    model.save_pretrained(tmp_path)

    def decompose(*args):
        raise AssertionError("a basis was computed")

    monkeypatch.setattr("fura_vlm.fura.adapter.decompose", decompose)
    loaded = PeftModel.from_pretrained(case[0](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert all(layer.fura_adapters["default"].is_ready for layer in fura_layers(loaded).values())
    close(logits(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_saved_basis_is_used_not_the_machines_own(case, tmp_path):
    """An adapter whose V was computed elsewhere, with other signs, loads to the same function."""
    model = adapted(case)
    expected = logits(model)
    for layer in fura_layers(model).values():
        layer.fura_V["default"] = -layer.fura_V["default"]
        layer.fura_dR["default"].data = -layer.fura_dR["default"].data
    close(logits(model), expected)
    model.save_pretrained(tmp_path)
    close(logits(PeftModel.from_pretrained(case[0](), tmp_path)), expected)
    other = case[0]()
    other.load_adapter(str(tmp_path))
    close(logits(other), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_into_an_adapter_in_use(low_cpu_mem_usage, tmp_path):
    """What was kept for answering with the former values is forgotten."""
    other = adapted(CASES["llama"], seed=1)
    other.save_pretrained(tmp_path)
    model = adapted(CASES["llama"])
    before = logits(model)
    model.load_adapter(tmp_path, "default", low_cpu_mem_usage=low_cpu_mem_usage)
    close(logits(model), logits(other))
    assert (logits(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["vector_to_parameters", "another parameter", "the basis"])
def test_what_is_written_between_answers_counts(how):
    """What is kept for answering is forgotten however the adapter's tensors are replaced."""
    model = adapted(CASES["llama"]).eval()
    before = logits(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if how == "vector_to_parameters":  # torch's own, by way of .data
        nn.utils.vector_to_parameters(3 * nn.utils.parameters_to_vector(trained).detach(), trained)
    for layer in fura_layers(model).values():
        if how == "another parameter":
            layer.fura_dR["default"] = nn.Parameter(3 * layer.fura_dR["default"].detach())
        elif how == "the basis":
            layer.fura_V["default"].neg_()
    found = logits(model)
    assert (found - before).abs().max() > 1e-3
    assert torch.equal(found, logits(copy.deepcopy(model).eval()))


def test_autocast_leaves_no_trace():
    """Neither an answer under it in later ones, nor a merge under it in the weights."""
    model = adapted(CASES["llama"]).eval()
    expected = logits(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        logits(model)
    assert torch.equal(logits(model), expected)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    with torch.autocast("cpu", torch.bfloat16):
        model.merge_adapter()
    for one, other in zip(fura_layers(model).values(), fura_layers(merged).values(), strict=True):
        assert torch.equal(one.base_layer.weight, other.base_layer.weight)


def test_transforms_of_functions_see_their_own_parameters():
    """torch.func over two sets of an adapter's parameters at once, as for an ensemble."""
    model = adapted(CASES["llama"]).eval()
    ids = inputs_for(model)["input_ids"]
    pairs = {name: torch.stack([p, 2 * p]).detach() for name, p in model.named_parameters() if "fura_" in name}

    def answer(parameters):
        return torch.func.functional_call(model, parameters, (ids,)).logits

    with torch.no_grad():
        both = torch.func.vmap(answer)(pairs)
    for i in (0, 1):
        with torch.no_grad():
            close(both[i], answer({name: pair[i] for name, pair in pairs.items()}))
    close(both[0], logits(model))


def test_a_saved_configuration_starts_a_fresh_adapter_too(case, tmp_path):
    """get_peft_model with a loaded configuration: no weights follow, the basis is computed on use."""
    adapted(case).save_pretrained(tmp_path)
    fresh = get_peft_model(case[0](), FuraConfig.from_pretrained(tmp_path))
    assert torch.equal(logits(fresh), logits(case[0]()))
    again = adapted(case)
    perturb(fresh)
    assert torch.equal(logits(fresh), logits(again))


def test_resuming_is_exact(case, tmp_path):
    """Five steps, save, load, five steps: the parameters of ten steps in one go."""

    def steps(model, optimizer, count):
        inputs = inputs_for(model)
        for _ in range(count):
            optimizer.zero_grad()
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()

    def trained(model):
        return [p for p in model.parameters() if p.requires_grad]

    through = get_peft_model(case[0](), FuraConfig(target_modules=case[1]))
    optimizer = torch.optim.Adam(trained(through), lr=1e-2)
    steps(through, optimizer, 5)
    through.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    steps(through, optimizer, 5)

    resumed = PeftModel.from_pretrained(case[0](), tmp_path, is_trainable=True)
    optimizer = torch.optim.Adam(trained(resumed), lr=1e-2)
    optimizer.load_state_dict(state)
    steps(resumed, optimizer, 5)
    pairs = list(zip(trained(through), trained(resumed), strict=True))
    assert pairs and all(torch.equal(a, b) for a, b in pairs)
    assert max(a.abs().max() for a, _ in pairs) > 1e-2


def test_the_basis_may_be_computed_by_an_evaluation(tmp_path):
    """Under inference_mode, the first use of a fresh adapter; it trains afterwards."""
    adapted(CASES["llama"]).save_pretrained(tmp_path)
    config = FuraConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    fresh = get_peft_model(tiny_llama(), config)
    inputs = inputs_for(fresh)
    with torch.inference_mode():
        fresh(**inputs)
    fresh(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = [p.grad for p in fresh.parameters() if p.requires_grad]
    assert len(grads) == 28 and all(grad.abs().max() > 0 for grad in grads)


def test_one_configuration_for_several_bases():
    """Making an adapter does not tie the caller's configuration to that base."""
    config = FuraConfig(target_modules=["q_proj"])
    first, second = (get_peft_model(tiny_llama(seed=seed), config) for seed in (0, 1))
    assert config.base_fingerprint is None
    found = [model.peft_config["default"].base_fingerprint for model in (first, second)]
    assert found[0].keys() == found[1].keys() and not set(found[0].values()) & set(found[1].values())


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload(case, side, safe_merge):
    model = adapted(case, train_side=side)
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not fura_layers(merged) and type(merged) is type(case[0]())
    close(logits(merged), expected)
    assert merged.state_dict().keys() == case[0]().state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_is_exact(case, dtype):
    model = perturb(get_peft_model(case[0](dtype), FuraConfig(target_modules=case[1])))
    expected = logits(model)
    weights = {n: layer.base_layer.weight.clone() for n, layer in fura_layers(model).items()}
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        assert all(layer.merged_adapters == ["default"] for layer in fura_layers(model).values())
        with pytest.raises(ValueError, match="default is merged into its weight; call unmerge_adapter"):
            next(iter(fura_layers(model).values())).get_delta_weight("default")
        assert any(not torch.equal(layer.base_layer.weight, weights[n]) for n, layer in fura_layers(model).items())
        close(logits(model).float(), expected.float(), 1e-5 if dtype == torch.float32 else 0.05)
        model.unmerge_adapter()
        assert all(torch.equal(layer.base_layer.weight, weights[n]) for n, layer in fura_layers(model).items())
    assert torch.equal(logits(model), expected)


def test_a_copy_of_a_merged_model_is_its_own():
    """Unmerging the copy restores the copy's weights, and leaves the original merged."""
    model = adapted(CASES["llama"])
    expected = logits(model)
    model.merge_adapter()
    merged = logits(model)
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), merged) and not torch.equal(merged, expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def test_a_model_cast_while_merged_unmerges_to_the_cast_base():
    model = adapted(CASES["llama"])
    weights = [layer.base_layer.weight.clone() for layer in fura_layers(model).values()]
    model.merge_adapter()
    model.to(torch.bfloat16).unmerge_adapter()
    for layer, weight in zip(fura_layers(model).values(), weights, strict=True):
        assert torch.equal(layer.base_layer.weight, weight.to(torch.bfloat16))


def test_bfloat16_merge_is_the_rounded_exact_product():
    """One rounding of W (I + D), not several: against float64."""
    model = perturb(get_peft_model(tiny_llama(torch.bfloat16), FuraConfig(target_modules=["q_proj"])))
    layer = next(iter(fura_layers(model).values()))
    W = layer.base_layer.weight.double()
    V, s0, dR, ds = (getattr(layer, "fura_" + n)["default"].double().detach() for n in ("V", "s0", "dR", "ds"))
    exact = torch.cat(
        [
            block @ (torch.eye(8) + V[j] @ torch.diag(1 + ds[j] / s0[j]) @ (V[j].T + dR[j]) - V[j] @ V[j].T)
            for j, block in enumerate(W.split(8, dim=1))
        ],
        dim=1,
    )
    model.merge_adapter()
    wrong = layer.base_layer.weight != exact.to(torch.bfloat16)
    assert wrong.float().mean() < 0.01  # float32 arithmetic may flip a tie now and then


def test_disable_adapter(case):
    model = adapted(case)
    base, expected = logits(case[0]()), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    close(logits(model), expected)
    unloaded = model.unload()
    assert not fura_layers(unloaded) and torch.equal(logits(unloaded), base)


def test_several_adapters(case, tmp_path):
    """Add, switch, save and load, delete; each computes what it computes alone."""
    alone = [logits(adapted(case, seed=1)), logits(adapted(case, seed=2, train_side="output"))]
    model = adapted(case, seed=1)
    model.add_adapter("other", FuraConfig(target_modules=case[1], train_side="output"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".other"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    assert torch.equal(logits(model), alone[0])
    model.set_adapter("other")
    assert torch.equal(logits(model), alone[1])
    assert all(p.requires_grad == n.endswith(".other") for n, p in model.named_parameters() if "fura_" in n)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert (tmp_path / "other" / "adapter_model.safetensors").exists()

    loaded = PeftModel.from_pretrained(case[0](), tmp_path)
    loaded.load_adapter(tmp_path / "other", "second")
    close(logits(loaded), alone[0])
    loaded.set_adapter("second")
    close(logits(loaded), alone[1])
    loaded.delete_adapter("default")
    close(logits(loaded), alone[1])
    assert not any("default" in key for key in loaded.state_dict())
    assert not any("default" in key for layer in fura_layers(loaded).values() for key in layer._kept_blocks)
    with pytest.raises(ValueError, match="not found"):
        loaded.set_adapter("default")


def test_adapters_active_together_add_up(case):
    """y = (I + sum D_out) W (I + sum D_in) x: in the forward, merged at once, merged in turn."""
    model = adapted(case, seed=1)
    for name, side in (("second", "input"), ("third", "output")):
        model.add_adapter(name, FuraConfig(target_modules=case[1], train_side=side, init_weights=False))
    names = ["default", "second", "third"]
    layer = next(iter(fura_layers(model).values()))
    D = {name: torch.block_diag(*layer.delta(name)).detach() for name in names}
    W = layer.get_base_weight().clone()
    eye_in, eye_out = torch.eye(W.shape[1]), torch.eye(W.shape[0])
    exact = (eye_out + D["third"]) @ W @ (eye_in + D["default"] + D["second"])

    model.base_model.set_adapter(names)
    expected = logits(model)
    x = torch.randn(5, W.shape[1])
    bias = 0 if layer.bias is None else layer.bias
    close(layer(x), x @ exact.T + bias)
    model.merge_adapter()
    close(layer.get_base_weight(), exact)
    close(logits(model), expected)
    model.unmerge_adapter()
    model.merge_adapter(["third"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["default", "second"])
    close(layer.get_base_weight(), exact)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_weight(), W)
    merged = model.merge_and_unload(adapter_names=names)
    close(logits(merged), expected)


def test_mixed_batch(case):
    """adapter_names= gives each sample the adapter it names, or the base."""
    model = adapted(case, seed=1).eval()
    model.add_adapter("other", FuraConfig(target_modules=case[1], train_side="output", init_weights=False))
    base, first = logits(case[0]()), logits(model)
    model.set_adapter("other")
    other = logits(model)
    assert (first - other).abs().max() > 1e-3
    for names, rows in ((["default", "other"], (first, other)), (["other", "__base__"], (other, base))):
        mixed = logits(model, adapter_names=names)
        for i, row in enumerate(rows):
            close(mixed[i], row[i])
    assert torch.equal(logits(model), other)
    with pytest.raises(ValueError, match="nobody"):
        logits(model, adapter_names=["nobody", "other"])
    with pytest.raises(ValueError, match="2 samples.*3"):
        logits(model, adapter_names=["other"] * 3)
    ids = inputs_for(model)
    alone = model.generate(**ids, max_new_tokens=3, do_sample=False)
    mixed = model.generate(**ids, max_new_tokens=3, do_sample=False, adapter_names=["other", "__base__"])
    assert torch.equal(mixed[0], alone[0])
    with model.disable_adapter():
        assert torch.equal(mixed[1], model.generate(**ids, max_new_tokens=3, do_sample=False)[1])
    model.train()
    with pytest.raises(ValueError, match="inference"):
        logits(model, adapter_names=["other", "other"])


def test_target_modules_forms():
    def names(model=None, **config):
        model = get_peft_model(model or tiny_llama(), FuraConfig(**config))
        return {name.removeprefix("base_model.model.") for name in fura_layers(model)}

    linears = {n for n, m in tiny_llama().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert names(target_modules="all-linear") == names() == linears
    assert names(target_modules=["q_proj"]) == {n for n in linears if n.endswith("q_proj")}
    assert names(target_modules=r".*\.1\..*(k|v)_proj") == {f"model.layers.1.self_attn.{x}_proj" for x in "kv"}
    assert names(target_modules="all-linear", exclude_modules=r".*mlp.*") == {n for n in linears if "mlp" not in n}
    assert names(target_modules=["q_proj"], layers_to_transform=[1]) == {"model.layers.1.self_attn.q_proj"}
    assert names(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers") == {
        "model.layers.0.self_attn.q_proj"
    }
    neox = names(tiny_neox(), target_modules="all-linear")
    assert neox == {n for n, m in tiny_neox().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def test_block_sizes_per_module():
    model = get_peft_model(
        tiny_llama(),
        FuraConfig(target_modules="all-linear", num_blocks=4, block_size_pattern={"down_proj": 96, r"0\..*q_proj": 6}),
    )
    blocks = {}
    for name, layer in fura_layers(model).items():
        N, b = blocks[name.removeprefix("base_model.model.model.layers.")] = layer.fura_adapters["default"].blocks
        r = min(b, layer.out_features)
        assert layer.fura_dR["default"].shape == (N, r, b)
        assert layer.fura_V["default"].shape == (N, b, r)
    assert blocks["0.self_attn.q_proj"] == (8, 6)
    assert blocks["1.self_attn.q_proj"] == (4, 12)
    assert blocks["1.mlp.down_proj"] == (1, 96)


@pytest.mark.parametrize("bias", ["none", "all", "fura_only"])
def test_bias(bias, tmp_path):
    config = FuraConfig(target_modules=["query_key_value"], bias=bias)
    model = perturb(get_peft_model(tiny_neox(), config))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    every = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    assert trained == {
        "none": set(), "all": every, "fura_only": {n for n in every if "query_key_value" in n},
    }[bias]  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(0.3)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    close(logits(PeftModel.from_pretrained(tiny_neox(), tmp_path)), expected)


@pytest.mark.parametrize("build", [tiny_llama, tiny_llava])
def test_modules_to_save(build, tmp_path):
    name, targets = ("lm_head", ["q_proj"]) if build is tiny_llama else ("multi_modal_projector", LANGUAGE)
    model = perturb(get_peft_model(build(), FuraConfig(target_modules=targets, modules_to_save=[name])))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"{name}.modules_to_save" in key:
                assert parameter.requires_grad
                parameter.add_(0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert any(name in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    close(logits(PeftModel.from_pretrained(build(), tmp_path)), expected)
    close(logits(model.merge_and_unload()), expected)


def test_inference_mode_and_dtypes(tmp_path):
    model = get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj"], inference_mode=True))
    assert not any(p.requires_grad for p in model.parameters())
    model = perturb(get_peft_model(tiny_llama(torch.bfloat16), FuraConfig(target_modules=["q_proj"])))
    layer = next(iter(fura_layers(model).values()))
    assert layer.fura_dR["default"].dtype == layer.fura_V["default"].dtype == torch.float32
    model.save_pretrained(tmp_path)
    expected = get_peft_model_state_dict(model)
    for low in (True, False):
        loaded = PeftModel.from_pretrained(tiny_llama(torch.bfloat16), tmp_path, low_cpu_mem_usage=low)
        found = get_peft_model_state_dict(loaded)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        coarse = PeftModel.from_pretrained(
            tiny_llama(torch.bfloat16), tmp_path, low_cpu_mem_usage=low, autocast_adapter_dtype=False
        )
        layer = next(iter(fura_layers(coarse).values()))
        assert layer.fura_dR["default"].dtype == torch.bfloat16
        assert layer.fura_V["default"].dtype == torch.float32
    wide = get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj"], basis_dtype="float64"))
    assert next(iter(fura_layers(wide).values())).fura_V["default"].dtype == torch.float64
    assert torch.equal(logits(wide), logits(tiny_llama()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_model_leaves_its_basis(dtype, tmp_path):
    """In float16 the smallest s0 would be zero and divide ds; the saved adapter gives the same outputs again."""
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[:, :8] *= 1e-7
    model = get_peft_model(base, FuraConfig(target_modules="all-linear")).to(dtype)
    layer = next(iter(fura_layers(model).values()))
    assert layer.fura_s0["default"].to(torch.float16)[0, -1] == 0 < layer.fura_s0["default"][0, -1]
    with model.disable_adapter():
        plain = logits(model)
    assert torch.equal(logits(model), plain)
    expected = logits(perturb(model, scale=1e-3))
    assert torch.isfinite(expected).all() and not torch.equal(expected, plain)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    dtypes = {(key.rpartition(".")[2], tensor.dtype) for key, tensor in tensors.items()}
    assert dtypes == {
        ("fura_dR", dtype), ("fura_ds", dtype), ("fura_V", torch.float32), ("fura_s0", torch.float32),
    }  # fmt: skip
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path, autocast_adapter_dtype=False)
    close(logits(loaded), expected)


def test_transformers_own_adapter_methods(case, tmp_path):
    model = case[0]()
    base = logits(model)
    model.add_adapter(FuraConfig(target_modules=case[1]), "mine")
    assert torch.equal(logits(model), base)
    perturb(model)
    expected = logits(model)
    assert (expected - base).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = case[0]()
    again.load_adapter(str(tmp_path), "again")
    close(logits(again), expected)
    again.disable_adapters()
    assert torch.equal(logits(again), base)
    again.enable_adapters()
    again.delete_adapter("again")
    assert torch.equal(logits(again), base)


def test_auto_peft_model(tmp_path):
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base).eval()
    model = get_peft_model(model, FuraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    assert type(model) is PeftModelForCausalLM
    expected = logits(perturb(model))
    model.save_pretrained(tmp_path / "adapter")
    close(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    generated = model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(
        again.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False), generated
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = adapted(CASES["llama"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        inputs = inputs_for(model)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(g.abs().max() > 0 for g in grads[0])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_auto_peft_model_of_a_llava(tmp_path):
    from peft import AutoPeftModel
    from transformers import LlavaForConditionalGeneration

    tiny_llava().save_pretrained(tmp_path / "base")
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    model = perturb(get_peft_model(base, FuraConfig(target_modules=LANGUAGE)))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    close(logits(AutoPeftModel.from_pretrained(tmp_path / "adapter")), expected)


def test_transformers_trainer_resumes_exactly(tmp_path):
    """Four steps; and two, a checkpoint, two more from it with a new model: one adapter."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 97, (16, 9))]

    def train(folder, resume=None):
        model = get_peft_model(tiny_llama(), FuraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        arguments = TrainingArguments(
            folder, max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2,
            gradient_checkpointing=True, report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return get_peft_model_state_dict(model), [e["loss"] for e in trainer.state.log_history if "loss" in e]

    through, losses = train(tmp_path / "through")
    checkpoint = tmp_path / "through" / "checkpoint-2"
    assert {path.name for path in checkpoint.glob("*model*")} == {"adapter_model.safetensors"}
    resumed, again = train(tmp_path / "resumed", checkpoint)
    assert len(losses) == 4 and losses == again
    assert all(torch.equal(through[key], resumed[key]) for key in through)
    assert max(value.abs().max() for key, value in through.items() if "dR" in key) > 1e-2


def test_the_whole_model_compiles_to_one_graph():
    model = adapted(CASES["llama"])
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    close(logits(compiled), logits(model))


def test_meta_device(tmp_path):
    """A model without memory takes an adapter, runs, and takes the values later."""
    model = adapted(CASES["llama"])
    state, expected = model.state_dict(), logits(model)
    with torch.device("meta"):
        empty = get_peft_model(tiny_llama(), FuraConfig(target_modules=CASES["llama"][1]))
        assert empty(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.is_meta
    assert all(t.is_meta for t in empty.state_dict().values())
    assert empty.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    layers = fura_layers(empty.to_empty(device="cpu")).values()
    assert not any(layer.fura_adapters["default"].is_ready for layer in layers)
    empty.load_state_dict(state)
    empty.base_model.model.model.rotary_emb = tiny_llama().model.rotary_emb  # its buffers are in no state dict
    close(logits(empty), expected)


@pytest.mark.parametrize("side", ["input", "output"])
def test_conversion_to_lora(side):
    """At full rank the same function; below it an approximation, for what takes LoRA alone."""
    model = adapted((tiny_llama, ["q_proj", "gate_proj", "down_proj"]), train_side=side).eval()
    expected, base = logits(model), logits(tiny_llama())
    for rank, share in ((48, 1e-4), (12, 0.9)):
        config, state = convert_to_lora(model, rank)
        lora = get_peft_model(tiny_llama(), config)
        set_peft_model_state_dict(lora, state)
        assert (logits(lora.eval()) - expected).norm() < share * (base - expected).norm()


def test_status_and_repr():
    model = adapted(CASES["llama"])
    status = model.get_model_status()
    assert status.peft_types == {"default": "FURA"} and status.available_adapters == ["default"]
    assert status.num_adapter_layers == 14 and status.trainable_params == model.get_nb_trainable_parameters()[0]
    assert "fura.FuraLinear" in repr(model)
