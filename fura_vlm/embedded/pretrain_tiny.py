"""Pretrains the embedded model on generated captions and text: ``bash scripts/pretrain_tiny.sh``.

Every step sees new scenes, drawn by the data loader's workers; three rows in four are a picture with true sentences
about it, the fourth is text. All parameters are trained, the loss is on the words. A stopped run goes on from its
last checkpoint. Rows carry no ``<s>``: of two bases, the one pretrained without it learned to follow instructions from
fewer records (README of the model).
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from fura_vlm.embedded.captions import caption, text
from fura_vlm.embedded.scenes import draw, make_other_scene, make_scene
from fura_vlm.embedded.tiny import IMAGE_SIZE, PATCH_SIZE, make_model, train_tokenizer
from fura_vlm.families.llava import make_processor

LENGTH = 192  # tokens a row, image tokens included
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
TEXT_EVERY = 4
OTHER_EVERY = 10  # rows of the training split with a scene of the wider world


class Pretraining(Dataset):
    """Row ``i``: ``input_ids`` and ``labels`` (192,) int64, and for a picture ``pixels`` (3, 112, 112) uint8."""

    def __init__(self, processor, seed: int, rows: int, split: str = "train"):
        self.processor, self.seed, self.rows, self.split = processor, seed, rows, split
        mean = processor.image_processor.image_mean
        self.background = tuple(int(255 * channel) for channel in mean)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.seed}/{self.split}/row/{index}")
        tokenizer = self.processor.tokenizer
        row = {}
        # Half of the rows are cut where the row is full, half end by themselves, so that the model learns to stop.
        whole = rng.random() < 0.5
        if index % TEXT_EVERY == TEXT_EVERY - 1:
            ids = tokenizer(text(rng, rng.randint(1, 8) if whole else 16), add_special_tokens=False).input_ids
            masked = 1
        else:
            other = self.split == "train" and index % OTHER_EVERY == 0
            sign = True if index // TEXT_EVERY % 2 else None  # words are the hardest to see: more than half have one
            scene = make_other_scene(self.seed, index) if other else make_scene(self.seed, self.split, index, sign)
            picture = np.asarray(draw(scene)).transpose(2, 0, 1)
            row["pixels"] = torch.tensor(self.processor.image_processor.pad_to_square(picture, self.background))
            words = tokenizer(
                "<image>\n" + caption(scene, rng, rng.randint(1, 7) if whole else 13), add_special_tokens=False
            ).input_ids
            at = words.index(tokenizer.convert_tokens_to_ids("<image>"))
            ids = words[:at] + [words[at]] * IMAGE_TOKENS + words[at + 1 :]
            masked = at + IMAGE_TOKENS
        ids = (ids + [tokenizer.eos_token_id])[:LENGTH]
        padding = LENGTH - len(ids)
        row["input_ids"] = torch.tensor(ids + [tokenizer.pad_token_id] * padding)
        row["labels"] = torch.tensor([-100] * masked + ids[masked:] + [-100] * padding)
        return row


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
    batch["pixels"] = torch.stack([row["pixels"] for row in rows if "pixels" in row])
    return batch


class PretrainingTrainer(Trainer):
    """Trainer that keeps the rows in order and normalises the pictures on the device."""

    def __init__(self, *args, image_processor, **kwargs):
        super().__init__(*args, **kwargs)
        self.mean, self.std = (
            torch.tensor(value).view(1, 3, 1, 1) for value in (image_processor.image_mean, image_processor.image_std)
        )

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        pixels = inputs.pop("pixels")
        mean, std = self.mean.to(pixels.device), self.std.to(pixels.device)
        inputs["pixel_values"] = (pixels.float() / 255 - mean) / std
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/pretrain-tiny"))
    parser.add_argument("--model_dir", type=Path, default=Path("data/tiny-llava"))
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=14)
    args = parser.parse_args()

    started = time.monotonic()
    set_seed(args.seed)
    tokenizer = train_tokenizer(args.seed)
    processor = make_processor(tokenizer, IMAGE_SIZE, PATCH_SIZE)
    model = make_model(tokenizer)
    cuda = torch.cuda.is_available()
    if cuda:  # layer by layer: all layers of a kind share what is compiled, which the whole model would not
        for layer in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
            layer.compile()
    training = TrainingArguments(
        output_dir=str(args.output_dir),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(300, args.steps // 10),
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=cuda,
        tf32=True if cuda else None,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        dataloader_num_workers=args.workers,
        dataloader_prefetch_factor=4 if args.workers else None,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=50,
        logging_first_step=True,
        save_steps=1000,
        save_total_limit=1,
        report_to="none",
        seed=args.seed,
    )
    trainer = PretrainingTrainer(
        model=model,
        args=training,
        train_dataset=Pretraining(processor, args.seed, args.steps * args.batch),
        eval_dataset=Pretraining(processor, args.seed, 4 * args.batch, split="eval"),
        data_collator=collate,
        image_processor=processor.image_processor,
    )
    last = get_last_checkpoint(str(args.output_dir)) if args.output_dir.is_dir() else None
    if last:
        print(f"Going on from {last}")
    trainer.train(resume_from_checkpoint=last)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    held_out = trainer.evaluate()["eval_loss"]
    minutes = (time.monotonic() - started) / 60

    model.to(torch.bfloat16).save_pretrained(args.model_dir, max_shard_size="12MB")
    processor.save_pretrained(args.model_dir)
    hardware = torch.cuda.get_device_name() if cuda else platform.processor()
    parameters = sum(p.numel() for p in model.parameters())
    (args.model_dir / "pretraining.txt").write_text(
        f"date {time.strftime('%Y-%m-%d')}\nhardware {hardware}\ntorch {torch.__version__}\nparameters {parameters:,}\n"
        f"steps {trainer.state.global_step}\nrows a step {args.batch}\nfirst loss {losses[0]:.4f}\n"
        f"last loss {losses[-1]:.4f}\nheld-out loss {held_out:.4f} (perplexity {math.exp(held_out):.3f})\n"
        f"minutes {minutes:.1f}\nseed {args.seed}\n"
    )
    print((args.model_dir / "pretraining.txt").read_text())


if __name__ == "__main__":
    main()
