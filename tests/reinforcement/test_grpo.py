"""Training by reward as a user starts it: what a run leaves, every method, interruption, and what is computed."""

import itertools
import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_model import WORDS
from transformers import AutoModelForCausalLM, AutoTokenizer

from fura_vlm.modelling.config import MergeConfig
from fura_vlm.modelling.merge import merge


@pytest.fixture(scope="module")
def finished(grpo):
    job = grpo("fura", save_steps=1, save_total_limit=3)
    assert job.status == 0, job.output
    return job


def solutions(job) -> list[dict]:
    return [json.loads(line) for line in (job.run / "solutions.jsonl").read_text().splitlines()]


def test_run_folder_is_complete(finished):
    rows = [row for row in finished.metrics() if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert (finished.run / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.run.rglob("*.bin")) and not (finished.run / "adapter" / "tokenizer.json").exists()
    assert json.loads((finished.run / "versions.json").read_text())["trl"]
    unread = round(sum(32 * row["unread"] for row in rows))
    assert f"Of 96 answers {unread} had nothing in them" in (finished.run / "report.md").read_text()
    assert "scripts/eval.sh" in finished.output and "--suite math" in finished.output


def test_an_answer_that_cannot_be_read_is_counted_and_listed(finished):
    [problem] = [json.loads(line) for line in (finished.run / "skipped.jsonl").read_text().splitlines()]
    assert problem["place"] == "record 4" and "it has no answer" in problem["reason"]
    assert "1 of 26 records left out" in finished.output


def test_rewards_are_those_of_the_answers(finished):
    """Of two words: the last one that is a digit is what was answered."""
    seen = []
    for row in solutions(finished):
        assert len(row["answers"]) == 8
        for answer in row["answers"]:
            digits = [word for word in answer["text"].split() if word.isdigit()]
            assert answer["reward"] == float(digits[-1:] == [str(int(float(row["expected"])))]), answer
            seen.append(answer["reward"])
    assert 0 in seen


def test_resumed_run_is_the_uninterrupted_one(grpo, finished):
    """As it was after two steps, it goes on to the same weights and figures, bit for bit."""
    whole = finished.run.with_name("whole")
    finished.run.rename(whole)
    shutil.copytree(whole, finished.run)
    for name in ("adapter", "checkpoint-3"):
        shutil.rmtree(finished.run / name)
    (finished.run / "report.md").unlink()
    again = grpo("fura", save_steps=1, save_total_limit=3)
    assert again.status == 0 and "Continuing where the interrupted run stopped" in again.output, again.output
    weights, expected = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (again.run, whole))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    trained = [name for name in weights if "fura_dR" in name]
    assert trained and any(weights[name].abs().max() > 0 for name in trained)
    for name in ("metrics.jsonl", "solutions.jsonl"):
        texts = [[json.loads(line) for line in (run / name).read_text().splitlines()] for run in (again.run, whole)]
        for row in itertools.chain(*texts):
            for key in [key for key in row if key.startswith("train_") or key == "step_time"]:
                row.pop(key)  # what the clock says
        assert texts[0] == texts[1]


def test_adapter_is_pefts_own_and_merges(finished, small_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(finished.run / "processor")
    inputs = tokenizer("What is 3 and 4 ?", return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    with torch.no_grad():
        plain = base(**inputs).logits
        tuned = PeftModel.from_pretrained(base, finished.run / "adapter")(**inputs).logits
        merge(MergeConfig(str(finished.run), str(tmp_path / "merged")))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(**inputs).logits
    assert (tuned - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, tuned, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "qfura", "qlora"])
def test_every_method_trains(grpo, method):
    job = grpo(method, method=method, max_steps=1, lora_r=4)
    assert job.status == 0, job.output
    assert (job.run / "adapter" / "adapter_model.safetensors").is_file()


def test_gradient_is_that_of_the_formula(grpo, small_model):
    """One question, answers of one token: the mean over answers of (reward - mean reward) log p, by plain torch."""
    job = grpo(
        "full",
        method="full",
        max_steps=1,
        prompts_per_step=1,
        num_generations=16,
        max_completion_length=1,
        temperature=1.5,
        limit=1,
    )
    assert job.status == 0 and (job.run / "model" / "model.safetensors").is_file(), job.output
    [row] = solutions(job)
    texts, rewards = zip(*((answer["text"], answer["reward"]) for answer in row["answers"]), strict=True)
    assert 0 < sum(rewards) < 16  # or there would be nothing to see
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    inputs = tokenizer(row["question"], return_tensors="pt")
    logits = (model(**inputs).logits[0, -1] / 1.5).log_softmax(-1)
    advantages = torch.tensor(rewards) - sum(rewards) / len(rewards)
    # An answer without words was one of the three tokens that have none.
    choices = [[WORDS.index(text)] if text else [0, 1, 2] for text in texts]
    norms = []
    empty = [number for number, text in enumerate(texts) if not text]
    for tokens in itertools.combinations_with_replacement([0, 1, 2], len(empty)):
        chosen = [choice[0] for choice in choices]
        for number, token in zip(empty, tokens, strict=True):  # all of these have the same advantage
            chosen[number] = token
        loss = -(advantages * logits[torch.tensor(chosen)]).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        norms.append(torch.sqrt(sum((g**2).sum() for g in gradients)).item())
    logged = job.metrics()[0]["grad_norm"]
    assert min(abs(norm / logged - 1) for norm in norms) < 1e-4, (norms, logged)


def test_full_under_zero3(grpo, small_model):
    """Where a process holds parts of the weights alone; the count is that of the whole ones."""
    job = grpo("partitioned", method="full", deepspeed="zero3", max_steps=1)
    assert job.status == 0, job.output
    count = AutoModelForCausalLM.from_pretrained(small_model).num_parameters()
    assert f"full trains {count:,} of {count:,} parameters (100.00 %)" in " ".join(job.output.split())
    trained, before = (load_file(folder / "model.safetensors") for folder in (job.run / "model", small_model))
    assert trained.keys() == before.keys() and any(not torch.equal(trained[name], before[name]) for name in trained)


def test_reference_is_the_base(grpo):
    """With beta the divergence is measured from the model with the adapter off: none before the first update."""
    job = grpo("divergence", beta=0.1, max_steps=2)
    assert job.status == 0, job.output
    first, second = [row["kl"] for row in job.metrics() if "kl" in row]
    assert abs(first) < 1e-6 < second


def test_fewer_answers_at_once_take_the_same_questions(grpo, finished):
    job = grpo("parts", rollout_batch_size=16)
    assert job.status == 0, job.output
    assert [row["question"] for row in solutions(job)] == [row["question"] for row in solutions(finished)]


def test_two_processes_take_the_same_questions(grpo, finished):
    job = grpo("two", processes=2, per_device_train_batch_size=8)
    assert job.status == 0, job.output
    assert [row["question"] for row in solutions(job)] == [row["question"] for row in solutions(finished)]
    assert [row["num_tokens"] > 0 for row in job.metrics() if "reward" in row] == [True] * 3


def test_reward_that_says_nothing_is_said(grpo, tmp_path):
    """No answer of two tokens is 12345."""
    path = tmp_path / "hard.json"
    path.write_text(json.dumps([{"question": f"What is {n} ?", "answer": 12345} for n in range(4)]))
    job = grpo("constant", data_path=str(path), max_steps=2)
    assert job.status == 0, job.output
    said = " ".join(job.output.split())
    assert "In the last 2 logged steps the answers to each question all had the same reward (0.00 on average)" in said
    assert "take easier questions" in said and "are cut off" in said
    assert "so nothing is learned" in (job.run / "report.md").read_text()
