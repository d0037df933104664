"""The figures of a run's speed, against torch's own count of operations and against counting by hand."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fura_vlm.data.collator import Collator
from fura_vlm.families.base import IGNORE
from fura_vlm.modelling.load import load_base, load_family
from fura_vlm.training.config import TrainConfig
from fura_vlm.training.loss import train_on_labels_only
from fura_vlm.training.methods import prepare
from fura_vlm.training.throughput import Meter, Work, peak_flops

FAMILY = load_family("data/tiny-llava")


def batch(lengths, labels, with_image=True):
    rows = []
    for length in lengths:
        ids = torch.full((length,), 400)
        row = {"input_ids": ids, "labels": torch.full_like(ids, IGNORE), "pictures": {}}
        row["labels"][-labels:] = 400
        if with_image:
            ids[1:65] = FAMILY.run_id
            row["pictures"] = {"pixel_values": torch.zeros(1, 3, 112, 112)}
        rows.append(row)
    return Collator(FAMILY)(rows)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_operations_are_those_that_torch_counts(method):
    model = load_base("data/tiny-llava", torch.float32, "eager")
    model = prepare(model, TrainConfig(method=method, lora_r=16, lora_dropout=0.0), FAMILY)
    work = Work.of(model, FAMILY)
    train_on_labels_only(model if method == "full" else model.get_base_model(), FAMILY)
    rows, length, labels = 4, 200, 100
    with FlopCounterMode(display=False) as counter:
        model.train()(**batch([length] * rows, labels)).loss.backward()
    # Attention without a kernel of its own computes all pairs, also those that the mask rules out.
    asked = work.token * rows * length + 2 * work.token_pair * rows * length**2
    asked += work.picture_token * 64 * rows + work.label * rows * labels
    assert asked == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_frozen_weight_costs_four_operations_and_a_trained_one_six():
    frozen = load_base("data/tiny-llava", torch.float32)
    trained = load_base("data/tiny-llava", torch.float32).requires_grad_(True)
    assert Work.of(trained, FAMILY).token == pytest.approx(1.5 * Work.of(frozen, FAMILY).token)
    assert Work.of(trained, FAMILY).label == pytest.approx(6 * 256 * 2048)


def test_counts_by_hand():
    model = load_base("data/tiny-llava", torch.float32)
    meter = Meter(model, FAMILY, torch.device("cpu"))
    meter.start(step=0)
    meter.add(batch([100, 80], 10))
    meter.add(batch([50, 30], 10, with_image=False))
    counted = dict(zip(meter.COUNTS, meter.counts.tolist(), strict=True))
    assert counted == {
        "tokens": 260,
        "pairs": 100**2 + 80**2 + 50**2 + 30**2,
        "labels": 40,
        "places": 2 * 100 + 2 * 50,
        "rows": 4,
        "pictures": 2 * 64,
    }
    figures = meter.read(step=1, max_steps=4)
    assert figures["padding"] == pytest.approx(40 / 300)
    assert figures["tokens_per_second"] == pytest.approx(65 * figures["samples_per_second"])
    assert "mfu" not in figures and figures["peak_memory_gib"] > 0.05
    assert meter.read(step=2, max_steps=4)["tokens_per_second"] == 0  # counted anew


def test_a_resumed_run_counts_its_own_steps():
    meter = Meter(load_base("data/tiny-llava", torch.float32), FAMILY, torch.device("cpu"))
    meter.start(step=100)
    meter.add(batch([100, 80], 10))
    figures = meter.read(step=102, max_steps=106)
    taken = 2 / figures["samples_per_second"]
    assert figures["seconds_left"] == pytest.approx(taken / 2 * 4)  # two steps took that long, four are left


def test_what_devices_can_do():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L4") == 121e12 and peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("Some other device") is None and peak_flops("NVIDIA A10G") is None


def test_training_without_deepspeed():
    """As benchmarks/pipeline.py does where it is not installed."""
    code = "import sys; sys.modules['deepspeed'] = None; import fura_vlm.training.trainer"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
