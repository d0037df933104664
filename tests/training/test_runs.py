"""The training command as a user starts it: what a run leaves, many processes, interruption, resumption."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from fura_vlm.evaluation.heldout import exact_match, read_answers
from fura_vlm.fura.layer import FuraLayer
from fura_vlm.modelling.load import load_any

REAL = Path(__file__).parents[3] / "shared" / "real" / "real_mixture.json"


def wait_for(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def weights(job):
    return load_file(job.run / "adapter" / "adapter_model.safetensors")


def assert_same_adapter(one, other, tolerance=0.0):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).abs().max() <= tolerance, name


def test_run_folder_is_complete(uninterrupted):
    run = uninterrupted.run
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["max_steps"] == 6 and config["weight_decay"] == 0.0  # what was given and what was not
    assert json.loads((run / "versions.json").read_text())["deepspeed"]
    assert sorted(uninterrupted.losses()) == [1, 2, 3, 4, 5, 6]
    assert (run / "skipped.jsonl").read_text() == ""
    for picture in ("loss.png", "scores.png", "samples.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events*"))
    assert not list(run.rglob("*.bin"))
    assert isinstance(AutoProcessor.from_pretrained(run / "processor").image_token, str)


def test_table_says_what_the_answers_say(uninterrupted):
    after = exact_match(read_answers(uninterrupted.run / "answers-after.jsonl"))
    table = (uninterrupted.run / "report.md").read_text()
    for family, score in after.items():
        assert f"| {100 * score:.1f} |" in next(line for line in table.splitlines() if line.startswith(f"| {family} "))
    assert "scripts/eval.sh" in uninterrupted.output and "fura-vlm chat" in uninterrupted.output


def test_card_of_the_adapter_says_how_to_ask_it(uninterrupted, capsys):
    """The program in it runs as it stands, once it is told where things are."""
    text = (uninterrupted.run / "adapter" / "README.md").read_text()
    assert ModelCard(text).data.base_model == "data/tiny-llava"
    [program] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    answer = json.loads((uninterrupted.run / "answers-after.jsonl").read_text().splitlines()[0])
    for there, here in (("RUN", uninterrupted.run), ("PICTURE", answer["image"]), ("What is this?", "Which word?")):
        program = program.replace(there, str(here))
    exec(program, {})
    assert "USER: \nWhich word? ASSISTANT:" in capsys.readouterr().out


def test_adapter_is_pefts_own(uninterrupted):
    base = LlavaForConditionalGeneration.from_pretrained("data/tiny-llava")
    model = PeftModel.from_pretrained(base, str(uninterrupted.run / "adapter"))
    adapted = {name for name, module in model.named_modules() if isinstance(module, FuraLayer)}
    assert len(adapted) == 7 * base.config.text_config.num_hidden_layers + 2
    assert not any("vision_tower" in name for name in adapted)
    assert model.peft_config["default"].peft_type == "FURA"


def test_closing_words_are_commands_that_work(uninterrupted, tmp_path):
    words = uninterrupted.output.partition("What next:\n")[2].splitlines()
    [first, *commands] = [line.split() for line in words if line.startswith("  ")]
    assert first == ["bash", "scripts/eval.sh", str(uninterrupted.run)]
    assert [command[:2] for command in commands] == [[".venv/bin/fura-vlm", word] for word in ("chat", "merge")]
    few = [*first, "--limit", "2"]  # documents of each task
    done = subprocess.run(few, env=os.environ | {"FURA_VLM_VENV": sys.prefix}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "fura_vlm.cli", *command[1:]],
            input="What is this?\n\n",
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    assert LlavaForConditionalGeneration.from_pretrained(command[-1]).config.image_token_index
    shutil.rmtree(command[-1])


def test_learning_rate_rises_and_falls(uninterrupted):
    rates = [row["learning_rate"] for row in uninterrupted.metrics() if "loss" in row]
    peak = rates.index(max(rates))
    assert rates[0] < 3e-3 and max(rates) == pytest.approx(3e-3) and 0 < peak < 3
    assert rates[peak:] == sorted(rates[peak:], reverse=True) and rates[-1] < 1e-3


def test_finished_run_is_left_alone(uninterrupted, shared_launch):
    job = shared_launch("uninterrupted", max_steps=1)
    assert job.status == 0, job.output
    assert "uninterrupted-2" in job.output
    assert (uninterrupted.run / "report.md").is_file()
    assert len(uninterrupted.losses()) == 6


@pytest.mark.parametrize(("processes", "stage", "accumulation"), [(2, 2, 1), (2, 3, 1), (1, 3, 2), (2, 2, 2)])
def test_however_a_step_is_divided(processes, stage, accumulation, uninterrupted, train):
    """The loss is the mean over all labels of a step, whoever has them: one process under ZeRO-2 says the same."""
    job = train(
        "divided",
        processes=processes,
        per_device_train_batch_size=4 // processes // accumulation,
        gradient_accumulation_steps=accumulation,
        deepspeed=f"scripts/zero{stage}.json",
    )
    assert job.status == 0, job.output
    alone, together = uninterrupted.losses(), job.losses()
    assert together == pytest.approx(alone, rel=2e-4)
    assert alone[6] < 0.6 * alone[1]  # and it is training that agrees
    assert weights(job).keys() == weights(uninterrupted).keys()


def test_killed_run_resumes_to_the_same_end(uninterrupted, launch, mixture):
    settings = {"save_steps": 2, "eval_data_path": str(mixture / "eval.json"), "report_to": ["tensorboard"]}
    process = launch.start("killed", **settings)
    run = launch.folder / "killed"
    wait_for((run / "checkpoint-4").exists, process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.communicate()
    assert not (run / "adapter").exists()

    job = launch("killed", **settings)
    assert job.status == 0, job.output
    assert f"stopped: {run / 'checkpoint-4'}" in job.output  # it says where it goes on
    assert job.losses() == pytest.approx(uninterrupted.losses(), rel=1e-6)
    assert_same_adapter(job, uninterrupted, 1e-6)


def test_two_runs_do_not_share_a_folder(uninterrupted, launch, train):
    process = launch.start("shared")
    run = launch.folder / "shared"
    wait_for((run / "config.yaml").exists, process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    before = (run / "config.yaml").read_text()
    for member in family:
        member.suspend()
    second = train("shared", processes=2, learning_rate=1e-4)
    for member in family:
        member.resume()
    assert second.status == 1
    assert second.output.count(f"Another run is under way in {run}") == 1 and "--output_dir" in second.output
    assert (run / "config.yaml").read_text() == before
    first = launch.finish(process, "shared")
    assert first.status == 0, first.output
    assert_same_adapter(first, uninterrupted)


@pytest.mark.parametrize(("number", "stage"), [(signal.SIGTERM, 2), (signal.SIGINT, 3)])
def test_signal_saves_first(number, stage, uninterrupted, launch, train):
    settings = {"processes": 2, "per_device_train_batch_size": 2, "deepspeed": f"scripts/zero{stage}.json"}
    settings["dataloader_num_workers"] = 1
    process = launch.start("stopped", **settings)
    run = launch.folder / "stopped"
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 2, process)
    concerned = [psutil.Process(process.pid)]
    if number == signal.SIGTERM:  # as a cluster does; it reaches what loads the data, too
        concerned += concerned[0].children(recursive=True)
    for each in concerned:
        each.send_signal(number)
    stopped = launch.finish(process, "stopped")
    assert stopped.status == 143, stopped.output
    assert "continues from there" in stopped.output and "ERROR" not in stopped.output
    [checkpoint] = run.glob("checkpoint-*")
    step = int(checkpoint.name.rpartition("-")[2])
    assert 2 <= step < 6

    job = train("stopped", **settings)
    assert job.status == 0, job.output
    assert f"stopped: {checkpoint}" in job.output
    assert job.losses() == pytest.approx(uninterrupted.losses(), rel=2e-4)


def test_changed_settings_do_not_resume(uninterrupted, launch, train):
    """But those that leave the result as it is may change."""
    process = launch.start("changed", save_steps=1)
    wait_for((launch.folder / "changed" / "checkpoint-1").exists, process)
    os.kill(process.pid, signal.SIGTERM)
    launch.finish(process, "changed")
    job = train("changed", save_steps=1, learning_rate=1e-4)
    assert job.status != 0
    assert "another learning_rate" in job.output and "output_dir" in job.output
    before = {int(path.name.rpartition("-")[2]) for path in job.run.glob("checkpoint-*")}
    job = train("changed", save_steps=3, save_total_limit=9, gradient_checkpointing=True, dataloader_num_workers=1)
    assert job.status == 0, job.output
    assert job.losses() == pytest.approx(uninterrupted.losses(), rel=1e-5)
    saved = {int(path.name.rpartition("-")[2]) for path in job.run.glob("checkpoint-*")}
    assert saved == before | {3, 6}  # the new save_steps, not those of the checkpoint


@pytest.mark.parametrize("method", ["qfura", "lora", "qlora", "dora", "full"])
def test_every_method_trains_and_is_loaded_again(method, train):
    projector = {"lora": "full", "dora": "frozen"}.get(method, "adapter")
    rate = 3e-3 if method == "qfura" else 5e-4  # its cores take a larger one than a LoRA or the weights themselves
    job = train(method, method=method, mm_projector=projector, learning_rate=rate)
    assert job.status == 0, job.output
    losses = job.losses()
    assert losses[6] < losses[1]
    model, processor = load_any(str(job.run))
    trained = load_file(next((job.run / "model" if method == "full" else job.run / "adapter").glob("*.safetensors")))
    assert any("multi_modal_projector" in name for name in trained) == (projector != "frozen")
    assert not any("vision_tower" in name for name in trained) or method == "full"
    base, _ = load_any("data/tiny-llava")
    same = {name: p for name, p in base.named_parameters() if "vision_tower" in name}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.")
        if name in same:  # whatever the method, the tower is as it was
            assert torch.equal(parameter, same.pop(name))
    assert not same


def test_projector_is_pretrained_for_the_next_stage(train, mixture):
    """LLaVA's first stage: from a projector of noise, over captions, to a base that the second stage starts from."""
    base = LlavaForConditionalGeneration.from_pretrained("data/tiny-llava")
    torch.manual_seed(0)
    for parameter in base.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    base.save_pretrained(train.folder / "start")
    AutoProcessor.from_pretrained("data/tiny-llava").save_pretrained(train.folder / "start")
    records = json.loads((mixture / "train.json").read_text())
    captions = [record | {"conversations": record["conversations"][:2]} for record in records if "image" in record]
    (train.folder / "captions.json").write_text(json.dumps(captions + [{**captions[0], "image": None, "id": "bare"}]))
    settings = {"method": "projector", "conversation": "plain", "learning_rate": 1e-2, "mm_projector_lr": None}
    settings |= {"data_path": str(train.folder / "captions.json"), "image_folder": str(mixture)}
    job = train("stage1", model_name_or_path=str(train.folder / "start"), deepspeed="scripts/zero3.json", **settings)
    assert job.status == 0, job.output
    assert job.losses()[6] < 0.8 * job.losses()[1]

    names = {"model.mm_projector.0": "linear_1", "model.mm_projector.2": "linear_2"}
    projector = load_file(job.run / "mm_projector.safetensors")
    assert {name.rpartition(".")[0] for name in projector} == set(names) and len(projector) == 4
    model, _ = load_any(str(job.run))
    merged = dict(model.merge_and_unload().named_parameters())
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, merged[name]) != ("multi_modal_projector" in name), name
    for name, weight in projector.items():
        layer, _, kind = name.rpartition(".")
        assert torch.equal(weight, merged[f"model.multi_modal_projector.{names[layer]}.{kind}"])


def test_options_together(launch, mixture):
    job = launch(
        "options",
        env={"TORCH_LOGS": "recompiles"},
        eval_data_path=str(mixture / "eval.json"),
        max_steps=3,
        gradient_checkpointing=True,
        compile_layers=True,
        bf16=True,
        train_batch_size=4,
        per_device_train_batch_size=2,
        deepspeed="scripts/zero1.json",
    )
    assert job.status == 0, job.output
    assert all(0 < loss < 20 for loss in job.losses().values())
    # Neither for lengths nor for generating; but transformers may wrap the layers of tower and language model in one
    # function, which then has a form for each: without gradients and with.
    again = [line for line in job.output.splitlines() if "Recompiling function" in line]
    assert len(again) <= 1 and job.output.count("grad_mode") == len(again), again
    figures = [row for row in job.metrics() if "loss" in row]
    assert all(row["tokens_per_second"] > 0 and 0 <= row["padding"] < 0.5 for row in figures)
    assert figures[-1]["seconds_left"] == 0 and "tokens/s" in job.output


def test_real_photographs(train):
    if not REAL.is_file():
        pytest.skip("the real mixture is not here")
    job = train("real", data_path=str(REAL), max_steps=4, model_max_length=1024)
    assert job.status == 0, job.output
    losses = job.losses()
    assert losses[4] < losses[1]
