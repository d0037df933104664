"""Loss, gradients and pictures of every family against the model's own, in float32."""

import pytest
import torch
from family_talk import ONE, PICTURES, TEXT_ONLY, TURNS, TWO, encode, images
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from fura_vlm.training.loss import positions, train_on_labels_only, use_all_parts

PAD = {"labels": -100}


@pytest.fixture
def model(name, folder):
    cls = AutoModelForCausalLM if name == "text" else AutoModelForImageTextToText
    return cls.from_pretrained(folder, dtype=torch.float32).train()


def batch_of(family, conversations) -> dict:
    """Rows padded on the right, with everything that the model takes."""
    rows, of_pictures = [], []
    for messages in conversations:
        ids, labels = encode(family, messages)
        row = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        rows.append(row | family.token_type_ids(ids))
        of_pictures.append(family.pixels(images(messages)))
    values = {"input_ids": family.tokenizer.pad_token_id} | PAD
    padded = {
        key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], True, values.get(key, 0)) for key in rows[0]
    }
    return padded | family.join([tensors for tensors in of_pictures if tensors])


def gradients(model, batch) -> tuple[float, dict]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict, wanted: dict) -> None:
    for name, gradient in wanted.items():
        largest = max(gradient.abs().max().item(), 1e-3)  # a key's bias has none, but for rounding
        assert (found[name] - gradient).abs().max().item() < 2e-5 * largest, name


def test_loss_and_gradients_are_the_models_own(family, model, name):
    mixed = [TEXT_ONLY, TURNS] if name == "text" else [TEXT_ONLY, TWO, ONE]
    batches = {"mixed": mixed, "words": [TEXT_ONLY, TURNS]}
    wanted = {kind: gradients(model, batch_of(family, rows)) for kind, rows in batches.items()}
    train_on_labels_only(model, family)
    for told in (False, True):
        for kind, rows in batches.items():
            batch = batch_of(family, rows)
            batch |= positions(batch, family.run_id) if told else {}
            loss, found = gradients(model, batch)
            assert loss == pytest.approx(wanted[kind][0], rel=1e-6)
            assert_close(found, wanted[kind][1])
    items = torch.tensor(7)
    batch = batch_of(family, batches["words"])
    labels = (batch["labels"][:, 1:] != -100).sum()
    loss = model(**batch, num_items_in_batch=items).loss.item()
    assert loss == pytest.approx(wanted["words"][0] * labels.item() / 7, rel=1e-5)


def test_a_blank_picture_changes_nothing_and_reaches_all(family, model, name):
    if name == "text":
        pytest.skip("it takes no pictures")
    model(**batch_of(family, [TWO]))  # some models remember the positions of the pictures that they saw last
    wanted = gradients(model, batch_of(family, [TEXT_ONLY, TURNS]))
    train_on_labels_only(model, family)
    use_all_parts(model, family)
    loss, found = gradients(model, batch_of(family, [TEXT_ONLY, TURNS]))
    assert loss == pytest.approx(wanted[0], rel=1e-6)
    assert_close(found, wanted[1])
    with_pictures = gradients(model, batch_of(family, [TWO]))[1]
    assert found.keys() >= with_pictures.keys()  # as many weights take part as where there is a picture
    assert all(not found[key].any() for key in found.keys() - wanted[1].keys())


def test_rows_joined_are_what_the_processor_makes_of_the_batch(family, name):
    """Whatever is filled up with zeros, and however many pictures each conversation has."""
    if name == "text":
        pytest.skip("it takes no pictures")
    several = [[PICTURES[1], PICTURES[3]], [PICTURES[2]]]
    joined = family.join([family.pixels(each) for each in several])
    made = family.processor(
        text=[family.placeholder * len(each) for each in several], images=several, padding=True, return_tensors="pt"
    )
    theirs = {key: value for key, value in made.items() if key not in family.of_text}
    assert joined.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(joined[key], value), key


def test_parts_cover_the_model(family, model, name):
    """Every weight is in one of the four parts; the projector may be within the tower."""
    parts = family.parts(model)
    of = {key: {id(p) for module in modules for p in module.parameters()} for key, modules in {
        "decoder": [parts.decoder], "head": [parts.head], "projector": parts.projectors,
        "tower": [parts.tower] if parts.tower is not None else [],
    }.items()}  # fmt: skip
    rest = [key for key, p in model.named_parameters() if not any(id(p) in ids for ids in of.values())]
    assert rest == (["model.image_newline"] if name == "llava_next" else [])
    assert not of["decoder"] & (of["tower"] | of["projector"])
    assert bool(of["projector"]) == (name != "text")


def test_patches_are_what_the_tower_sees(family, model, name):
    if name == "text":
        pytest.skip("it takes no pictures")
    seen = []
    layer = next(m for m in family.parts(model).tower.modules() if type(m).__name__.endswith(("Layer", "Block")))
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0]), with_kwargs=True
    )
    edge = 448 if name.startswith("qwen") else 2 * family.config.vision_config.image_size if name != "internvl" else 56
    from PIL import Image

    inputs = family.pixels([Image.new("RGB", (edge, edge))])
    features = sum(f.shape[:-1].numel() for f in family.picture_features(model, inputs)[:1])
    count = seen[0].shape[:-1].numel()
    assert family.patches().per_token == pytest.approx(count / features, rel=0.35)
