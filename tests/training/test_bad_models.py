"""Records and models that a family cannot take: training says which and what to do, in a sentence and no traceback."""

import json
import shutil
from pathlib import Path

import pytest
from family_models import BUILDERS, CHATML
from PIL import Image
from test_mistakes import said

from fura_vlm.errors import ModelError
from fura_vlm.modelling.load import load_family

SETTINGS = {"block_size": 8, "max_steps": 1, "warmup_steps": 0, "per_device_train_batch_size": 2}


@pytest.fixture
def folder(train, folder_of):
    """A model of a family, to be spoilt."""

    def make(family: str) -> Path:
        return shutil.copytree(folder_of(family), train.folder / family)

    return make


@pytest.fixture
def train_on(train):
    """Trains a model on records."""

    def run(model: Path, records: list[dict], **settings):
        path = train.folder / "records.json"
        path.write_text(json.dumps(records))
        Image.new("RGB", (60, 40), "red").save(train.folder / "red.png")
        Image.new("RGB", (4, 900), "red").save(train.folder / "thin.png")
        return train("run", data_path=str(path), model_name_or_path=str(model), **SETTINGS, **settings)

    return run


def record(name: str, pictures=(), marks: int | None = None, words: str = "What is this?", **more) -> dict:
    question = [{"type": "image"}] * (len(pictures) if marks is None else marks) + [{"type": "text", "text": words}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "A red dog."}]
    return {"id": name, "images": list(pictures), "messages": turns} | more


GOOD = [record("good", ["red.png"]), record("words"), record("both", ["red.png", "red.png"])]


@pytest.mark.parametrize(
    ("family", "typed"),
    [("qwen2_5_vl", "<|im_end|>"), ("smolvlm", "<row_1_col_1>"), ("gemma3", "<end_of_turn>"), ("internvl", "</img>")],
)
def test_records_that_cannot_be_used_are_listed_each_with_its_reason(family, typed, folder, train_on):
    bad = {
        "fewer": (record("fewer", ["red.png"], marks=2), "1 picture but 2 places for them (parts of the type image"),
        "more": (record("more", ["red.png", "red.png"], marks=1), "2 pictures but 1 place for them (parts"),
        "video": (record("video", videos=["clip.mp4"]), "videos and sound are not used"),
        "typed": (record("typed", words=f"What is {typed} here?"), f"the text has {typed}, a special token"),
    }
    if family == "qwen2_5_vl":
        bad["thin"] = record("thin", ["thin.png"]), "the model takes no picture of 4 x 900 pixels"
    job = train_on(folder(family), GOOD + [item for item, _ in bad.values()])
    assert job.status == 0 and "Traceback" not in job.output, job.output
    rows = [json.loads(line) for line in (job.run / "skipped.jsonl").read_text().splitlines()]
    reasons = {row["record"]: row["reason"] for row in rows}
    assert reasons.keys() == bad.keys()
    for name, (_, reason) in bad.items():
        assert reason in reasons[name] and "\n" not in reasons[name], reasons[name]
    assert all(row["file"].endswith("records.json") and row["place"] for row in rows)


def spoil_template(folder: Path, template: str | None) -> None:
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template: add the file chat_template.jinja that belongs to it"),
        (CHATML.replace("IMAGE", "'<|image_pad|>'").replace("part['text']", "part['text'] | upper"), "changes answers"),
        (CHATML.replace("IMAGE", "''").replace("<|im_end|>", ""), "the model would not learn to stop"),
        (CHATML.replace("IMAGE", "''"), "writes only 0 of 1 pictures"),
        ("{{ messages | length }}" + CHATML, "use a template with {% generation %} around the answers"),
    ],
)
def test_templates_that_will_not_do(template, words, folder, train_on):
    model = folder("qwen2_5_vl")
    spoil_template(model, template)
    job = train_on(model, GOOD[:1])
    assert job.status != 0 and words in said(job)
    assert template is not None or f"{model}: the model's processor has no chat template" in said(job)


@pytest.mark.parametrize("family", [name for name in BUILDERS if name not in ("llava", "text")])
def test_a_processor_of_another_model(family, folder, train_on):
    model = folder(family)
    config = json.loads((model / "config.json").read_text())
    name = next(name for name in ("image_token_id", "image_token_index") if name in config)
    token = config[name]
    (model / "config.json").write_text(json.dumps(config | {name: token - 1}))
    line = said(train_on(model, GOOD))
    assert f"is token {token} in its tokenizer and {token - 1} in its config.json" in line
    assert str(model) in line and "take the processor that was published with this one" in line


@pytest.mark.parametrize(
    ("family", "other", "words"),
    [
        ("gemma3", "internvl", "has a InternVLProcessor, which does not belong to a model of the type gemma3"),
        ("internvl", "qwen2_5_vl", "its processor makes patches of 14 pixels and its config.json has 7"),
        ("text", "smolvlm", "<end_of_utterance> is token 356 of its tokenizer, but its config.json has 355 tokens"),
    ],
)
def test_the_processor_of_another_family(family, other, words, folder, train_on):
    model, kept = folder(other), folder(family)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(kept / name, model / name)
    line = said(train_on(model, GOOD))
    assert str(model) in line and words in line and "take the processor that was published with th" in line


@pytest.mark.parametrize(("family", "other"), [("llava_next", "smolvlm"), ("internvl", "qwen2_5_vl")])
def test_the_processor_of_another_family_with_the_same_numbers(family, other, folder):
    """The id of a picture's token and the size of a patch are the same: the kind of processor tells them apart."""
    model, kept = folder(other), folder(family)
    theirs, config = (json.loads((path / "config.json").read_text()) for path in (model, kept))
    config["image_token_id"] = config["image_token_index"] = theirs["image_token_id"]
    config["vision_config"]["patch_size"] = theirs["vision_config"]["patch_size"]
    for settings in (config, config["text_config"]):
        if "vocab_size" in settings:
            settings["vocab_size"] = 1000
    (model / "config.json").write_text(json.dumps(config))
    found, wanted = (json.loads((path / "processor_config.json").read_text()) for path in (model, kept))
    words = f"^{model} has a {found['processor_class']} where a {wanted['processor_class']} belongs: take the files"
    with pytest.raises(ModelError, match=words):
        load_family(str(model))
    (model / "config.json").write_text(json.dumps(theirs))
    load_family(str(model))


@pytest.mark.parametrize(
    ("family", "file", "changes"),
    [
        ("text", "config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
        ("text", "tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}),
        ("qwen2_5_vl", "processor_config.json", {"processor_class": "Own", "auto_map": {"AutoProcessor": "own.Own"}}),
    ],
)
def test_code_of_a_models_own(family, file, changes, folder, train_on):
    """Neither run nor asked about."""
    model = folder(family)
    (model / "own.py").write_text(f"open({str(model / 'ran')!r}, 'w')\nclass Own: pass\n")
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | changes))
    job = train_on(model, GOOD)
    assert f"{model} brings Python code of its own, which is never run here: use the form of the model" in said(job)
    assert "Do you wish to run" not in job.output and not (model / "ran").exists()
