"""A LLaVA from parts with the published names and files, small and random."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    LlavaForConditionalGeneration,
)

from fura_vlm.modelling.assemble import assemble
from fura_vlm.modelling.config import AssembleConfig
from fura_vlm.modelling.load import ModelError, load_base

WIDE, HIGH = 48, 64


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders ``vicuna`` (pickled weights, as published), ``clip`` (a whole CLIP) and ``mm_projector.bin``."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    trained = json.loads(open("data/tiny-llava/tokenizer.json").read())["model"]
    tokenizer = LlamaTokenizer(vocab=trained["vocab"], merges=[tuple(merge) for merge in trained["merges"]])
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIGH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(llama)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder / "vicuna")
    torch.save(model.state_dict(), folder / "vicuna" / "pytorch_model.bin")
    tokenizer.save_pretrained(folder / "vicuna")
    vision = {"hidden_size": WIDE, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 56, "patch_size": 14}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=32)).save_pretrained(folder / "clip")
    torch.save(
        {
            "model.mm_projector.0.weight": torch.randn(HIGH, WIDE) / 7,
            "model.mm_projector.0.bias": torch.randn(HIGH),
            "model.mm_projector.2.weight": torch.randn(HIGH, HIGH) / 8,
            "model.mm_projector.2.bias": torch.randn(HIGH),
        },
        folder / "mm_projector.bin",
    )
    return folder


def settings(parts, target, **changes) -> AssembleConfig:
    given = {
        "output_dir": str(target),
        "mm_projector": str(parts / "mm_projector.bin"),
        "language_model": str(parts / "vicuna"),
        "vision_tower": str(parts / "clip"),
        "dtype": "float32",
    }
    return AssembleConfig(**given | changes)


def test_it_computes_what_the_parts_compute(parts, tmp_path):
    assemble(settings(parts, tmp_path / "llava"))
    model = load_base(str(tmp_path / "llava"), torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "llava", backend="pil")
    picture = Image.linear_gradient("L").convert("RGB").resize((90, 50))
    inputs = processor(text="USER: <image>\nWhat is this? ASSISTANT:", images=picture, return_tensors="pt")

    # LLaVA by hand: the last but one layer without its class token, two layers with GELU, in the place of <image>.
    clip = CLIPModel.from_pretrained(parts / "clip").eval()
    llama = LlamaForCausalLM.from_pretrained(parts / "vicuna").eval()
    projector = torch.load(parts / "mm_projector.bin", weights_only=True)
    with torch.no_grad():
        seen = clip.vision_model(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][0, 1:]
        weight, bias = (projector[f"model.mm_projector.0.{kind}"] for kind in ("weight", "bias"))
        seen = torch.nn.functional.gelu(seen @ weight.T + bias)
        weight, bias = (projector[f"model.mm_projector.2.{kind}"] for kind in ("weight", "bias"))
        seen = seen @ weight.T + bias
        ids = inputs["input_ids"][0]
        is_image = ids == processor.tokenizer.convert_tokens_to_ids("<image>")
        assert is_image.sum() == 16 == len(seen)
        words = llama.get_input_embeddings()(ids.masked_fill(is_image, 0))
        words[is_image] = seen
        expected = llama(inputs_embeds=words[None]).logits
        found = model(**inputs).logits
    assert torch.allclose(found[..., : expected.shape[-1]], expected, atol=1e-4)


def test_tokens_and_vocabulary_are_llava_hfs(parts, tmp_path):
    assemble(settings(parts, tmp_path / "llava", dtype="bfloat16"))
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", dtype="auto")
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "llava").tokenizer
    known = LlamaConfig.from_pretrained(parts / "vicuna").vocab_size
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [known, known + 1]  # 32000 and 32001
    assert model.config.image_token_index == known and tokenizer.pad_token == "<pad>"
    assert model.get_input_embeddings().weight.shape == (known + -known % 64, HIGH)
    assert model.config.vision_feature_layer == -2 and model.config.image_seq_length == 16
    assert model.dtype == torch.bfloat16
    assert not list((tmp_path / "llava").glob("*.bin"))


def test_parts_that_do_not_fit(parts, tmp_path):
    narrow = torch.load(parts / "mm_projector.bin", weights_only=True)
    narrow["model.mm_projector.0.weight"] = narrow["model.mm_projector.0.weight"][:, :32].clone()
    torch.save(narrow, tmp_path / "narrow.bin")
    torch.save({"model.layers.0": torch.ones(1)}, tmp_path / "other.bin")
    (tmp_path / "cut.bin").write_bytes((parts / "mm_projector.bin").read_bytes()[:900])
    half = tmp_path / "half"
    shutil.copytree(parts / "vicuna", half)
    weights = torch.load(half / "pytorch_model.bin", weights_only=True)
    torch.save({k: v for k, v in weights.items() if "layers.1.mlp" not in k}, half / "pytorch_model.bin")
    foreign = tmp_path / "foreign"
    shutil.copytree(parts / "vicuna", foreign)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"vocab_size": 900}))

    for changes, sentence in (
        ({"mm_projector": str(tmp_path / "narrow.bin")}, r"linear_1.weight is \(64, 32\), but .* need \(64, 48\)"),
        ({"mm_projector": str(tmp_path / "other.bin")}, "holds model.layers.0; wanted model.mm_projector.0.weight"),
        ({"mm_projector": str(tmp_path / "cut.bin")}, "not a whole file of tensors: download it again"),
        ({"mm_projector": str(tmp_path / "none.bin")}, "There is no projector at"),
        ({"language_model": str(half)}, "not a whole language model: 3 weights are missing, first model.layers.1.mlp"),
        ({"language_model": str(foreign)}, "a tokenizer of 766 tokens for a model of 900"),
        ({"vision_tower": str(parts / "vicuna")}, "is a 'llama', where the vision tower has to be"),
    ):
        with pytest.raises(ModelError, match=sentence):
            assemble(settings(parts, tmp_path / "llava", **changes))
    assert not (tmp_path / "llava").exists() and not list(tmp_path.glob("*.tmp"))


def test_projector_trained_at_another_resolution(parts, tmp_path):
    shutil.copy(parts / "mm_projector.bin", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}))
    with pytest.raises(ModelError, match="trained with openai/clip-vit-large-patch14-336, but .* sees 56 pixels"):
        assemble(settings(parts, tmp_path / "llava", mm_projector=str(tmp_path / "mm_projector.bin")))
