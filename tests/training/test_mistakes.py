"""What a user does wrong ends in one sentence that says where and what to do."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import LlavaForConditionalGeneration

from fura_vlm.data.records import DataError
from fura_vlm.evaluation.heldout import load_questions
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.errors import TrainingError
from fura_vlm.training.memory import advice_on_memory
from fura_vlm.training.methods import prepare
from fura_vlm.training.run_folder import begin, choose_run
from fura_vlm.training.settings import check


def said(job) -> str:
    """What the command says when it ends, as one line."""
    lines = [line for line in job.output.splitlines() if line.startswith("fura-vlm train:")]
    assert len(lines) == 1, job.output  # once, whatever the number of processes
    assert "Traceback" not in job.output
    return lines[0]


def test_bad_records_are_listed_once(train, mixture):
    folder = train.folder / "mixture"
    shutil.copytree(mixture, folder)
    records = json.loads((folder / "train.json").read_text())[:12]
    with_image = [record for record in records if "image" in record]
    (folder / "images" / "cut.png").write_bytes((folder / with_image[0]["image"]).read_bytes()[:200])
    Image.new("CMYK", (40, 30)).save(folder / "images" / "cmyk.jpg")
    bad = [
        with_image[0] | {"id": "missing", "image": "images/nowhere.png"},
        with_image[0] | {"id": "cut", "image": "images/cut.png"},
        {"id": "silent", "image": with_image[0]["image"]},
    ]
    good = [with_image[0] | {"id": "cmyk", "image": "images/cmyk.jpg"}]
    (folder / "mixed.json").write_text(json.dumps(records + bad + good))

    job = train("lenient", data_path=str(folder / "mixed.json"), max_steps=1)
    assert job.status == 0, job.output
    assert "3 of 16 records left out" in job.output
    report = [json.loads(line) for line in (job.run / "skipped.jsonl").read_text().splitlines()]
    assert {row["record"] for row in report} == {"missing", "cut", "silent"}
    assert all(row["file"].endswith("mixed.json") and row["place"] and row["reason"] for row in report)

    job = train("strict", data_path=str(folder / "mixed.json"), strict=True, processes=2)
    assert job.status != 0
    assert "3 of 16 records cannot be used" in said(job)


def test_empty_mixture(launch):
    path = launch.folder / "empty.json"
    path.write_text("[]")
    assert f"{path} holds no records" in said(launch("empty", data_path=str(path)))


def test_missing_base(launch):
    job = launch("base", model_name_or_path="data/nowhere", processes=2)
    assert "There is no model at data/nowhere" in said(job)


def test_a_recipe_given_by_name_is_the_whole_recipe(launch):
    """Nothing of the embedded one, whose rate is fifteen times that of the paper, gets into it."""
    run = launch.folder / "run"
    recipe = launch.folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model_name_or_path": "data/nowhere", "output_dir": str(run)}))
    command = ["bash", "scripts/finetune_fura.sh", "--method", "lora", "--config", str(recipe)]
    assert subprocess.run(command, capture_output=True, env=os.environ | {"NUM_PROCESSES": "1"}).returncode == 1
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings == dataclasses.asdict(
        TrainConfig(model_name_or_path="data/nowhere", output_dir=str(run), method="lora")
    )


def test_deepspeed_configuration_that_is_none(train):
    assert "There is no DeepSpeed configuration at zero9.json" in said(train("ds", deepspeed="zero9.json"))
    path = train.folder / "cut.json"
    path.write_text('{"zero_optimization": {')
    with pytest.raises(TrainingError, match=f"^{path} is not a DeepSpeed configuration in JSON: .*line 1"):
        check(TrainConfig(deepspeed=str(path)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_scheduler_type": "cosin"}, "These settings are refused: cosin is not a valid SchedulerType"),
        ({"report_to": ["nobody"]}, "These settings are refused: nobody is not supported"),
    ],
)
def test_settings_that_a_library_refuses(settings, words, train):
    assert words in said(train("refused", **settings, processes=2))


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("per_device_train_batch_size", 0, 1),
        ("train_batch_size", 0, 1),
        ("gradient_accumulation_steps", -3, 1),
        ("num_train_epochs", -0.5, 0),
        ("learning_rate", -1e-4, 0),
        ("mm_projector_lr", -2e-5, 0),
        ("warmup_steps", -0.03, 0),
        ("weight_decay", -0.1, 0),
        ("seed", -1, 0),
        ("dataloader_num_workers", -1, 0),
        ("model_max_length", 0, 1),
        ("logging_steps", 0, 1),
        ("eval_batch_size", 0, 1),
        ("eval_max_new_tokens", 0, 1),
    ],
)
def test_numbers_out_of_range(name, value, least):
    with pytest.raises(TrainingError, match=f"^{name} is {value} and has to be at least {least}$"):
        check(TrainConfig(**{name: value}))
    check(TrainConfig(**{name: least * 16}))  # 0, or as many as a batch has by default


def test_questions_without_their_pictures_are_told_at_once(tmp_path, mixture):
    """Before the mixture or the model is looked at, with the name of the setting."""
    questions = tmp_path / "questions.json"
    questions.write_text((mixture / "eval.json").read_text())
    with pytest.raises(DataError, match=f"--eval_image_folder says where .* start \\(now {tmp_path}\\)"):
        load_questions(questions)
    assert load_questions(questions, mixture)


def test_a_folder_with_braces_in_its_name(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path / "{seed}-{method}"))
    assert choose_run(config) == tmp_path / "{seed}-fura"


def test_deepspeed_configuration_for_more_gpus(train):
    path = train.folder / "ds8.json"
    path.write_text(json.dumps(json.loads(Path("scripts/zero2.json").read_text()) | {"train_batch_size": 32}))
    line = said(train("more", deepspeed=str(path), processes=2))
    assert f"{path} contradicts the recipe on 2 processes (train_batch_size=32 there, " in line
    assert "=8 here)" in line and '"auto"' in line


def test_batch_that_does_not_divide(train):
    job = train("batch", processes=2, train_batch_size=12)
    assert "train_batch_size 12 is not a multiple of the 8 records that 2 processes take at once" in said(job)


def test_four_bits_under_zero3(train):
    assert "qfura keeps its base in 4 bits" in said(train("four", method="qfura", deepspeed="scripts/zero3.json"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "lora"}, "fp8_backward is for FuRA over a base that is not quantised, and method is lora"),
        ({"method": "qfura"}, "and method is qfura: take --method fura"),
        ({"deepspeed": "zero3"}, "fp8_backward and ZeRO-3 do not go together"),
    ],
)
def test_fp8_that_cannot_be(settings, sentence):
    with pytest.raises(TrainingError, match=sentence):
        check(TrainConfig(fp8_backward=True, **settings))


def test_fp8_for_layers_that_do_not_take_it(llava):
    """This LLaVA is 8 wide."""
    model = LlavaForConditionalGeneration(llava.config).requires_grad_(False)
    with pytest.raises(TrainingError, match="possible in none of the 9 adapted layers .*multiples of 16"):
        prepare(model, TrainConfig(fp8_backward=True), llava)


def test_compiled_layers_under_zero3(train):
    job = train("compiled", compile_layers=True, deepspeed="scripts/zero3.json")
    assert "compile_layers and ZeRO-3 do not go together" in said(job)


def test_checkpoint_of_another_method(train):
    run = train.folder / "other"
    (run / "checkpoint-3").mkdir(parents=True)
    settings = dataclasses.asdict(TrainConfig(**train.recipe, output_dir=str(run), method="lora"))
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    line = said(train("other", method="fura"))
    assert f"{run} holds an interrupted run with another method ('lora' then, 'fura' now)" in line
    assert "choose another --output_dir" in line
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-3", "config.yaml", "lock"]  # nothing is lost


def out_of_memory(config, run) -> str:
    """What is said when the memory runs out in a run."""
    with pytest.raises(TrainingError) as said, advice_on_memory(config, run):
        torch.empty(1 << 60)
    [line] = str(said.value).splitlines()
    return line


def test_out_of_memory(tmp_path):
    config = TrainConfig(method="fura", per_device_train_batch_size=16)
    line = out_of_memory(config, tmp_path)
    assert "16 records of up to 2048 tokens with fura" in line
    for advice in (
        "--per_device_train_batch_size 8",
        "--gradient_checkpointing true",
        "--deepspeed zero3 ",
        "--method qfura",
    ):
        assert advice in line
    assert "output_dir" not in line
    with pytest.raises(RuntimeError, match="shapes"), advice_on_memory(config, tmp_path):  # others are left alone
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_out_of_memory_advises_what_is_accepted(tmp_path):
    compiled = TrainConfig(method="fura", compile_layers=True)
    assert "--deepspeed zero3 --compile_layers false" in out_of_memory(compiled, tmp_path)
    assert "zero3" not in out_of_memory(TrainConfig(method="qlora"), tmp_path)
    assert "qfura" not in out_of_memory(TrainConfig(method="fura", deepspeed="scripts/zero3.json"), tmp_path)
    assert "--per_device_train_batch_size 3 " in out_of_memory(TrainConfig(per_device_train_batch_size=9), tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    line = out_of_memory(TrainConfig(method="fura", per_device_train_batch_size=1), tmp_path)
    assert "try --gradient_checkpointing true, or" in line
    assert "zero3 on several GPUs in another --output_dir" in line
    assert "--method qfura in another --output_dir" in line
    least = TrainConfig(
        method="full",
        per_device_train_batch_size=1,
        gradient_checkpointing=True,
        deepspeed="scripts/zero3_offload.json",
    )
    assert "no other setting saves memory, so take a larger GPU" in out_of_memory(least, tmp_path)


@pytest.mark.parametrize("method", ["fura", "lora"])
def test_target_modules_that_match_nothing(method, train):
    job = train("target", method=method, target_modules="nonsense", processes=2 if method == "fura" else 1)
    assert job.status != 0
    assert f"{method} cannot be set up with these settings: Target modules nonsense not found" in said(job)


def test_answers_of_a_run_with_other_settings_are_not_kept(tmp_path):
    config = TrainConfig(eval_data_path="data/embedded/eval.json")
    answers = tmp_path / "answers-before.jsonl"
    begin(config, tmp_path)
    answers.write_text("")
    begin(dataclasses.replace(config, save_steps=7, gradient_checkpointing=True), tmp_path)
    assert answers.exists()  # they are the same whatever the memory
    begin(dataclasses.replace(config, eval_data_path="other.json"), tmp_path)
    assert not answers.exists()


def test_stopping_passes_over_processes_that_have_ended(tmp_path):
    """A launcher with a child that ended, and that it has not waited for, and one that trains."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import os, subprocess, sys, time\n"
        "ended = subprocess.Popen([sys.executable, '-c', ''])\n"
        "os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)\n"
        "trains = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '-m', 'fura_vlm.cli'])\n"
        "print(trains.pid, flush=True)\n"
        "sys.exit(-trains.wait())\n"
    )
    process = subprocess.Popen([sys.executable, str(launcher)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()  # both are there
    script = f"source scripts/launch.sh && stop_training launcher {process.pid}"
    stop = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert stop.stderr == "" and stop.returncode == 0
    assert process.wait() == signal.SIGTERM


def test_port_in_use(train):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"Port {port} is in use" in said(train("port", env={"MASTER_PORT": str(port)}))


def test_unknown_setting_names_the_nearest(train):
    job = train("typo", learning_rat=1e-3)
    assert job.status != 0
    assert "Did you mean 'learning_rate'?" in re.sub(r"\s+", " ", job.output)


def test_full_disk(train):
    disk = train.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        job = train("full", output_dir=str(disk / "run"), max_steps=2, save_steps=1)
        assert "the disk is full" in said(job)
        assert not list((disk / "run").glob("checkpoint-*"))
    finally:
        subprocess.run(["umount", os.fspath(disk)], check=True)
