"""A LLaVA from parts with the published names and files, small and random."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
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


def test_a_small_language_model_with_a_tied_head(parts, tmp_path):
    """As SmolLM2 is: its head is the embedding, and its tokenizer begins a text with no token of its own."""
    llama = LlamaForCausalLM.from_pretrained(parts / "vicuna")
    config = LlamaConfig(**llama.config.to_dict() | {"tie_word_embeddings": True})
    tied = LlamaForCausalLM(config).eval()
    tied.save_pretrained(tmp_path / "tied")
    bpe = Tokenizer(models.BPE(vocab={f"w{number}": number for number in range(config.vocab_size)}, merges=[]))
    bare = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="w1", eos_token="w2", unk_token="w0")
    bare.save_pretrained(tmp_path / "tied")
    assert AutoTokenizer.from_pretrained(tmp_path / "tied").encode("x")[:1] != [1]

    assemble(settings(parts, tmp_path / "llava", language_model=str(tmp_path / "tied")))
    model = load_base(str(tmp_path / "llava"), torch.float32).eval()
    ids = torch.tensor([[1, 9, 30, 7]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[..., : config.vocab_size], tied(ids).logits)
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert AutoProcessor.from_pretrained(tmp_path / "llava").tokenizer.encode("x")[:1] == [1]


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


def test_ids_and_vocabulary_of_vicuna(parts, tmp_path):
    """Of 32,000 tokens, as Vicuna has: <image> is 32000, <pad> 32001, and the vocabulary has 32064 rows."""
    shutil.copytree(parts / "vicuna", tmp_path / "vicuna")
    bytes_ = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = bytes_ + [f"\u2581w{number}" for number in range(32_000 - len(bytes_))]
    tokenizer = LlamaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(tmp_path / "vicuna")
    config = LlamaConfig.from_pretrained(parts / "vicuna")
    config.vocab_size = 32_000
    config.save_pretrained(tmp_path / "vicuna")
    weights = torch.load(parts / "vicuna" / "pytorch_model.bin", weights_only=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.randn(32_000, HIGH)
    torch.save(weights, tmp_path / "vicuna" / "pytorch_model.bin")
    assemble(settings(parts, tmp_path / "llava", language_model=str(tmp_path / "vicuna")))
    config = LlavaConfig.from_pretrained(tmp_path / "llava")
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "llava").tokenizer
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == 32_000
    assert config.text_config.pad_token_id == tokenizer.pad_token_id == 32_001
    assert config.text_config.vocab_size == 32_064
    found = load_base(str(tmp_path / "llava"), torch.float32).state_dict()
    for name, part in (
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight",) * 2,
    ):
        assert torch.equal(found[name][:32_000], weights[part])
        torch.testing.assert_close(found[name][32_000:], weights[part].mean(0).expand(64, -1))


def test_sharded_parts_and_another_form_of_the_projector(parts, tmp_path):
    """Vicuna in pickled shards with an index, as published, CLIP in safetensors shards, the projector in safetensors;
    what comes of them is sharded too, and the same."""
    assemble(settings(parts, tmp_path / "once"))
    vicuna = tmp_path / "vicuna"
    shutil.copytree(parts / "vicuna", vicuna)
    weights = torch.load(vicuna / "pytorch_model.bin", weights_only=True)
    (vicuna / "pytorch_model.bin").unlink()
    halves = {
        "pytorch_model-00001-of-00002.bin": list(weights)[::2],
        "pytorch_model-00002-of-00002.bin": list(weights)[1::2],
    }
    for file, names in halves.items():
        torch.save({name: weights[name] for name in names}, vicuna / file)
    index = {name: file for file, names in halves.items() for name in names}
    (vicuna / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    CLIPModel.from_pretrained(parts / "clip").save_pretrained(tmp_path / "clip", max_shard_size="100KB")
    projector = torch.load(parts / "mm_projector.bin", weights_only=True)
    save_file(projector, tmp_path / "mm_projector.safetensors")
    changes = {"language_model": str(vicuna), "vision_tower": str(tmp_path / "clip")}
    changes |= {"mm_projector": str(tmp_path / "mm_projector.safetensors"), "max_shard_size": "200KB"}
    assemble(settings(parts, tmp_path / "again", **changes))
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2
    once, again = (load_base(str(tmp_path / name), torch.float32).state_dict() for name in ("once", "again"))
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)

    second = vicuna / "pytorch_model-00002-of-00002.bin"
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{second} is cut off or damaged: download it again"):
        assemble(settings(parts, tmp_path / "half", **changes))
    second.unlink()
    with pytest.raises(ModelError, match="1 of its 2 files are missing, first pytorch_model-00002-of-00002.bin"):
        assemble(settings(parts, tmp_path / "half", **changes))
    shard = sorted((tmp_path / "clip").glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{shard} is cut off or damaged: download it again"):
        assemble(settings(parts, tmp_path / "half", vision_tower=str(tmp_path / "clip")))
    assert not (tmp_path / "half").exists() and not list(tmp_path.glob("*.tmp"))


def test_without_a_projector_it_is_new(parts, tmp_path, capsys):
    """As stage 1 begins: drawn as torch draws a Linear, the same for the same seed."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assemble(settings(parts, tmp_path / name, mm_projector=None, seed=seed))
    assert "Its projector is new, with random weights: pretrain it (stage 1)" in capsys.readouterr().out
    a, b, c = (load_base(str(tmp_path / name), torch.float32).model.multi_modal_projector for name in "abc")
    for layer in ("linear_1", "linear_2"):
        weight = getattr(a, layer).weight
        assert torch.equal(weight, getattr(b, layer).weight) and not torch.equal(weight, getattr(c, layer).weight)
        bound = weight.shape[1] ** -0.5  # of the uniform distribution that torch.nn.Linear draws from
        assert 0.9 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_parts_that_do_not_fit(parts, tmp_path):
    narrow = torch.load(parts / "mm_projector.bin", weights_only=True)
    narrow["model.mm_projector.0.weight"] = narrow["model.mm_projector.0.weight"][:, :32].clone()
    torch.save(narrow, tmp_path / "narrow.bin")
    torch.save({"model.layers.0": torch.ones(1)}, tmp_path / "other.bin")
    torch.save(dict.fromkeys(narrow, "words"), tmp_path / "words.bin")
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
        ({"mm_projector": str(tmp_path / "other.bin")}, "holds model.layers.0; it needs model.mm_projector.0.weight"),
        ({"mm_projector": str(tmp_path / "words.bin")}, "is not LLaVA's two-layer projector"),
        ({"mm_projector": str(tmp_path / "cut.bin")}, "not a complete file of tensors: download it again"),
        ({"mm_projector": str(tmp_path / "none.bin")}, "There is no projector at"),
        ({"mm_projector": str(parts / "clip" / "model.safetensors")}, "is not LLaVA's two-layer projector: it holds"),
        (
            {"language_model": str(half)},
            "not a complete language model: 3 weights are missing, first model.layers.1.mlp",
        ),
        ({"language_model": str(foreign)}, "a tokenizer of 2046 tokens and a model of 900"),
        ({"max_shard_size": "lots"}, "max_shard_size 'lots' is not a size: give one such as 5GB"),
        ({"vision_tower": str(parts / "vicuna")}, "is a 'llama', but the vision tower has to be"),
    ):
        with pytest.raises(ModelError, match=sentence):
            assemble(settings(parts, tmp_path / "llava", **changes))
    assert not (tmp_path / "llava").exists() and not list(tmp_path.glob("*.tmp"))


def test_projector_trained_at_another_resolution(parts, tmp_path):
    shutil.copy(parts / "mm_projector.bin", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}))
    with pytest.raises(ModelError, match="trained with openai/clip-vit-large-patch14-336, but .* sees 56 pixels"):
        assemble(settings(parts, tmp_path / "llava", mm_projector=str(tmp_path / "mm_projector.bin")))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"mm_vision_tower": null}'])
def test_a_file_beside_the_projector_that_says_nothing(parts, tmp_path, content):
    shutil.copy(parts / "mm_projector.bin", tmp_path)
    (tmp_path / "config.json").write_text(content)
    assemble(settings(parts, tmp_path / "llava", mm_projector=str(tmp_path / "mm_projector.bin")))
    assert (tmp_path / "llava" / "model.safetensors").is_file()
