"""QFuRA: adapters over bitsandbytes NF4 (double quantisation) and int8, on the CPU."""

import pytest
import torch
from fura_models import inputs_for, perturb, tiny_llama
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from fura_vlm.fura import FuraConfig, FuraLinear

bnb = pytest.importorskip("bitsandbytes")

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "nf4": dict(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "int8": dict(load_in_8bit=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A Llama on disk, wide enough for whole quantisation blocks."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("parent")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=99,
            max_position_embeddings=64,
        )  # fmt: skip
    ).save_pretrained(folder)
    return folder


def load(parent, kind=None):
    if kind is None:
        return LlamaForCausalLM.from_pretrained(parent, dtype=torch.float32).eval()
    return LlamaForCausalLM.from_pretrained(
        parent, quantization_config=BitsAndBytesConfig(**KINDS[kind]), dtype=torch.float32, device_map="cpu"
    ).eval()


def unpacked(model):
    """A base that does not repack its weights for inference, as one with a trainable adapter does not."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def fura_layers(model):
    return [module for module in model.modules() if isinstance(module, FuraLinear)]


@torch.no_grad()
def logits(model):
    return model(**inputs_for(model)).logits.float()


def dense(layer):
    """The dequantised weight, by bitsandbytes' own forward: W = (base(I) - bias)^T."""
    base = layer.get_base_layer()
    return base(torch.eye(base.in_features)).detach().float().T


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_untrained_is_the_quantised_base(parent, kind, side):
    expected = logits(unpacked(load(parent, kind)))
    model = get_peft_model(load(parent, kind), FuraConfig(target_modules=LAYERS, train_side=side))
    assert len(fura_layers(model)) == 14
    assert torch.equal(logits(model), expected)
    assert not torch.equal(expected, logits(load(parent)))
    assert model.get_model_status().quantization_backend == {"nf4": "bnb 4bit", "int8": "bnb 8bit"}[kind]


@pytest.mark.parametrize("kind", list(KINDS))
def test_basis_is_that_of_the_dequantised_weight(parent, kind):
    model = get_peft_model(load(parent, kind), FuraConfig(target_modules=["q_proj", "down_proj"]))
    for layer in fura_layers(model):
        N, b = layer.fura_adapters["default"].blocks
        s = torch.stack([torch.linalg.svdvals(block) for block in dense(layer).split(b, dim=1)])
        tolerance = 2e-3 if kind == "nf4" else 0.03  # an int8 product also rounds its input
        torch.testing.assert_close(layer.fura_s0["default"], s[:, : min(b, 64)], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", list(KINDS))
def test_training_saving_and_loading(parent, kind, tmp_path):
    model = get_peft_model(load(parent, kind), FuraConfig(target_modules=LAYERS)).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs = inputs_for(model)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(load(parent, kind), tmp_path, low_cpu_mem_usage=low)
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=0.01)
    again = logits(unpacked(PeftModel.from_pretrained(load(parent, kind), tmp_path)))
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5 if kind == "nf4" else 0.01)


@pytest.mark.parametrize("kind", list(KINDS))
def test_merge_requantises_and_unmerge_is_exact(parent, kind):
    """Merged: the adapted weight, within the rounding of its quantisation. Unmerged: the base itself."""
    model = perturb(get_peft_model(load(parent, kind), FuraConfig(target_modules=LAYERS)), scale=0.3)
    layers = fura_layers(model)
    base, expected = logits(unpacked(load(parent, kind))), logits(model)
    originals = [(layer.base_layer, layer.base_layer.weight, layer.base_layer.weight.data.clone()) for layer in layers]
    for _ in range(2):
        wanted = [dense(layer) + layer.get_delta_weight("default").float() for layer in layers]
        model.merge_adapter(safe_merge=True)
        for layer, weight in zip(layers, wanted, strict=True):
            step = weight.abs().max() * (0.2 if kind == "nf4" else 0.03)
            assert (dense(layer) - weight).abs().max() < step
        model.unmerge_adapter()
        for layer, (base_layer, weight, data) in zip(layers, originals, strict=True):
            assert layer.base_layer is base_layer and base_layer.weight is weight
            assert torch.equal(weight.data, data)
        assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    merged = model.merge_and_unload()
    assert not fura_layers(merged)
    assert type(merged.model.layers[0].self_attn.q_proj).__name__ in ("Linear4bit", "Linear8bitLt")
    assert (logits(merged) - expected).abs().mean() < (base - expected).abs().mean()


def test_evaluating_does_not_end_the_training(parent):
    """On some CPUs bitsandbytes repacks 4-bit weights for inference, and then lets no gradient through."""
    model = get_peft_model(load(parent, "nf4"), FuraConfig(target_modules=LAYERS)).eval()
    logits(model)
    inputs = inputs_for(model)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 28 and all(g is not None and g.abs().max() > 0 for g in grads)


def test_merging_after_inference_with_repacked_weights(parent, tmp_path):
    perturb(get_peft_model(load(parent, "nf4"), FuraConfig(target_modules=LAYERS)), scale=0.3).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load(parent, "nf4"), tmp_path)
    expected = logits(model)
    layer = fura_layers(model)[0]
    if not getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU does not make bitsandbytes repack weights")
    wanted = dense(layer) + layer.get_delta_weight("default").float()
    model.merge_adapter()
    assert (dense(layer) - wanted).abs().max() < 0.2 * wanted.abs().max()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    trained = load(parent, "nf4")
    logits(trained)
    with pytest.raises(ValueError, match="^model.layers.0.self_attn.q_proj: bitsandbytes has repacked"):
        get_peft_model(trained, FuraConfig(target_modules=LAYERS))


def test_adapter_of_a_quantised_base_loads_over_its_parent(parent, tmp_path, caplog):
    """Trained over NF4, used over the dense parent: only shapes are checked, and one line says so."""
    model = perturb(get_peft_model(load(parent, "nf4"), FuraConfig(target_modules=LAYERS)), scale=0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="fura_vlm"):
        over = PeftModel.from_pretrained(load(parent), tmp_path)
    assert len(caplog.records) == 1 and "in another format" in caplog.text and "(of 14 such)" in caplog.text
    plain = logits(load(parent))
    assert (logits(over) - expected).abs().mean() < 0.5 * (plain - expected).abs().mean()
    merged = logits(over.merge_and_unload())
    torch.testing.assert_close(merged, logits(PeftModel.from_pretrained(load(parent), tmp_path)), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="q_proj.*shape 64x64.*48x48"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_another_quantised_base_is_refused(parent, tmp_path):
    perturb(get_peft_model(load(parent, "nf4"), FuraConfig(target_modules=LAYERS))).save_pretrained(tmp_path / "a")
    other = load(parent)
    other.model.layers[1].mlp.up_proj.weight.data.neg_()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj"):
        PeftModel.from_pretrained(load(tmp_path / "other", "nf4"), tmp_path / "a")


def load_other(parent, kind):
    """The base quantised by a backend that is not among the dependencies of the project."""
    if kind == "hqq":  # transformers 5 does not quantise with it while loading
        quantize = pytest.importorskip("hqq.core.quantize")
        model, config = load(parent), quantize.BaseQuantizeConfig(nbits=4, group_size=64)
        for name, module in list(model.named_modules()):
            if name.endswith("_proj"):
                block, _, child = name.rpartition(".")
                layer = quantize.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
                setattr(model.get_submodule(block), child, layer)
        return model
    from transformers import TorchAoConfig

    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(getattr(quantization, kind)())
    return LlamaForCausalLM.from_pretrained(
        parent, quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).eval()


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "hqq"])
def test_other_backends(parent, kind, side, tmp_path):
    """Start, training, saving, loading, merging and unmerging over torchao's int8 and HQQ's 4 bits."""
    base = logits(load_other(parent, kind))
    model = get_peft_model(load_other(parent, kind), FuraConfig(target_modules=LAYERS, train_side=side))
    assert torch.equal(logits(model), base)
    assert model.get_model_status().quantization_backend == ("hqq" if kind == "hqq" else "torchao")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs = inputs_for(model)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    again = logits(PeftModel.from_pretrained(load_other(parent, kind), tmp_path))
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)
    layer = fura_layers(model)[0]
    before, wanted = dense(layer), dense(layer) + layer.get_delta_weight("default")
    model.merge_adapter(safe_merge=True)
    assert (dense(layer) - wanted).abs().max() < 0.1 * wanted.abs().max() and not torch.equal(dense(layer), before)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    assert (logits(merged) - expected).abs().mean() < 0.3 * (base - expected).abs().mean()
    assert type(merged.model.layers[0].self_attn.q_proj) is type(layer.base_layer)


def test_a_format_that_passes_no_gradients_is_refused(parent):
    model = load_other(parent, "Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(ValueError, match="^model.layers.0.self_attn.q_proj: its torchao format passes no gradients"):
        get_peft_model(model, FuraConfig(target_modules=LAYERS))


def test_layers_without_dequantisation_are_refused_by_name():
    """GPTQ, AWQ and the like: PEFT cannot dequantise them, so no basis can be made, only loaded."""
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    model = get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj"]))
    layer = fura_layers(model)[0]
    layer.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj: its gptq weight cannot be"):
        layer.update_layer("other", FuraConfig(target_modules=["q_proj"]))
