"""transformers' Trainer, adapted to runs of this project and to instruction tuning."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
from multiprocessing import active_children
from pathlib import Path

from accelerate import PartialState
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints

from fura_vlm.data.sampler import ModalityLengthSampler
from fura_vlm.families.base import Family
from fura_vlm.files import finish
from fura_vlm.fura.layer import singular_values
from fura_vlm.training.checkpoint import WrittenBy, load_buffers, mend_optimizer, remove_universal
from fura_vlm.training.clock import Clock
from fura_vlm.training.loss import positions, train_on_labels_only
from fura_vlm.training.throughput import Meter, Progress


class RunTrainer(Trainer):
    """What all runs share, whatever their loss: separate learning rates for projector, tower and FuRA's singular
    values, complete checkpoints, the order of the records after an interruption.

    Args:
        family: that of the model.
        mm_projector_lr, vision_tower_lr, singular_values_lr: by default the learning rate of all.
        universal: the checkpoint to go on from was written by another number of processes.
    """

    def __init__(
        self,
        *args,
        family: Family,
        mm_projector_lr: float | None = None,
        vision_tower_lr: float | None = None,
        singular_values_lr: float | None = None,
        universal: bool = False,
        clock: Clock | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.family = family
        self.clock = Clock(self.args.device) if clock is None else clock
        self.args.logging_nan_inf_filter = False  # it waits for the device after every batch, and hides a NaN
        self.universal = universal
        self.rates = {"projector": mm_projector_lr, "tower": vision_tower_lr, "singular values": singular_values_lr}
        self._staging = False
        self.add_callback(OptimizerDone(self.clock))

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:  # accelerate would take it from DeepSpeed's configuration, and warn of the 1 here
            self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps

    def _run_epoch(self, model, epoch, train_dataloader, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # or the Trainer takes one step more
            self.control.should_training_stop = True
            return None
        if self.is_deepspeed_enabled:
            let_the_norm_decide(model)
            time_its_steps(model, self.clock)
        set_epoch(train_dataloader, epoch)
        return super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            decayed = {name for name, _ in trained}
            if self.args.weight_decay:  # biases and norms never
                decayed &= set(self.get_decay_parameter_names(self.model))
            part_of = self._parts()
            groups = [
                {
                    "params": [p for name, p in trained if (part_of.get(id(p)), name in decayed) == (part, decays)],
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                    "lr": self.args.learning_rate if self.rates.get(part) is None else self.rates[part],
                }
                for part in (None, *self.rates)
                for decays in (True, False)
            ]
            self.optimizer = cls([group for group in groups if group["params"]], **kwargs)
        return self.optimizer

    def _parts(self) -> dict[int, str]:
        """By the id of a weight, the part it belongs to (projector, tower or FuRA's singular values) if that has its
        own learning rate; a projector may be inside the tower, and singular values in any part."""
        parts = self.family.parts(self.model)
        modules = [("tower", parts.tower)] * (parts.tower is not None) + [("projector", p) for p in parts.projectors]
        found = {id(p): part for part, module in modules for p in module.parameters()}
        if self.rates["singular values"] is not None:
            found |= {id(p): "singular values" for p in singular_values(self.model)}
        return found

    def _load_optimizer_and_scheduler(self, checkpoint):
        """What follows on DeepSpeed's own loading."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self.universal:
            return
        load_buffers(self.model, checkpoint)
        mend_optimizer(self.optimizer, self.lr_scheduler)
        PartialState().wait_for_everyone()
        if self.args.should_save:
            remove_universal(checkpoint)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        # A pickle, and config.yaml says it all. Other processes than the main one have written none.
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _get_output_dir(self, trial):
        run = super()._get_output_dir(trial)
        return os.path.join(run, "saving") if self._staging else run

    def _save_checkpoint(self, model, trial):
        """Saves into ``saving/`` and renames it when every process is done, so that a checkpoint-N is always
        complete."""
        self.clock.mark("other")
        run, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run / "saving", ignore_errors=True)
        PartialState().wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        PartialState().wait_for_everyone()
        if self.args.should_save:
            WrittenBy(self.args.world_size, self.get_total_train_batch_size(self.args)).save(run / "saving" / name)
            finish(run / "saving" / name, run / name)
            shutil.rmtree(run / "saving")
            rotate_checkpoints(output_dir=str(run), save_total_limit=self.args.save_total_limit)
        PartialState().wait_for_everyone()
        self.clock.mark("saving")


class OptimizerDone(TrainerCallback):
    """Where DeepSpeed does not do it amid the backward pass (``time_its_steps``), the optimizer follows on it."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.clock.mark("optimizer")


def time_its_steps(engine, clock: Clock) -> None:
    """Gives the clock the steps of DeepSpeed's engine, which accelerate takes within the backward pass."""
    step = engine.step
    if hasattr(step, "timed"):
        return

    @functools.wraps(step)
    def timed(*args, **kwargs):
        clock.mark("backward")
        done = step(*args, **kwargs)
        clock.mark("optimizer")
        return done

    timed.timed = True
    engine.step = timed


class FuraTrainer(RunTrainer):
    """transformers' Trainer with LLaVA's batches, a loss on the labels only, and figures of its speed."""

    def __init__(self, *args, group_by_modality_length: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.group_by_modality_length = group_by_modality_length
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        train_on_labels_only(model, self.family)
        # Some model classes say that their loss cannot be divided by the labels of all batches and processes. This one
        # can.
        self.model_accepts_loss_kwargs = True
        self.meter = Meter(self.model, self.family, self.args.device)
        if self.pop_callback(ProgressCallback):
            self.add_callback(Progress)

    def get_batch_samples(self, *args, **kwargs):
        self.clock.mark("other" if self.meter.started else "preparing")
        self.meter.start(self.state.global_step)
        batches, items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            self.meter.add(batch)
            # Waits for the device once a step, instead of in every batch while the device computes the one before.
            batch |= positions(batch, self.family.run_id)
        return batches, items

    def compute_loss(self, *args, **kwargs):
        self.clock.mark("data")
        loss = super().compute_loss(*args, **kwargs)
        self.clock.mark("forward")
        return loss

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.clock.mark("backward")
        return loss

    def floating_point_ops(self, inputs):
        """Returns nothing: the Trainer's estimate would count all parameters in every batch, and ``Meter`` counts
        better."""
        return 0

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:  # not the summary at the end
            logs |= self.meter.read(self.state.global_step, self.state.max_steps)
        logs.pop("total_flos", None)
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper reads from it
        if inner.num_workers:
            inner.worker_init_fn = functools.partial(_begin_worker, inner.worker_init_fn)
            atexit.register(_end_workers)
        return loader

    def _get_train_sampler(self, train_dataset=None):
        if not self.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        return ModalityLengthSampler(
            lengths=self.train_dataset.lengths,
            has_image=self.train_dataset.has_image,
            batch_size=self.args.per_device_train_batch_size,
            world_size=self.args.world_size,
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            seed=self.args.seed,
        )


def let_the_norm_decide(engine) -> None:
    """DeepSpeed's ZeRO 1 and 2 look for NaN and Inf twice before a step: in each gradient by itself, with ten small
    kernels for every one, and in their norm, which is finite only if all of them are. For the 452 tensors of a 7B's
    adapter the first takes 0.1 s a step, much of what several GPUs need for the rest of it. So only the norm is
    checked. As before, a step with a bad norm is skipped.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    zero = engine.optimizer
    if isinstance(zero, DeepSpeedZeroOptimizer) and zero.compute_grad_norm and not zero.cpu_offload:
        zero.check_overflow = lambda **_: None


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Tells the sampler below a loader of accelerate's which epoch it is.

    Where one of several processes goes on amid an epoch, there are two wrappers around the sampler, and accelerate and
    the Trainer reach below one: records would come in the order of the first epoch, some twice and others not at all.
    """
    sampler = loader.batch_sampler
    while not hasattr(sampler, "sampler"):
        sampler = sampler.batch_sampler
    if hasattr(sampler.sampler, "set_epoch"):
        sampler.sampler.set_epoch(epoch)


def _begin_worker(begin, number: int) -> None:
    """A cluster sends SIGTERM, and a terminal Ctrl-C, to all processes at once. Then the training is what ends, after
    its checkpoint; it still needs batches for that, and its workers end with it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    begin(number)


def _end_workers() -> None:
    """Python ends what is left of them by SIGTERM, and would wait for ever."""
    for process in active_children():
        if process.daemon:
            process.kill()
