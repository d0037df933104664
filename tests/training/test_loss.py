"""The loss on the labels alone, against transformers' own forward pass."""

from functools import partialmethod

import pytest
import torch
from peft import get_peft_model
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from fura_vlm.data.collator import Collator
from fura_vlm.families.base import IGNORE
from fura_vlm.modelling.load import load_base, load_family
from fura_vlm.training import loss
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.loss import positions, train_on_labels_only
from fura_vlm.training.methods import adapter_config, compile_layers

aten = torch.ops.aten


FAMILY = load_family("data/tiny-llava")


def model_in_training(**settings):
    torch.manual_seed(0)
    model = load_base("data/tiny-llava", torch.float64)
    config = adapter_config(TrainConfig(**settings), FAMILY, model)
    config.init_weights = False
    return get_peft_model(model, config).train()


def batch(lengths=(120, 90, 77), pictures=True):
    """Rows of different length, with labels on the last tokens and somewhere in between."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = torch.randint(300, 700, (length,), generator=generator)
        labels = torch.full_like(ids, IGNORE)
        labels[-7:], labels[70:72] = ids[-7:], ids[70:72]
        row = {"input_ids": ids, "labels": labels, "pictures": {}}
        if pictures:
            ids[3:67] = FAMILY.run_id
            pixels = torch.randn(1, 3, 112, 112, generator=generator, dtype=torch.float64)
            row["pictures"] = {"pixel_values": pixels}
        rows.append(row)
    return Collator(FAMILY, pad_to_multiple_of=16)(rows)


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found and all(gradient is not None for gradient in found.values())
    return found


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("pictures", [True, False])
def test_it_is_transformers_loss(pictures, items, told, monkeypatch):
    monkeypatch.setattr(loss, "ROWS_AT_ONCE", 10)  # several parts
    inputs = batch(pictures=pictures) | ({} if items is None else {"num_items_in_batch": torch.tensor(items)})
    theirs, ours = model_in_training(), model_in_training()
    train_on_labels_only(ours.get_base_model(), FAMILY)
    places = positions(inputs, FAMILY.run_id) if told else {}
    expected, found = theirs(**inputs), ours(**inputs, **places)
    assert found.logits is None
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)  # float32 in both
    expected.loss.backward()
    found.loss.backward()
    wanted = {name: g for name, g in ((n, p.grad) for n, p in theirs.named_parameters()) if g is not None}
    for name, gradient in wanted.items():
        torch.testing.assert_close(dict(ours.named_parameters())[name].grad, gradient, rtol=1e-5, atol=1e-9)
    assert len(wanted) > 20


def test_two_halves_make_a_whole():
    """As gradient accumulation calls it: each part divided by the number of labels of all."""
    whole, parts = model_in_training(), model_in_training()
    for model in (whole, parts):
        train_on_labels_only(model.get_base_model(), FAMILY)
    inputs = batch(lengths=(120, 110, 100, 90))
    labels = (inputs["labels"][:, 1:] != IGNORE).sum()
    whole(**inputs).loss.backward()
    for part in (slice(0, 2), slice(2, 4)):
        parts(**{key: value[part] for key, value in inputs.items()}, num_items_in_batch=labels).loss.backward()
    wanted = gradients(whole)
    for name, gradient in gradients(parts).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-9)


def test_head_and_tower_do_no_more_than_they_must():
    model = model_in_training()
    base = model.get_base_model()
    model.enable_input_require_grads()  # what gradient checkpointing turns on, for the tower's embeddings too
    train_on_labels_only(base, FAMILY)
    seen = {}
    base.lm_head.register_forward_hook(lambda module, args, output: seen.update(head=output.shape))
    base.model.vision_tower.register_forward_hook(
        lambda module, args, output: seen.update(tower=output.last_hidden_state.requires_grad)
    )
    inputs = batch()
    model(**inputs).loss.backward()
    assert seen["head"] == (1, 25, base.config.text_config.vocab_size)  # 9, 9 and 7 labels at 3 x 128 positions
    assert seen["tower"] is False


LOOKS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.masked_scatter_backward.default,
}


class Looks(TorchDispatchMode):
    """Notes what is read from the device, or cannot be allocated before the device says how large it is."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in LOOKS:
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pictures", [True, False])
def test_nothing_waits_for_the_device(pictures):
    model = model_in_training()
    inputs = batch(pictures=pictures)
    with Looks() as untouched:
        model(**inputs).loss.backward()
    assert untouched.seen  # transformers does
    train_on_labels_only(model.get_base_model(), FAMILY)
    told = positions(inputs, FAMILY.run_id)
    with Looks() as looks:
        model(**inputs, **told, num_items_in_batch=torch.tensor(25)).loss.backward()
    assert not looks.seen


def test_calls_without_labels_are_left_alone():
    model = model_in_training()
    base, inputs = model.get_base_model(), batch()
    labels = inputs.pop("labels")
    words = base.get_input_embeddings()(inputs["input_ids"])
    embedded = {"inputs_embeds": words, "pixel_values": inputs["pixel_values"]}
    calls = [inputs, embedded, inputs | {"output_hidden_states": True, "use_cache": False}]
    with torch.no_grad():
        expected = [model(**call) for call in calls]
        loss = model(**embedded, labels=labels).loss
        train_on_labels_only(base, FAMILY)
        for call, wanted in zip(calls, expected, strict=True):
            found = model(**call)
            assert torch.equal(found.logits, wanted.logits)
            assert (found.past_key_values is None) == (wanted.past_key_values is None)
            assert (found.hidden_states is None) == (wanted.hidden_states is None)
        assert model(**embedded, labels=labels).loss.item() == pytest.approx(loss.item(), rel=1e-6)
        for _ in range(2):
            with pytest.raises(ValueError, match="do not match"):
                model(**inputs | {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})


def test_pictures_without_as_many_tokens_are_refused():
    model, inputs = model_in_training(), batch()
    train_on_labels_only(model.get_base_model(), FAMILY)
    told = positions(inputs, FAMILY.run_id)
    for pictures in (inputs["pixel_values"].repeat(2, 1, 1, 1), inputs["pixel_values"][:1]):
        with pytest.raises(ValueError, match="do not match"):
            model(**inputs | told | {"pixel_values": pictures})


def test_what_is_said_of_pictures_is_heard():
    model = model_in_training()
    inputs = batch() | {"vision_feature_layer": -1}
    train_on_labels_only(model.get_base_model(), FAMILY)
    told = positions(inputs, FAMILY.run_id)
    with torch.no_grad():
        expected, found = model(**inputs).loss, model(**inputs, **told).loss
        assert torch.equal(found, expected)
        assert found != model(**batch(), **told).loss


def test_another_attention_is_given_its_mask():
    model = model_in_training()
    inputs = batch()
    train_on_labels_only(model.get_base_model(), FAMILY)
    with torch.no_grad():
        expected = model(**inputs).loss
        model.get_base_model().set_attn_implementation("eager")
        assert model(**inputs).loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_compiled_layers_share_one_graph_whatever_their_number_and_the_length(monkeypatch):
    """And no cache of keys and values is filled in training: each layer would have a graph of its own."""
    torch._dynamo.reset()
    counters["stats"].clear()
    # what a graph is compiled to is of no matter here
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    model = model_in_training()
    layers = model.get_base_model().model.language_model.layers
    train_on_labels_only(model.get_base_model(), FAMILY)
    compile_layers(model, FAMILY)
    for lengths in ((120, 90, 77), (100, 96), (200, 150, 140, 80)):
        model(**batch(lengths)).loss.backward()
    assert len(layers) > 1 and counters["stats"]["unique_graphs"] == 2  # one is the vision tower's
    torch._dynamo.reset()


def test_adapters_in_the_vision_tower_are_trained():
    model = model_in_training(vision_tower="adapter")
    train_on_labels_only(model.get_base_model(), FAMILY)
    model(**batch()).loss.backward()
    used = [
        p.grad
        for name, p in model.named_parameters()
        if p.requires_grad and "vision_tower" in name and ".layers.0." in name
    ]
    assert used and all(gradient.abs().max() > 0 for gradient in used)
