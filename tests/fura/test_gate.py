"""A gated MLP whose last Linear is adapted, against the class's own code."""

import pickle

import pytest
import torch
from fura_models import tiny_llama
from peft import get_peft_model
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, MistralConfig, MistralForCausalLM

from fura_vlm.fura import FuraConfig

SMALL = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=50, head_dim=16,
)  # fmt: skip


def adapted(model):
    torch.manual_seed(1)
    config = FuraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], init_weights=False)
    return get_peft_model(model.double(), config).base_model.model.model.layers[0].mlp


def batch(mlp):
    return torch.randn(5, mlp.hidden_size, dtype=torch.float64)


class ClampedSiLU(nn.SiLU):
    def forward(self, x):
        return super().forward(x).clamp(0, 0.1)


@pytest.mark.parametrize("act", [nn.GELU(), ClampedSiLU()])
def test_another_activation_is_taken_at_its_word(act):
    mlp = adapted(tiny_llama())
    x = batch(mlp)
    before = mlp(x)
    assert torch.equal(before, type(mlp).forward(mlp, x))
    mlp.act_fn = act
    assert torch.equal(mlp(x), type(mlp).forward(mlp, x)) and not torch.allclose(mlp(x), before)


def test_hooks_are_given_what_they_always_are():
    mlp = adapted(tiny_llama())
    x = batch(mlp)
    seen = []
    product = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    mlp.act_fn.register_forward_hook(lambda module, args, output: seen.append(output))
    mlp.down_proj.register_full_backward_hook(lambda module, grads, _: seen.append(grads[0]))
    mlp(x).sum().backward()
    activation, gradient = seen
    assert torch.equal(activation * mlp.up_proj(x), product)
    leaf = product.detach().requires_grad_()
    mlp.down_proj.forward(leaf).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


def test_layers_of_other_kinds():
    joined = adapted(MistralForCausalLM(MistralConfig(**SMALL)))
    x = batch(joined)
    assert "forward" in vars(joined) and torch.equal(joined(x), type(joined).forward(joined, x))
    assert "forward" not in vars(adapted(GemmaForCausalLM(GemmaConfig(**SMALL))))


def test_a_copy_by_pickling_forgets_it_and_takes_it_up_again():
    model = get_peft_model(tiny_llama(), FuraConfig(target_modules=["down_proj"], init_weights=False))
    again = pickle.loads(pickle.dumps(model))
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.add_adapter("second", FuraConfig(target_modules=["down_proj", "up_proj"]))
    mlp = again.base_model.model.model.layers[0].mlp
    assert mlp.forward.__func__.__module__ == "fura_vlm.fura.gate"
    assert "forward" not in vars(again.unload().model.layers[0].mlp)


def test_compiled_in_one_graph():
    mlp = adapted(tiny_llama())
    x = batch(mlp)
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), mlp(x))
