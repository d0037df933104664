"""What a chat loads when it is told, and when it is not."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from chat_server import TINY

from fura_vlm.chat.config import ChatConfig
from fura_vlm.chat.engine import ChatError
from fura_vlm.chat.models import default_model, load_models
from fura_vlm.chat.prompt import Exchange, build_prompt, encode
from fura_vlm.chat.server import serve
from fura_vlm.chat.terminal import chat
from fura_vlm.modelling.load import ModelError, load_adapter, load_base


def test_the_newest_finished_run_is_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(default_model()).samefile(TINY)  # the package's own
    (tmp_path / "data/tiny-llava").mkdir(parents=True)
    assert default_model() == "data/tiny-llava"
    for age, name in enumerate(("new", "old", "unfinished")):
        (tmp_path / "runs" / name / "adapter").mkdir(parents=True)
        if name != "unfinished":
            config = tmp_path / "runs" / name / "adapter" / "adapter_config.json"
            config.write_text("{}")
            os.utime(config, (1000 - age, 1000 - age))
    assert default_model() == "runs/new"


@pytest.fixture(scope="module")
def second(run, tmp_path_factory) -> str:
    """Another adapter over the same base: the run's, half as strong."""
    folder = tmp_path_factory.mktemp("second") / "half"
    model = load_adapter(load_base(TINY, torch.float32), f"{run}/adapter")
    for name, parameter in model.named_parameters():
        if "fura_" in name:
            parameter.data *= 0.5
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("first", ["run", "base"])
def test_several_adapters_over_one_base(run, second, scenes, first):
    """Each answers as it does when it is loaded alone."""
    models = load_models(run, [second]) if first == "run" else load_models(TINY, [run, second])
    labels = [label for label in models.adapters if label != "base"]
    assert labels == ["tuned", "half"] and models.adapters["base"] is None
    inputs = encode(build_prompt([Exchange("What is this?", scenes[0])], models.family, 900), models.family)
    for label, folder in (("tuned", f"{run}/adapter"), ("half", second)):
        alone = load_adapter(load_base(TINY, torch.float32), folder)
        models.model.set_adapter(models.adapters[label])
        with torch.inference_mode():
            torch.testing.assert_close(models.model(**inputs).logits, alone(**inputs).logits)
        assert f"| {label} | FURA | 402,368 |" in models.describe()


def test_an_adapter_of_another_base(run, tmp_path):
    shutil.copytree(f"{run}/adapter", tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign" / "adapter_config.json").read_text())
    key = next(iter(config["base_fingerprint"]))
    config["base_fingerprint"][key] = "0" * len(config["base_fingerprint"][key])
    (tmp_path / "foreign" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not fit"):
        load_models(run, [str(tmp_path / "foreign")])


def test_adapters_that_are_missing_or_cut_off(run, tmp_path):
    shutil.copytree(f"{run}/adapter", tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="The adapter at .*cut does not fit"):
        load_models(run, [str(tmp_path / "cut")])
    with pytest.raises(ModelError, match="No adapter at nowhere"):
        load_models(run, ["nowhere"])
    with pytest.raises(ModelError, match="No adapter at"):
        load_models(run, [str(tmp_path)])


def test_terminal(run, scenes, capsys, monkeypatch):
    models = load_models(run, [])
    inputs = encode(build_prompt([Exchange("What is this?", scenes[0])], models.family, 900), models.family)
    with torch.inference_mode():
        ids = models.model.generate(**inputs, do_sample=False, max_new_tokens=12)
    answer = models.family.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    chat(ChatConfig(image=scenes[0], model=run, question="What is this?", max_new_tokens=12))
    assert capsys.readouterr().out.strip() == answer.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO("<image>\nWhat is this?\n\n"))
    chat(ChatConfig(image=scenes[0], model=run, max_new_tokens=12))
    assert capsys.readouterr().out == f"> There is no question: type one\n> {answer.strip()}\n> "
    with pytest.raises(ChatError, match="at least 1"):
        chat(ChatConfig(image=scenes[0], model=run, max_new_tokens=0))


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("port", 65536, "port is 65536: give a number from 1 to 65535"),
        ("max_users", 0, "max_users is 0: give a number from 1"),
        ("max_waiting", 0, "max_waiting is 0"),
        ("max_new_tokens", 0, "max_new_tokens is 0"),
        ("auth", "anna", "auth must be NAME:PASSWORD"),
        ("auth", "anna:", "auth must be NAME:PASSWORD"),
    ],
)
def test_settings_of_the_page_that_cannot_be(name, value, said):
    with pytest.raises(ChatError, match=said):
        serve(ChatConfig(model="no model is looked for", **{name: value}))
