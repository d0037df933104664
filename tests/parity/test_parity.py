"""What is made for LLaVA-1.5 stays as it was when it was frozen, to the bit: tokens, labels, lengths, pixels, reasons,
prompts; and the losses of a run.

    frozen/records-*.txt  a thousand records (varied_records.py) through index, dataset and collator
    frozen/tasks.json     prompts of the benchmarks' tasks
    frozen/chats.json     prompts of ten chats (chats.py)
    frozen/embedded.json  what depends on data/tiny-llava: the tasks' ids by its tokenizer, and the losses
    processor/            the processor that all but the last use: pictures of 56 x 56 pixels, 16 tokens, and a Llama
                          tokenizer of 586 tokens. It was made once and is no part of what may change

The first four depend on no model that could be trained anew. Where the embedded one is, ``freeze.py embedded`` writes
its file. What is called is in parity_calls.py, the only file here that a change of names in the package touches.
"""

from __future__ import annotations

import json

import freeze
import parity_calls
import pytest
import torch
import varied_records

LOSS_TOLERANCE = 1e-4
"""Relative. Kernels for other CPUs add in another order: torch's plain ones (``ATEN_CPU_CAPABILITY=default``), beside
those for AVX2, change the 50 losses by at most 4.3e-6. The rest of the room is for CPUs and libraries not tried."""


def frozen(name: str):
    text = (freeze.FROZEN / name).read_text("utf-8")
    return json.loads(text) if name.endswith(".json") else text


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return varied_records.write_mixture(tmp_path_factory.mktemp("parity") / "varied")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return parity_calls.task_prompts(tmp_path_factory.mktemp("parity"))


def test_the_records_are_those_that_were_frozen(mixture):
    assert parity_calls.digest(mixture.read_bytes()) == frozen("mixture.txt").strip()


@pytest.mark.parametrize("conversation", freeze.CONVERSATIONS)
def test_rows(mixture, conversation):
    expected = frozen(f"records-{conversation}.txt").splitlines()
    made = freeze.records_text(mixture, conversation).splitlines()
    assert len(made) == len(expected) == varied_records.COUNT
    changed = [f"{was}\n{now}" for was, now in zip(expected, made, strict=True) if was != now]
    assert not changed, f"{len(changed)} records are not as they were; the first:\n" + "\n".join(changed[:10])


def test_task_prompts(tasks):
    assert freeze.without_embedded_ids(tasks) == frozen("tasks.json")


def test_task_ids_of_the_embedded_model(tasks):
    assert freeze.embedded_ids(tasks) == frozen("embedded.json")["ids"]


def test_chat_prompts(mixture):
    assert freeze.chat_prompts(mixture) == frozen("chats.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the frozen losses are a CPU's")
def test_losses(tmp_path):
    assert parity_calls.training_losses(tmp_path) == pytest.approx(
        frozen("embedded.json")["losses"], rel=LOSS_TOLERANCE
    )
