"""What is refused before a run, vLLM's versions, memory that runs out, and the order of the questions."""

import json
import math
from collections import Counter

import pytest
import torch
from trl import GRPOConfig

from fura_vlm.errors import FuraVLMError
from fura_vlm.modelling.load import load_family
from fura_vlm.reinforcement.config import GrpoConfig
from fura_vlm.reinforcement.data import load_questions
from fura_vlm.reinforcement.memory import fewer_rollouts, smaller_batches
from fura_vlm.reinforcement.sampler import PromptSampler
from fura_vlm.reinforcement.settings import check
from fura_vlm.reinforcement.vllm import choose_vllm, fitting

# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_generations": 1}, "num_generations is 1 and has to be at least 2"),
        ({"temperature": 0.0}, "answers to one question have to differ"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"only": "("}, "which is no regular expression"),
        ({"per_device_train_batch_size": 24}, "A step has 256 answers (32 questions, 8 answers each), no mult"),
        ({"rollout_batch_size": 20}, "20 answers written at once are no multiple of 8"),
        ({"rollout_batch_size": 24}, "24 answers written at once are no multiple of 16"),
        ({"rollout_batch_size": 96}, "the 256 answers of a step are no multiple of it: take a divisor"),
        ({"method": "qfura", "deepspeed": "zero3"}, "which ZeRO-3 cannot partition"),
        ({"method": "projector"}, "projector trains no language model"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings, words):
    check(GrpoConfig(), processes=1)
    with pytest.raises(FuraVLMError) as caught:
        check(GrpoConfig(**settings), processes=1)
    assert words in str(caught.value)


def test_processes_share_a_step():
    check(GrpoConfig(), processes=16)
    with pytest.raises(FuraVLMError, match="that 3 processes train on at once"):
        check(GrpoConfig(), processes=3)


@pytest.mark.parametrize(
    ("records", "settings", "words"),
    [
        ([{"question": "What is 1 ?", "answer": 1}], {}, "has 1 questions that can be used, and a step takes 32"),
        ([{"question": "What is 1 ?", "answer": 1}], {"only": "How"}, "no question in which 'How' is found"),
    ],
)
def test_sets_that_are_too_small(records, settings, words, small_model, tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps(records))
    with pytest.raises(FuraVLMError) as caught:
        load_questions(GrpoConfig(data_path=str(path), **settings), load_family(str(small_model)))
    assert words in str(caught.value)


def test_questions_that_cannot_be_used_are_listed(small_model, tmp_path):
    path = tmp_path / "set.json"
    records = [{"question": text, "answer": 1} for text in ("What is 1 ?", "What is <end> ?", "What is " + "1 " * 30)]
    path.write_text(json.dumps([*records, {"text": "What?"}]))
    config = GrpoConfig(data_path=str(path), prompts_per_step=1, max_prompt_length=20, instruction="")
    questions, problems = load_questions(config, load_family(str(small_model)))
    assert [one.messages[0].text for one in questions] == ["What is 1 ?"]
    reasons = {problem.place: problem.reason for problem in problems}
    assert "<end>, a special token" in reasons["record 2"]
    assert "has 32 tokens, and max_prompt_length is 20" in reasons["record 3"]
    assert "it has no text in problem" in reasons["record 4"]


def test_records_beyond_the_limit_are_not_looked_at(small_model, tmp_path):
    """Not even in the place of one that cannot be used."""
    path = tmp_path / "set.json"
    path.write_text(json.dumps([{"question": f"What is {n} ?", "answer": "" if n == 1 else n} for n in range(4)]))
    config = GrpoConfig(data_path=str(path), prompts_per_step=1, limit=2, instruction="")
    questions, problems = load_questions(config, load_family(str(small_model)))
    assert [one.messages[0].text for one in questions] == ["What is 0 ?"] and len(problems) == 1


def test_a_run_with_an_adapter_is_no_base(grpo, small_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(small_model)
    get_peft_model(base, LoraConfig(base_model_name_or_path=str(small_model))).save_pretrained(tmp_path / "adapter")
    job = grpo("over-adapter", model_name_or_path=str(tmp_path))
    assert job.status == 1
    assert f"{tmp_path} is an adapter over {small_model}" in job.output and "merge it first" in job.output


def test_trl_sets_what_the_release_has(tmp_path):
    """No scale, no divergence, one use of each answer: by TRL's own names."""
    made = {field: getattr(GrpoConfig(), field) for field in ("loss_type", "scale_rewards", "beta", "max_grad_norm")}
    theirs = GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **made)
    assert theirs.scale_rewards == "none" and theirs.beta == 0 and theirs.num_iterations == 1


# --------------------------------------------------------------------------------------------------------------- vLLM


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """Makes a version of vLLM be installed, as far as its metadata say."""

    def install(version: str) -> None:
        folder = tmp_path / f"vllm-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_vllm_that_is_not_there(small_model):
    family = load_family(str(small_model))
    assert choose_vllm(GrpoConfig(), family) == (False, "")
    with pytest.raises(FuraVLMError, match=r'vLLM is not installed: pip install "vllm[<>=.,0-9]+", or leave'):
        choose_vllm(GrpoConfig(use_vllm=True), family)


def test_vllm_that_does_not_fit(vllm, small_model):
    vllm("0.9.0")
    assert "0.9.0" not in fitting() and "0.25.0" in fitting()
    with pytest.raises(FuraVLMError, match=r"vLLM 0\.9\.0 is installed, and TRL [0-9.]+ works with vLLM [<>=.,0-9]+: "):
        choose_vllm(GrpoConfig(use_vllm=True), load_family(str(small_model)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_vllm_without_a_gpu(vllm, small_model):
    vllm("0.25.0+cu129")
    assert choose_vllm(GrpoConfig(), load_family(str(small_model))) == (False, "")
    with pytest.raises(FuraVLMError, match="on a GPU, and there is none"):
        choose_vllm(GrpoConfig(use_vllm=True), load_family(str(small_model)))


# ------------------------------------------------------------------------------------------------------------- memory


def test_memory_for_answers():
    """A real failure to allocate; what is advised is possible and is less."""
    config = GrpoConfig()
    for _ in range(4):
        with pytest.raises(FuraVLMError, match="too small to write") as caught, fewer_rollouts(config):
            torch.empty(2**55)
        words = str(caught.value).partition("try ")[2].split()
        before = config.rollout_batch_size or 256
        settings = {name.removeprefix("--"): int(value) for name, value in zip(words[::2], words[1::2], strict=True)}
        config = GrpoConfig(**{"per_device_train_batch_size": config.per_device_train_batch_size} | settings)
        check(config, 1)
        assert config.rollout_batch_size < before
    with (
        pytest.raises(FuraVLMError, match="take shorter ones"),
        fewer_rollouts(GrpoConfig(prompts_per_step=1, num_generations=8, per_device_train_batch_size=8)),
    ):
        torch.empty(2**55)


def test_memory_for_training():
    with pytest.raises(FuraVLMError, match="--per_device_train_batch_size 8 .*--gradient_checkpointing true.*qfura"):
        with smaller_batches(GrpoConfig()):
            torch.empty(2**55)
    with pytest.raises(RuntimeError, match="something else"), smaller_batches(GrpoConfig()):
        raise RuntimeError("something else")


# -------------------------------------------------------------------------------------------------------------- order


def test_each_epoch_asks_whole_steps_of_different_questions():
    sampler = PromptSampler(questions=10, per_step=4, at_once=2, answers=3, repeats=2, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == 2 * 4 * 3 * 2
        assert len(Counter(order)) == 8 and set(Counter(order).values()) == {6}
        for start in range(0, len(order), 12):  # two questions, three answers each, seen twice
            part = order[start : start + 12]
            assert part[:6] == part[6:] and part[:3] == [part[0]] * 3 and part[3:6] == [part[3]] * 3
        orders.append(order)
    assert orders[0] == orders[2] != orders[1]


def test_order_does_not_depend_on_how_many_are_asked_at_once():
    orders = []
    for at_once in (1, 2, 4):
        order = list(PromptSampler(10, 4, at_once, 3, 1, seed=2))
        orders.append([number for number, _ in Counter(order).items()])
    assert orders[0] == orders[1] == orders[2] and math.prod(map(len, orders)) == 8**3
