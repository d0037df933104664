"""Two real processes: DistributedDataParallel, DeepSpeed ZeRO-2 and ZeRO-3, against one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import LR, STEPS
from fura_models import batch, inputs_for, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from fura_vlm.fura import FuraConfig

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    tiny_llama().save_pretrained(folder / "base")
    other = tiny_llama()
    other.model.layers[1].mlp.up_proj.weight.data.add_(0.01)
    other.save_pretrained(folder / "other")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(HERE / "distributed_worker.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "CUDA_VISIBLE_DEVICES": "",
             "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0 and (folder / "done").exists(), run.stdout[-2000:] + run.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The same training in one process: FuRA's state at the start and after the steps."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), FuraConfig(target_modules="all-linear"))

    def state():
        return {key: value.clone() for key, value in model.state_dict().items() if ".fura_" in key}

    start = state()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=batch(), labels=batch()).loss.backward()
        optimizer.step()
    return start, state()


def agree(found, expected, atol):
    assert found.keys() == expected.keys()
    moved = max(value.abs().max() for key, value in expected.items() if "fura_dR" in key)
    assert moved > 0.5 * LR
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value.float(), rtol=0, atol=atol, msg=lambda m, k=key: f"{k}: {m}")


def test_zero3_starts_from_the_basis_of_one_process(folder, alone):
    """Bit for bit; that one weight at a time is gathered for it, the worker asserts."""
    found, (start, _) = load_file(folder / "zero3_start.safetensors"), alone
    assert found.keys() == start.keys() and len(found) == 14 * 4
    assert all(torch.equal(found[key], start[key]) for key in start)


def test_ddp_trains_as_one_process(folder, alone):
    agree(load_file(folder / "ddp.safetensors"), alone[1], 2e-4)


def test_zero3_trains_saves_and_loads_as_one_process(folder, alone):
    found = load_file(folder / "zero3_loaded.safetensors")
    agree(found, alone[1], 2e-4)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "zero3_adapter")
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items() if key in found)


def test_zero2_trains_as_one_process(folder, alone):
    agree(load_file(folder / "zero2_float32.safetensors"), alone[1], 2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero2_resumes_with_the_basis_it_trained_with(folder, dtype):
    """A checkpoint holds the basis: resuming over one with other signs ends with the same adapter."""
    through, resumed = (load_file(folder / f"zero2_{dtype}{end}.safetensors") for end in ("", "_resumed"))
    assert through.keys() == resumed.keys()
    assert all(torch.equal(through[key], resumed[key]) for key in through)


def test_bfloat16_adapter_computes_in_one_process_what_was_trained(folder):
    """DeepSpeed casts parameters, not buffers: the basis keeps its precision, and so does the file."""
    tensors = load_file(folder / "zero2_bfloat16_adapter" / "adapter_model.safetensors")
    dtypes = {(key.rpartition(".")[2], tensor.dtype) for key, tensor in tensors.items()}
    assert dtypes == {
        ("fura_dR", torch.bfloat16), ("fura_ds", torch.bfloat16),
        ("fura_V", torch.float32), ("fura_s0", torch.float32),
    }  # fmt: skip
    base = LlamaForCausalLM.from_pretrained(folder / "base").eval()
    with torch.no_grad():
        before = base(input_ids=batch(), labels=batch()).loss
        model = PeftModel.from_pretrained(base, folder / "zero2_bfloat16_adapter")
        after = model(input_ids=batch(), labels=batch()).loss
        assert after < before - 0.02
        assert torch.isfinite(model(**inputs_for(model)).logits).all()
