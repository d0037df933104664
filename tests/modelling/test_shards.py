"""Model files of every dtype that their format knows."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fura_vlm.modelling.shards import ModelError, WeightFiles, parameter_names

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz,
    torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.bool,
]  # fmt: skip


def test_every_dtype_of_pytorch_is_read_as_it_was_written(tmp_path):
    written = {}
    for dtype in DTYPES:
        raw = torch.ones(2, 4 * dtype.itemsize, dtype=torch.uint8)
        written[str(dtype)] = raw.view(dtype)
    save_file(written, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    files = WeightFiles(str(tmp_path), "model")
    assert files.tensors.keys() == written.keys()
    for name, tensor in written.items():
        assert files.tensors[name].is_meta
        assert (files.tensors[name].dtype, files.tensors[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(files.read(name).view(torch.uint8), tensor.view(torch.uint8)), name


def write_by_hand(path, dtype, shape, size):
    """A file of the format with one tensor, without the library."""
    header = json.dumps({"odd": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def test_a_dtype_that_pytorch_has_not_is_named(tmp_path):
    write_by_hand(tmp_path / "model.safetensors", "F6_E2M3", [4, 8], 24)
    with pytest.raises(ModelError, match="odd in .*model.safetensors is stored as F6_E2M3, which PyTorch"):
        WeightFiles(str(tmp_path), "model")


def test_a_damaged_file_is_still_called_that(tmp_path):
    write_by_hand(tmp_path / "model.safetensors", "F32", [4, 8], 24)
    with pytest.raises(ModelError, match="cut off or damaged"):
        WeightFiles(str(tmp_path), "model")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_a_quantised_weight_is_no_plain_one(dtype, tmp_path):
    """Its numbers mean nothing without their scales: it is not taken for the weight, whatever its shape."""
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=10,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert parameter_names(model, WeightFiles(str(tmp_path), "Llama")) == {name: name for name in tensors}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=rf"is quantised: {name} is {str(dtype)[6:]} there.*name the model it was made"
    ):
        parameter_names(model, WeightFiles(str(tmp_path), "Llama"))
