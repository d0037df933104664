"""What the trainer adds to transformers' own, without a run."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from fura_vlm.data.collator import Collator
from fura_vlm.data.sampler import ModalityLengthSampler
from fura_vlm.modelling.load import load_base, load_processor
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.methods import prepare
from fura_vlm.training.trainer import FuraTrainer, set_epoch

ROWS, BATCH = 48, 4


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
    model = prepare(load_base("data/tiny-llava", torch.float32), TrainConfig(method="full"))
    arguments = TrainingArguments(tmp_path, learning_rate=1e-3, weight_decay=decay, use_cpu=True, report_to=[])
    trainer = FuraTrainer(model, arguments, mm_projector_lr=2e-4, group_by_modality_length=True)
    groups = trainer.create_optimizer().param_groups
    assert len(groups) == (4 if decay else 2)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(trained) == sum(len(group["params"]) for group in groups)
    for name, parameter in trained.items():
        rate = 2e-4 if "multi_modal_projector" in name else 1e-3
        assert found[id(parameter)] == (rate, decay if parameter.dim() > 1 else 0.0), name


def test_a_run_that_is_done_takes_no_step_more(tmp_path):
    """Resumed from the checkpoint of its last step, as after an interruption while the report was written."""
    ids = torch.arange(300, 316)
    rows = [{"input_ids": ids, "labels": ids}] * 8

    def train(resume_from=None):
        model = prepare(load_base("data/tiny-llava", torch.float32), TrainConfig())
        arguments = TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant",
            use_cpu=True, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        collator = Collator(load_processor("data/tiny-llava").tokenizer)
        trainer = FuraTrainer(model, arguments, collator, rows, mm_projector_lr=None, group_by_modality_length=False)
        trainer.train(resume_from_checkpoint=resume_from)
        assert trainer.state.global_step == 2
        return [p.detach() for p in model.parameters() if p.requires_grad]

    through, resumed = train(), train(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(one, other) for one, other in zip(through, resumed, strict=True))
    assert max(p.abs().max() for p in through) > 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
