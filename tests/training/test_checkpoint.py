"""What an optimizer has to be given after another number of processes wrote its checkpoint, without a run."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from fura_vlm.training.checkpoint import mend_optimizer


class Wrapper:
    """Has its optimizer where DeepSpeed's and accelerate's have theirs."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def loaded(device: str, **flags) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Two groups of one parameter each, stepped, then as DeepSpeed leaves them: one counter, on the CPU, for both, the
    moments with the parameters, and the rate of the first group."""
    parameters = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [p], "lr": rate} for p, rate in zip(parameters, (0.1, 0.2), strict=True)])
    scheduler = LambdaLR(optimizer, lambda step: 0.5)
    step = torch.tensor(7.0)
    for group, parameter in zip(optimizer.param_groups, parameters, strict=True):
        moments = {"exp_avg": torch.ones_like(parameter), "exp_avg_sq": torch.ones_like(parameter)}
        optimizer.state[parameter] = {"step": step, **moments}
        group.update(lr=0.05, initial_lr=0.1, **flags)
    return optimizer, scheduler


# "meta" stands for a GPU here: it is another device than the CPU, and takes no memory.
@pytest.mark.parametrize(
    ("device", "flags", "counter"),
    [
        ("meta", {"fused": True}, "meta"),
        ("meta", {"capturable": True}, "meta"),
        ("meta", {"fused": False}, "cpu"),  # where torch itself keeps it
        ("cpu", {"fused": True}, "cpu"),  # offloaded
    ],
)
@pytest.mark.parametrize("wrapped", [lambda own: own, Wrapper, lambda own: Wrapper(Wrapper(own))])
@pytest.mark.parametrize("groups", ["kept", "emptied"])  # ZeRO-3 leaves its groups without parameters
def test_states_are_where_the_optimizer_wants_them(device, flags, counter, wrapped, groups):
    optimizer, scheduler = loaded(device, **flags)
    if groups == "emptied":
        for group in optimizer.param_groups:
            group["params"] = []
    mend_optimizer(wrapped(optimizer), scheduler)
    assert len(optimizer.state) == 2
    for state in optimizer.state.values():
        assert {name: value.device.type for name, value in state.items()} == {
            "step": counter, "exp_avg": device, "exp_avg_sq": device,
        }  # fmt: skip
    first, second = (state["step"] for state in optimizer.state.values())
    assert first is not second
    if counter == "cpu":
        first += 1
        assert second.item() == 7  # a counter of its own
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.2]
