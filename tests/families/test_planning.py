"""Plans of every family: against transformers' and PEFT's own counts on real models, without a processor."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from fura_vlm.families.base import Family
from fura_vlm.families.registry import family_class
from fura_vlm.plan.costs import Setting, gpu_of, memory, step_seconds
from fura_vlm.plan.page import plan
from fura_vlm.plan.shapes import Counts
from fura_vlm.training.config import PlanConfig, TrainConfig
from fura_vlm.training.methods import METHODS, prepare

SETTING = Setting("fura", 1, 1, False, False, 2, False)


@pytest.fixture(scope="session")
def model_of(folder_of):
    def load(name):
        cls = AutoModelForCausalLM if name == "text" else AutoModelForImageTextToText
        return cls.from_pretrained(folder_of(name), dtype=torch.float32).requires_grad_(False)

    return load


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_the_real_model(method, name, folder, family, model_of):
    if name == "text" and method == "projector":
        pytest.skip("a language model has no projector")
    config = AutoConfig.from_pretrained(folder)
    train = TrainConfig(model_name_or_path=str(folder), method=method)
    counts = Counts(config, train)
    model = model_of(name)
    assert counts.total == model.num_parameters()
    assert counts.tower == sum(p.numel() for p in getattr(family.tower(model), "parameters", list)())
    whole = dataclasses.replace(train, method=METHODS[method].without_four_bits or method)
    trained = sum(p.numel() for p in prepare(model, whole, family).parameters() if p.requires_grad)
    assert counts.trained == trained > 0
    parts = memory(train, counts, dataclasses.replace(SETTING, method=method), 0.5)
    assert min(parts.values()) >= 0 and parts["activations"] > 0
    if METHODS[method].four_bits:
        assert parts["weights"] < 2 * counts.total
    else:
        assert parts["weights"] + 2 * counts.trained * (method == "full") == 2 * counts.total


def test_patches_by_the_configuration_are_those_by_the_processor(family, folder):
    """The general way asks the processor about a large square picture."""
    alone = family_class(family.config)(None, family.config).patches()
    if family.tower is Family.tower:  # not of a language model
        assert alone.per_token == pytest.approx(Family.patches(family).per_token, rel=0.35)
    assert alone == family.patches()


def test_a_trained_tower_costs_more(folder_of):
    config = AutoConfig.from_pretrained(folder_of("qwen2_5_vl"))
    spent = []
    for tower in ("frozen", "adapter", "full"):
        train = TrainConfig(vision_tower=tower)
        counts = Counts(config, train)
        gpu_seconds = step_seconds(counts, SETTING, 1000, gpu_of(80))
        spent.append((sum(memory(train, counts, SETTING, 0.5).values()), gpu_seconds))
    assert spent[0][0] < spent[1][0] < spent[2][0] and spent[0][1] < spent[1][1] < spent[2][1]


def test_more_picture_tokens_take_longer_and_text_takes_no_tower(folder_of):
    config = AutoConfig.from_pretrained(folder_of("gemma3"))
    seconds = [step_seconds(Counts(config, TrainConfig(), n), SETTING, 1000, gpu_of(80)) for n in (0, 256, 512)]
    assert seconds[1] - seconds[0] == pytest.approx(seconds[2] - seconds[1]) and seconds[1] > seconds[0]
    text = Counts(AutoConfig.from_pretrained(folder_of("text")), TrainConfig())
    assert text.patches == text.tower == text.projected == 0


def test_experts_that_a_token_does_not_pass_through_take_memory_and_no_time():
    from transformers import MixtralConfig

    shapes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    few, many = (
        Counts(MixtralConfig(num_local_experts=number, num_experts_per_tok=2, **shapes), TrainConfig())
        for number in (2, 8)
    )
    assert many.total - few.total == 2 * 6 * (3 * 32 * 48 + 32)  # six experts a layer, and the router's rows
    assert many.used - few.used == 2 * 6 * 32
    assert many.text.intermediate == 2 * 48


def test_the_page_of_any_folder(tmp_path, name, folder, capsys):
    (tmp_path / "a.yaml").write_text(f"model_name_or_path: {folder}\ndeepspeed: scripts/zero2.json\n")
    methods = ["fura", "qlora", "full"]
    text = plan(PlanConfig(str(tmp_path / "a.yaml"), methods=methods, gpus=[1], memory=[24]))
    assert f"The shapes of {folder}." in text and all(f"| {method} | Z" in text for method in methods)
