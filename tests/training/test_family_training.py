"""Training of every family through the command: however many processes, interrupted or not, the same comes out."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from family_models import BUILDERS
from family_talk import PICTURES
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from fura_vlm.modelling.load import load_base

STEPS = 3
SETTINGS = {
    "block_size": 8,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "group_by_modality_length": False,  # so that a process has rows with and without pictures
    "warmup_steps": 0,
}


def record(number: int, pictures: list[str], words: str = "What is this?") -> dict:
    question = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": words}]
    answer = ["A cat.", "three", "A red dog and a cat", "No."][number % 4]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": str(number), "images": pictures, "messages": turns}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory) -> dict[bool, Path]:
    """Records with no, one and two pictures of odd sizes; and, under ``False``, of text alone."""
    folder = tmp_path_factory.mktemp("records")
    for number, image in PICTURES.items():
        image.save(folder / f"{number}.png")
    pictures = [["1.png"], [], ["2.png", "3.png"], [], [], ["3.png"], [], ["2.png"], ["1.png", "2.png"], [], [], []]
    made = {}
    for with_pictures in (True, False):
        made[with_pictures] = folder / f"{'mixed' if with_pictures else 'text'}.json"
        rows = [record(number, some if with_pictures else []) for number, some in enumerate(pictures)]
        made[with_pictures].write_text(json.dumps(rows))
    return made


@pytest.fixture
def train_family(train, folder_of, mixtures):
    def run(family: str, name: str, processes: int = 1, **settings):
        given = {"model_name_or_path": str(folder_of(family)), "data_path": str(mixtures[family != "text"])}
        return train(name, processes, **SETTINGS | given | settings)

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory, mixture, copies, folder_of, mixtures):
    """What other ways to the same end are compared with: one process under ZeRO-2, by family."""
    from conftest import Trainer

    train, done = Trainer(tmp_path_factory.mktemp("alone"), mixture, copies), {}

    def job(family: str):
        if family not in done:
            given = {"model_name_or_path": str(folder_of(family)), "data_path": str(mixtures[family != "text"])}
            done[family] = train(family, **SETTINGS | given)
            assert done[family].status == 0, done[family].output
            assert len(done[family].losses()) == STEPS
        return done[family]

    return job


def assert_same(job, other, tolerance: float) -> None:
    """The losses of all steps and the weights of the adapter."""
    assert job.status == 0, job.output
    assert job.losses() == pytest.approx(other.losses(), rel=1e-4)
    ours, theirs = (load_file(each.run / "adapter" / "adapter_model.safetensors") for each in (job, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("family", list(BUILDERS))
def test_two_processes_are_one(family, stage, alone, train_family):
    job = train_family(family, "two", processes=2, per_device_train_batch_size=2, deepspeed=f"scripts/zero{stage}.json")
    assert_same(job, alone(family), tolerance=2e-4)


@pytest.mark.parametrize("family", list(BUILDERS))
def test_a_resumed_run_is_an_uninterrupted_one(family, alone, train_family):
    job = train_family(family, "killed", save_steps=1, until="checkpoint-1")
    assert job.status == -9 and not (job.run / "adapter").exists(), job.output
    job = train_family(family, "killed", save_steps=1)
    assert f"stopped: {job.run / 'checkpoint-1'}" in job.output, job.output  # it says where it goes on
    assert_same(job, alone(family), tolerance=0.0)


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl", "smolvlm"])
def test_a_run_under_zero3_goes_on_as_if_it_had_not_stopped(family, train_family):
    """From its first checkpoint: ZeRO-3 fetches weights in the order of the last step, which another one with more or
    fewer pictures may not have."""
    settings = {"save_steps": 1, "save_total_limit": STEPS, "deepspeed": "scripts/zero3.json"}
    job = train_family(family, "run", **settings)
    assert job.status == 0, job.output
    losses, whole = job.losses(), load_file(job.run / "adapter" / "adapter_model.safetensors")
    (job.run / "report.md").unlink()  # as if it had been killed after a step
    for path in [job.run / "adapter", *job.run.glob("checkpoint-*")]:
        if path.name != "checkpoint-1":
            shutil.rmtree(path)
    job = train_family(family, "run", **settings)
    assert job.status == 0 and f"stopped: {job.run / 'checkpoint-1'}" in job.output, job.output
    assert job.losses() == losses and len(losses) == STEPS
    resumed = load_file(job.run / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("family", ["text", "smolvlm"])
def test_the_card_of_an_adapter_says_how_to_ask_it(family, alone, folder_of, mixtures, capsys):
    """The program in it runs as it stands, once it is told where things are."""
    run = alone(family).run
    text = (run / "adapter" / "README.md").read_text()
    card = ModelCard(text).data
    assert card.base_model == str(folder_of(family))
    assert card.pipeline_tag == ("text-generation" if family == "text" else "image-text-to-text")
    [program] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for there, here in (("RUN", run), ("PICTURE", mixtures[True].parent / "1.png")):
        program = program.replace(there, str(here))
    names = {}
    exec(program, names)
    assert type(names["base"]).__name__ == (
        "LlamaForCausalLM" if family == "text" else "SmolVLMForConditionalGeneration"
    )
    assert "What is this?" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "smolvlm"])
@pytest.mark.parametrize("tower", ["adapter", "full"])
def test_the_tower_is_trained_at_its_own_rate(tower, family, train_family, folder_of):
    """With a rate of nothing it stays as it was; the language model learns meanwhile. With a rate it does not stay."""
    base = load_base(str(folder_of(family)), torch.float32).state_dict()

    def stayed(name: str, value: torch.Tensor) -> bool:
        before = base.get(name.removeprefix("base_model.model."))  # of an adapter: what changes begins as zero
        return torch.equal(value, before) if before is not None else not value.any()

    for rate in (0.0, 1e-3):
        job = train_family(family, f"rate-{rate}", vision_tower=tower, vision_tower_lr=rate)
        assert job.status == 0, job.output
        saved = load_file(job.run / "adapter" / "adapter_model.safetensors")
        learnt = {name: value for name, value in saved.items() if name in base or "fura_d" in name or tower == "full"}
        seeing = {name for name in learnt if ".vis" in name and ".merger" not in name and ".deepstack" not in name}
        assert seeing and all(stayed(name, learnt[name]) for name in seeing) == (rate == 0)
        assert not all(stayed(name, learnt[name]) for name in learnt if ".vis" not in name)
