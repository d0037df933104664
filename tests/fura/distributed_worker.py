"""Run by test_distributed.py in two processes: python -m torch.distributed.run ... distributed_worker.py
FOLDER.

FOLDER holds the base model in base/; everything to compare is written there by rank 0.
"""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from fura_models import batch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import fura_vlm.fura.adapter
from fura_vlm.fura import FuraConfig, FuraError, FuraLinear
from fura_vlm.training.processes import unlink_shared_memory

STEPS, LR = 4, 1e-2


def fura_state(state):
    return {key: value.float().contiguous().clone() for key, value in state.items() if ".fura_" in key}


def half(rank):
    """This process's half of the batch of four."""
    ids = batch()
    return ids[2 * rank : 2 * rank + 2]


def distributed_data_parallel(folder, rank):
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), FuraConfig(target_modules="all-linear"))
    parallel = DistributedDataParallel(model)
    broadcast = [buffer for buffer in parallel.modules_buffers]
    frozen = {id(b) for name, b in model.named_buffers() if "fura_" in name}
    assert frozen and not any(id(buffer) in frozen for buffer in broadcast)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        parallel(input_ids=half(rank), labels=half(rank)).loss.backward()
        optimizer.step()
    if rank == 0:
        save_file(fura_state(model.state_dict()), folder / "ddp.safetensors")


def engine_of(model, stage, dtype):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine, rank, steps=STEPS):
    for _ in range(steps):
        engine.backward(engine(input_ids=half(rank), labels=half(rank)).loss)
        engine.step()


def zero3(folder, rank):
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    keep = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 2})
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    weights = [p for name, p in base.named_parameters() if "proj" in name]
    assert all(p.numel() == 0 and p.ds_numel > 0 for p in weights)

    whole = []
    decompose = fura_vlm.fura.adapter.decompose

    def watched(*args):
        whole.append(sum(p.ds_status == ZeroParamStatus.AVAILABLE for p in weights))
        return decompose(*args)

    fura_vlm.fura.adapter.decompose = watched
    model = get_peft_model(base, FuraConfig(target_modules="all-linear"))
    assert whole == [1] * 14, whole  # one weight at a time
    assert all(p.numel() == 0 for p in weights)
    if rank == 0:
        save_file(fura_state(model.state_dict()), folder / "zero3_start.safetensors")

    engine = engine_of(model, 3, torch.float32)
    train(engine, rank)
    # what transformers' Trainer does: trainable parameters, and every buffer
    state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    if rank == 0:
        model.save_pretrained(folder / "zero3_adapter", state_dict=state)
    try:
        model.merge_adapter()
    except FuraError as error:
        assert str(error).startswith("model.layers.0.self_attn.q_proj: its weight is partitioned")
    else:
        raise AssertionError("merged a partitioned weight")
    # as TRL merges to generate with another engine: everything gathered, merged, unmerged
    layer = next(m for m in model.modules() if isinstance(m, FuraLinear))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        before = layer.base_layer.weight.data.clone()
        expected = before + layer.get_delta_weight("default")
        model.merge_adapter()
        torch.testing.assert_close(layer.base_layer.weight.data, expected)
        assert not torch.equal(before, expected)
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.weight.data, before)
    assert layer.base_layer.weight.numel() == 0
    dist.barrier()

    # loaded over a partitioned base: the fingerprint of each layer is compared, and nothing decomposed
    whole.clear()
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "zero3_adapter")
    assert not whole
    layer = next(m for m in again.modules() if isinstance(m, FuraLinear))
    assert layer.base_layer.weight.numel() == 0
    if rank == 0:
        save_file(fura_state(again.state_dict()), folder / "zero3_loaded.safetensors")
    try:
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "other"), folder / "zero3_adapter")
    except ValueError as error:
        assert str(error).startswith("model.layers.1.mlp.up_proj: "), error
    else:
        raise AssertionError("loaded over another base")
    fura_vlm.fura.adapter.decompose = decompose
    del keep


def zero2(folder, rank, dtype):
    """Train, checkpoint as the Trainer does, resume from a basis with other signs, and train on."""
    name = f"zero2_{str(dtype).removeprefix('torch.')}"

    def fresh():
        base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        return get_peft_model(base, FuraConfig(target_modules="all-linear"))

    through = fresh()
    engine = engine_of(through, 2, dtype)
    train(engine, rank, 2)
    engine.save_checkpoint(str(folder / name), exclude_frozen_parameters=True)
    train(engine, rank, 2)
    if rank == 0:
        save_file(fura_state(through.state_dict()), folder / f"{name}.safetensors")

    resumed = fresh()
    for module in resumed.modules():
        if isinstance(module, FuraLinear):
            module.fura_V["default"] = -module.fura_V["default"]
    engine = engine_of(resumed, 2, dtype)
    engine.load_checkpoint(str(folder / name), load_module_strict=False)
    train(engine, rank, 2)
    if rank == 0:
        save_file(fura_state(resumed.state_dict()), folder / f"{name}_resumed.safetensors")
        resumed.save_pretrained(folder / f"{name}_adapter")


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    unlink_shared_memory()
    rank = dist.get_rank()
    assert dist.get_world_size() == 2
    distributed_data_parallel(folder, rank)
    zero2(folder, rank, torch.float32)
    zero2(folder, rank, torch.bfloat16)
    zero3(folder, rank)
    if rank == 0:
        (folder / "done").touch()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
