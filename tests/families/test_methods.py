"""Every method on every family: what it trains, that it learns, and that it merges into a plain model."""

import pytest
import torch
from family_talk import ONE, TEXT_ONLY, TURNS, TWO, images
from peft import PeftModel
from test_family_model import batch_of
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from fura_vlm.modelling.config import MergeConfig
from fura_vlm.modelling.load import load_base, load_family
from fura_vlm.modelling.merge import merge
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.errors import TrainingError
from fura_vlm.training.loss import train_on_labels_only
from fura_vlm.training.methods import METHODS, prepare, quantization


def trained(folder, steps: int = 3, **settings):
    """A model after a few steps on a few conversations, its family, and the losses."""
    config = TrainConfig(model_name_or_path=str(folder), lora_r=4, lora_dropout=0.0, **settings)
    torch.manual_seed(0)
    family = load_family(str(folder))
    four_bits = quantization(config, family, torch.float32)
    model = prepare(load_base(str(folder), torch.float32, quantization_config=four_bits), config, family)
    train_on_labels_only(model.get_base_model() if isinstance(model, PeftModel) else model, family)
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=3e-3 if settings["method"] == "full" else 1e-2
    )
    batch = batch_of(family, [TEXT_ONLY, TURNS] if family.names.tower is None else [TEXT_ONLY, TWO, ONE])
    losses = []
    for _ in range(steps):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), family, losses


def part_of(name: str, names) -> str:
    """Which of the model's parts a weight belongs to."""
    name = name.removeprefix("base_model.model.")
    for projector in names.projectors:
        if name.startswith(projector + "."):
            return "projector"
    if names.tower and name.startswith(names.tower + "."):
        return "tower"
    return "language" if name.startswith((names.decoder + ".", names.head + ".")) else "rest"


def has_linear_projector(family, model) -> bool:
    """Gemma 3's is a bare matrix."""
    modules = [part for projector in family.parts(model).projectors for part in projector.modules()]
    return any(isinstance(module, torch.nn.Linear) or hasattr(module, "base_layer") for module in modules)


@pytest.mark.parametrize("method", list(METHODS))
def test_each_method_trains_its_parts_and_learns(method, folder, name):
    if method.startswith("q"):
        pytest.importorskip("bitsandbytes")
    if method == "projector" and name == "text":
        with pytest.raises(TrainingError, match="has no projector"):
            trained(folder, method=method)
        return
    model, family, losses = trained(folder, method=method)
    assert losses[-1] < losses[0]
    parts = {part_of(key, family.names) for key, p in model.named_parameters() if p.requires_grad}
    wanted = {"language", "projector"}
    if name == "text" or method != "full" and not has_linear_projector(family, model):
        wanted = {"language"}
    assert parts == ({"projector"} if method == "projector" else wanted)
    if METHODS[method].four_bits:
        assert any(type(module).__name__ == "Linear4bit" for module in model.modules())


@pytest.mark.parametrize("tower", ["adapter", "full"])
def test_the_tower_takes_part_where_it_is_asked_for(tower, folder, name):
    if name == "text":
        pytest.skip("it has none")
    model, family, losses = trained(folder, vision_tower=tower, method="fura")
    assert losses[-1] < losses[0]
    learnt = {
        part_of(key, family.names) for key, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }
    assert {"tower", "language"} <= learnt


@pytest.mark.parametrize("projector", ["full", "frozen"])
def test_the_projector_is_trained_as_asked(projector, folder, name):
    if name == "text":
        pytest.skip("it has none")
    model, family, _ = trained(folder, mm_projector=projector, method="lora", steps=1)
    learnt = {part_of(key, family.names) for key, p in model.named_parameters() if p.requires_grad}
    assert ("projector" in learnt) == (projector == "full")


def test_merged_answers_as_the_adapter_does(folder, name, tmp_path):
    model, family, _ = trained(folder, method="fura")
    model.save_pretrained(tmp_path / "adapter")
    merge(MergeConfig(str(tmp_path / "adapter"), str(tmp_path / "merged"), dtype="float32"))
    cls = AutoModelForCausalLM if name == "text" else AutoModelForImageTextToText
    merged = cls.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    messages = TEXT_ONLY[:-1] if name == "text" else TWO[:3]
    inputs = family.inputs(messages, images(messages))
    with torch.no_grad():
        assert torch.allclose(merged(**inputs).logits, model(**inputs).logits, atol=2e-4)
    assert load_family(str(tmp_path / "merged")).prompt(messages) == family.prompt(messages)


def test_a_batch_answers_as_each_alone(folder, name):
    """Rows of different length, with two, one and no pictures."""
    family, model = load_family(str(folder)), load_base(str(folder), torch.float32).eval()
    asked = [TEXT_ONLY[:-1], TURNS[:3]] if name == "text" else [TEXT_ONLY[:-1], TWO[:3], ONE[:1]]
    inputs = [family.inputs(messages, images(messages)) for messages in asked]
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    together = family.batch(inputs)
    said = model.generate(**together, **settings)[:, together["input_ids"].shape[1] :]
    for row, alone in zip(said, inputs, strict=True):
        answer = model.generate(**alone, **settings)[0, alone["input_ids"].shape[1] :]
        assert row.tolist() == answer.tolist()
