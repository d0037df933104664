"""What a LoRA of an adapter loses, against the LoRA that PEFT makes of it."""

import pytest
import torch
from fura_models import CASES, perturb
from peft import convert_to_lora, get_peft_model

from fura_vlm.fura import FuraConfig
from fura_vlm.fura.errors import FuraError
from fura_vlm.fura.update import update_report, update_rows


@pytest.fixture(scope="module")
def model():
    build, targets = CASES["llama"]
    return perturb(get_peft_model(build(), FuraConfig(target_modules=targets)), 0)


@pytest.mark.parametrize("rank", [1, 6, 20])
def test_the_error_is_that_of_the_lora(model, rank):
    report = update_report(model)
    _, state = convert_to_lora(model, rank)
    layers = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    missing, whole = 0.0, 0.0
    for each in report:
        update = layers[each.module].get_delta_weight("default")
        [down] = [value for name, value in state.items() if f"{each.module}.lora_A" in name]
        [up] = [value for name, value in state.items() if f"{each.module}.lora_B" in name]
        lost = float((update - up @ down).norm() / update.norm())
        assert each.lost(rank) == pytest.approx(lost, rel=1e-3) and lost > 0.01
        missing += float((update - up @ down).square().sum())
        whole += float(update.square().sum())
    [[shown, together, *_]] = update_rows(report, [rank])
    assert shown == str(rank) and together == f"{(missing / whole) ** 0.5:.1%}"


def test_numbers_are_counted(model):
    report = update_report(model)
    trained = model.get_nb_trainable_parameters()[0]
    assert sum(each.trained for each in report) == trained
    rows = update_rows(report, [2, 10**6])
    numbers = sum(2 * sum(each.shape) for each in report)
    assert rows[0][4:] == [f"{numbers:,}", f"{numbers / trained:.2f}"]
    assert rows[1][1:3] == ["0.0%", "0.0%"]


def test_nothing_is_lost_of_an_adapter_that_does_nothing():
    build, targets = CASES["llama"]
    model = get_peft_model(build(), FuraConfig(target_modules=targets))
    assert all(each.lost(1) == 0.0 for each in update_report(model))
    assert update_rows(update_report(model), [1])[0][1] == "0.0%"
    with pytest.raises(FuraError, match="no FuRA adapter 'other'"):
        update_report(model, "other")
    assert torch.is_grad_enabled()
