"""Tiny models for the tests of the PEFT method."""

import torch
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import fura_vlm  # noqa: F401

torch.set_num_threads(1)

LLAMA = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=99, max_position_embeddings=64,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8,
    patch_size=4, projection_dim=32,
)  # fmt: skip


def tiny_llama(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).to(dtype).eval()


def tiny_neox(dtype=torch.float32, seed=0):
    """A model that is no Llama: fused query/key/value, biases everywhere (made non-zero here)."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
        max_position_embeddings=64,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()


def tiny_gpt2(dtype=torch.float32, seed=0):
    """A model of Conv1D, whose weights are (in, out); biases non-zero."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.ndim == 2:
                parameter.mul_(4)  # else an adapter would not move its answers by what the tests ask
    return model.to(dtype).eval()


def tiny_llava(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**LLAMA), image_token_index=98,
        image_token_id=98,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).to(dtype).eval()


def inputs_for(model):
    """One batch the model takes: ids, and for a LLaVA pictures with their four image tokens each."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 97, (2, 9), generator=generator)
    if hasattr(model.config, "vision_config"):
        ids[:, 1:5] = 98
        pixels = torch.randn(2, 3, 8, 8, generator=generator)
        return {"input_ids": ids, "pixel_values": pixels.to(next(model.parameters()).dtype)}
    return {"input_ids": ids}


LANGUAGE = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
CASES = {
    "llama": (tiny_llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "llava": (tiny_llava, LANGUAGE),
    "neox": (tiny_neox, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "gpt2": (tiny_gpt2, ["c_attn", "c_proj", "c_fc"]),
}


def perturb(model, seed=0, scale=0.05):
    """Give every FuRA parameter a value as training would: away from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fura_dR" in name or "fura_ds" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def batch():
    """Four short texts of ids, for runs whose processes share them."""
    return torch.randint(0, 97, (4, 9), generator=torch.Generator().manual_seed(3))
