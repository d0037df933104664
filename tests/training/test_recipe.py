"""The configurations against the recipe as it is written: LLaVA-1.5 (arXiv 2310.03744, table 9; its scripts) and the
settings of the FuRA paper's release."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from peft import PeftModel

from fura_vlm.commands import parse
from fura_vlm.families.llava import Llava
from fura_vlm.modelling.load import load_base, load_family
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.errors import TrainingError
from fura_vlm.training.methods import learning_rate, prepare
from fura_vlm.training.settings import check, training_arguments

ROOT = Path(__file__).parents[2]
STAGE2 = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "num_train_epochs": 1,
    "train_batch_size": 128,
    "model_max_length": 2048,
    "mm_projector_lr": 2e-5,
    "max_grad_norm": 1.0,
    "group_by_modality_length": True,
    "bf16": True,
    "tf32": True,
    "deepspeed": "zero1",
    "per_device_train_batch_size": "auto",
    "gradient_checkpointing": "auto",
    "activation_memory_budget": "auto",
    "conversation": None,  # the model's own
    "mm_projector": "adapter",
    "lora_r": 128,
    "lora_alpha": 256,
    "lora_dropout": 0.05,
}
COMMONSENSE = {  # of the paper's release, but for the learning rate of full fine-tuning (the recipe says why)
    "conversation": "alpaca",
    "learning_rate": None,  # the method's
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.03,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
    "num_train_epochs": 3,
    "train_batch_size": 16,
    "model_max_length": 2048,
    "lora_r": 64,
    "lora_alpha": 128,
    "seed": 43,
    "bf16": True,
}
STAGE1 = STAGE2 | {
    "train_batch_size": 256,
    "mm_projector_lr": None,
    "learning_rate": 1e-3,
    "conversation": "plain",
    "method": "projector",
}


def recipe(name: str, **changes) -> TrainConfig:
    return TrainConfig(**yaml.safe_load((ROOT / "scripts/configs" / name).read_text()) | changes)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llava-1.5-7b.yaml", STAGE2),
        ("llava-1.5-7b-pretrain.yaml", STAGE1),
        ("commonsense-llama-3-8b.yaml", COMMONSENSE),
    ],
    ids=["2", "1", "commonsense"],
)
def test_values(name, wanted):
    settings = dataclasses.asdict(recipe(name))
    assert {key: settings[key] for key in wanted} == wanted
    assert Llava.conversations == ("v1", "plain")  # the first is its own


def test_what_reaches_the_trainer(tmp_path, monkeypatch):
    """No default of another library comes between: AdamW's betas, the scheduler's warm-up, the rate by method."""
    monkeypatch.chdir(ROOT)
    for name in ("ACCELERATE_USE_DEEPSPEED", "TENSORBOARD_LOGGING_DIR"):  # what it sets, taken back at the end
        monkeypatch.setenv(name, "")
    found = {"per_device_train_batch_size": 16, "gradient_checkpointing": True, "activation_memory_budget": 1.0}
    arguments = training_arguments(recipe("llava-1.5-7b.yaml", bf16=False, **found), tmp_path, 8, universal=False)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert arguments.learning_rate == 2e-4 and arguments.weight_decay == 0 and arguments.max_grad_norm == 1
    assert arguments.get_warmup_steps(5198) == 156  # 3 % of an epoch of 665,298 records, 128 a step
    assert arguments.gradient_accumulation_steps == 8 and arguments.gradient_checkpointing
    AcceleratorState._reset_state(reset_partial_state=True)
    commonsense = recipe("commonsense-llama-3-8b.yaml", bf16=False, **found)
    arguments = training_arguments(commonsense, tmp_path, 4, universal=False)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.lr_scheduler_type) == (0.9, 0.95, "linear")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", ["adam_beta1", "adam_beta2"])
def test_betas_out_of_range(name):
    with pytest.raises(TrainingError, match=f"{name} is 1.0 and has to be below 1"):
        check(recipe("tiny.yaml", **{name: 1.0}))
    with pytest.raises(TrainingError, match=f"{name} is -0.1 and has to be at least 0"):
        check(recipe("tiny.yaml", **{name: -0.1}))


def test_recipes_of_commonsense_go_by_name():
    for name in ("commonsense-llama-3-8b", "commonsense-smollm2"):
        command, options = parse(["train", "--config", name, "--method", "qlora"])
        assert command == "train" and options["conversation"] == "alpaca" and options["method"] == "qlora"
        assert options["output_dir"] == f"runs/{name}-{{method}}"


def test_rates_by_method():
    for method in ("fura", "qfura", "lora", "qlora", "dora"):
        assert learning_rate(recipe("llava-1.5-7b.yaml", method=method)) == 2e-4
    assert learning_rate(recipe("llava-1.5-7b.yaml", method="full")) == 2e-5
    assert learning_rate(TrainConfig(method="projector")) == 1e-3
    assert learning_rate(recipe("llava-1.5-7b.yaml", method="full", learning_rate=1e-6)) == 1e-6


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_files_are_called_as_their_stage(stage):
    assert json.loads((ROOT / f"scripts/zero{stage}.json").read_text())["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("projector", ["adapter", "full", "frozen"])
def test_all_adapters_adapt_the_same(projector):
    """q, k, v, o, gate, up and down of every layer, and the projector's two layers as it is said."""
    adapted, family = {}, load_family("data/tiny-llava")
    for method in ("fura", "lora", "dora"):
        config = recipe("llava-1.5-7b.yaml", method=method, mm_projector=projector, lora_r=4)
        model = prepare(load_base("data/tiny-llava", torch.float32), config, family)
        assert isinstance(model, PeftModel)
        adapted[method] = set(model.targeted_module_names)
        whole = {n for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n}
        assert len(whole) == (4 if projector == "full" else 0)
        assert not any("vision_tower" in n for n, p in model.named_parameters() if p.requires_grad)
    layers = model.config.text_config.num_hidden_layers
    assert len(adapted["fura"]) == 7 * layers + (2 if projector == "adapter" else 0)
    assert adapted["fura"] == adapted["lora"] == adapted["dora"]


@pytest.mark.parametrize("method", ["fura", "qfura", "lora", "qlora", "dora", "full"])
def test_each_script_starts_its_method(method, tmp_path):
    """What the launcher would start, read as the command reads it. In its place stands a function of the shell."""
    shell = {"BASH_FUNC_deepspeed%%": '() { printf "%s\\n" "$@" > "$STARTED"; }', "STARTED": str(tmp_path / "started")}
    recipe = "scripts/configs/llava-1.5-7b.yaml"
    subprocess.run(
        ["bash", f"scripts/finetune_{method}.sh", recipe, "--seed", "7"],
        cwd=ROOT,
        env=os.environ | shell | {"NUM_PROCESSES": "1", "FURA_VLM_VENV": sys.prefix},
        check=True,
    )
    started = (tmp_path / "started").read_text().splitlines()
    command, settings = parse(started[started.index("fura_vlm.cli") + 1 :])
    assert (command, settings["method"], settings["seed"]) == ("train", method, 7)
    assert settings["train_batch_size"] == 128  # of the recipe


def test_blocks_of_some_modules_are_of_another_width():
    """As it is typed, down to the tensors of the adapter."""
    typed = ["train", "--config", "tiny", "--block_size_pattern", "{down_proj: 64, linear_2: 32}"]
    _, options = parse(typed)
    base = load_base("data/tiny-llava", torch.float32)
    model = prepare(base, TrainConfig(**options), load_family("data/tiny-llava"))
    adapter = {name: parameter for name, parameter in model.named_parameters() if "fura_dR" in name}
    for name, parameter in adapter.items():
        width, dim = parameter.shape[-1], parameter.shape[0] * parameter.shape[-1]
        if "down_proj" in name:
            assert (dim, width) == (704, 64)
        elif "linear_2" in name:
            assert (dim, width) == (256, 32)
        else:
            assert (dim, width) in ((256, 16), (192, 16))
