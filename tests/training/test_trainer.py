"""What the trainer adds to transformers' own, without a run."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from fura_vlm.data.collator import Collator
from fura_vlm.data.sampler import ModalityLengthSampler
from fura_vlm.modelling.load import load_base, load_family
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.methods import prepare
from fura_vlm.training.trainer import FuraTrainer, set_epoch

ROWS, BATCH = 48, 4
FAMILY = load_family("data/tiny-llava")


def order(loader, epoch) -> list[list[int]]:
    """The batches of an epoch, as the Trainer has them."""
    loader.set_epoch(epoch)
    set_epoch(loader, epoch)
    return list(loader.batch_sampler)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("grouped", [True, False])
def test_records_go_on_where_they_stopped_in_any_epoch(processes, grouped):
    """Of one process or of one of two, by length or at random."""

    def loader():
        sampler = ModalityLengthSampler(np.arange(ROWS) % 7 + 1, np.ones(ROWS, bool), BATCH, processes, seed=1)
        how = {"sampler": sampler} if grouped else {"shuffle": True}
        plain = DataLoader(torch.arange(ROWS), batch_size=BATCH, **how)
        return prepare_data_loader(
            plain, num_processes=processes, process_index=0, use_seedable_sampler=True, data_seed=1
        )

    through = loader()
    epochs = [order(through, epoch) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch, batches in enumerate(epochs):
        assert order(skip_first_batches(loader(), 2), epoch) == batches[2:]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_rates_and_decay_of_parameters(decay, tmp_path):
    """The projector has a rate of its own; biases and norms do not decay, as with transformers' own Trainer."""
    model = prepare(load_base("data/tiny-llava", torch.float32), TrainConfig(method="full"), FAMILY)
    arguments = TrainingArguments(tmp_path, learning_rate=1e-3, weight_decay=decay, use_cpu=True, report_to=[])
    trainer = FuraTrainer(model, arguments, family=FAMILY, mm_projector_lr=2e-4)
    groups = trainer.create_optimizer().param_groups
    assert len(groups) == (4 if decay else 2)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(trained) == sum(len(group["params"]) for group in groups)
    for name, parameter in trained.items():
        rate = 2e-4 if "multi_modal_projector" in name else 1e-3
        assert found[id(parameter)] == (rate, decay if parameter.dim() > 1 else 0.0), name


def test_singular_values_have_a_rate_of_their_own(tmp_path):
    """In the language model and in the projector; without one they have that of the cores beside them."""
    model = prepare(load_base("data/tiny-llava", torch.float32), TrainConfig(), FAMILY)
    arguments = TrainingArguments(tmp_path, learning_rate=1e-3, use_cpu=True, report_to=[])
    for singular in (1e-2, None):
        trainer = FuraTrainer(model, arguments, family=FAMILY, mm_projector_lr=2e-4, singular_values_lr=singular)
        rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                core = 2e-4 if "multi_modal_projector" in name else 1e-3
                of_values = singular or core
                assert rates[id(parameter)] == (of_values if ".fura_ds." in name else core), name
        assert set(rates.values()) == {1e-3, 2e-4} | ({singular} if singular else set())


def test_a_run_that_is_done_takes_no_step_more(tmp_path):
    """Resumed from the checkpoint of its last step, as after an interruption while the report was written."""
    ids = torch.arange(300, 316)
    rows = [{"input_ids": ids, "labels": ids, "pictures": {}}] * 8

    def train(resume_from=None):
        model = prepare(load_base("data/tiny-llava", torch.float32), TrainConfig(), FAMILY)
        arguments = TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant",
            use_cpu=True, report_to=[], disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = FuraTrainer(model, arguments, Collator(FAMILY), rows, family=FAMILY, group_by_modality_length=False)
        trainer.train(resume_from_checkpoint=resume_from)
        assert trainer.state.global_step == 2
        return [p.detach() for p in model.parameters() if p.requires_grad]

    through, resumed = train(), train(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(one, other) for one, other in zip(through, resumed, strict=True))
    assert max(p.abs().max() for p in through) > 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


STEPS = """
import sys
import deepspeed, torch
from fura_vlm.training.trainer import let_the_norm_decide

def steps(ours):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.5, "bf16": {"enabled": True},
        "zero_optimization": {"stage": int(sys.argv[1]), "reduce_bucket_size": 1000},
        "zero_allow_untested_optimizer": True,
    })
    if ours:
        let_the_norm_decide(engine)
        def looked(*_): raise AssertionError("looked at a gradient by itself")
        zero._has_inf_or_nan = looked
    taken = []
    for step in range(4):
        x = torch.full((1, 8), 1.0 + engine.local_rank, dtype=torch.bfloat16)
        if step in (1, 3) and engine.local_rank == (step == 1):
            x[0, step] = float("nan" if step == 1 else "inf")
        before = [p.clone() for p in model.parameters()]
        engine.backward(engine(x).sum())
        engine.step()
        taken.append(not all(map(torch.equal, before, model.parameters())))
    return taken, [p.tolist() for p in model.parameters()]

theirs, ours = steps(False), steps(True)
assert theirs == ours and ours[0] == [True, False, True, False], (theirs, ours)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_with_nan_in_one_process_is_taken_by_none(stage, tmp_path):
    """As DeepSpeed by itself does, and the other steps are the same."""
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    two_processes = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *two_processes, script, str(stage)]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
