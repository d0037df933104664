"""What a path means: a run, an adapter, a model; adapters over another base; merging."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPProcessor,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlavaForConditionalGeneration,
)

from fura_vlm.fura import FuraConfig
from fura_vlm.modelling.config import InspectConfig, MergeConfig
from fura_vlm.modelling.inspect import inspect
from fura_vlm.modelling.load import ModelError, find_parts, load_any, load_base, load_family
from fura_vlm.modelling.merge import merge

BASE = "data/tiny-llava"
TARGETS = r".*language_model.*layers\.[01]\..*(q_proj|down_proj)|.*multi_modal_projector\.linear_1"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that does something, saved by PEFT."""
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(load_base(BASE, torch.float32), FuraConfig(target_modules=TARGETS))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def answer_of(model, processor) -> torch.Tensor:
    """Logits for a picture and a question."""
    picture = Image.linear_gradient("L").convert("RGB").resize((60, 40))
    inputs = processor(text="USER: <image>\nHow many? ASSISTANT:", images=picture, return_tensors="pt")
    with torch.no_grad():
        return model.float()(**inputs).logits


def answer_by(path: str) -> torch.Tensor:
    model, family = load_any(path)
    return answer_of(model, family.processor)


def test_merged_model_answers_as_the_adapter_does(adapter, tmp_path):
    with_adapter = answer_by(str(adapter))
    merge(MergeConfig(model=str(adapter), output_dir=str(tmp_path / "merged"), dtype="float32"))
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    merged = answer_of(plain, AutoProcessor.from_pretrained(tmp_path / "merged", backend="pil"))
    assert torch.allclose(merged, with_adapter, atol=1e-4)
    base = answer_by(BASE)
    assert (with_adapter - base).abs().max() > 0.1  # and the adapter is not idle


def test_merge_overwrites_nothing(adapter, tmp_path):
    with pytest.raises(ModelError, match="exists already: choose another folder"):
        merge(MergeConfig(model=str(adapter), output_dir=str(tmp_path)))
    with pytest.raises(ModelError, match="without an adapter: there is nothing to merge"):
        merge(MergeConfig(model=BASE, output_dir=str(tmp_path / "new")))
    with pytest.raises(ModelError, match="There is neither a run nor an adapter at .*/none: give the folder of one"):
        merge(MergeConfig(model=str(tmp_path / "none"), output_dir=str(tmp_path / "new")))
    with pytest.raises(ModelError, match="max_shard_size 'lots' is not a size: give one such as 5GB"):
        merge(MergeConfig(model=str(adapter), output_dir=str(tmp_path / "new"), max_shard_size="lots"))
    assert not list(tmp_path.iterdir())


def test_adapter_for_another_base_is_refused(tmp_path):
    get_peft_model(load_base(BASE, torch.float32), FuraConfig(target_modules=TARGETS)).save_pretrained(tmp_path / "a")
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    for shard in other.glob("*.safetensors"):
        save_file({name: 1.1 * weight for name, weight in load_file(shard).items()}, shard, {"format": "pt"})
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    with pytest.raises(ModelError, match=r"linear_1: .*load it over the base"):
        load_any(str(tmp_path / "a"))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (None, r"adapter_config.json cannot be read \(Expecting .*\): it is damaged, or of a method"),
        ({"peft_type": "NOPE"}, r"adapter_config.json cannot be read \('NOPE'\): it is damaged, or of a method"),
        ({"base_model_name_or_path": None}, "adapter_config.json names no base: write the folder or hub name"),
    ],
)
def test_an_adapter_config_that_cannot_be_used(tmp_path, changes, sentence):
    get_peft_model(load_base(BASE, torch.float32), FuraConfig(target_modules=TARGETS)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text('{"peft_type": ' if changes is None else json.dumps(config | changes))
    for use in (load_any, find_parts, lambda path: merge(MergeConfig(path, str(tmp_path / "merged")))):
        with pytest.raises(ModelError, match=sentence):
            use(str(tmp_path))


def test_what_a_path_means(tmp_path, monkeypatch):
    run = tmp_path / "run"
    for folder in ("model", "processor"):
        (run / folder).mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    assert find_parts(str(run)) == (str(run / "model"), None, str(run / "processor"))  # all weights were trained
    get_peft_model(load_base(BASE, torch.float32), FuraConfig(target_modules=TARGETS)).save_pretrained(run / "adapter")
    assert find_parts(str(run)) == (BASE, str(run / "adapter"), str(run / "processor"))
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "data/tiny-llava"}))
    project = Path.cwd()
    monkeypatch.chdir(tmp_path)  # where there is no data/
    base = str(project / BASE)
    assert find_parts(str(run)) == (base, str(run / "adapter"), str(run / "processor"))
    assert find_parts(str(run / "adapter")) == (base, str(run / "adapter"), base)
    assert find_parts("llava-hf/llava-1.5-7b-hf") == ("llava-hf/llava-1.5-7b-hf", None, "llava-hf/llava-1.5-7b-hf")


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="the package is there")
def test_a_missing_package_is_named_for_what_it_is():
    with pytest.raises(ModelError, match="^data/tiny-llava cannot be loaded as asked, .*FlashAttention2.*sdpa"):
        load_base(BASE, torch.float32, "flash_attention_2")


def test_interrupted_run_and_half_a_model_say_so(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ModelError, match="interrupted: start its command again"):
        load_any(str(tmp_path))
    half = tmp_path / "half"
    shutil.copytree(BASE, half)
    shard = sorted(half.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"^{shard} is cut off or damaged: download it again"):
        load_any(str(half))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("text_config", {"vocab_size": 4096}, r"lm_head\.weight is \[2048, 256\] in its files and \[4096, 256\]"),
        ("vision_config", {"intermediate_size": 96}, r"fc1\.bias is \[768\] in its files and \[96\]"),
        ("vision_config", {"hidden_size": 100}, r"No usable model .*100\) is not a multiple"),
    ],
)
def test_weights_of_another_model(part, change, words, tmp_path):
    path = tmp_path / "mixed"
    shutil.copytree(BASE, path)
    config = json.loads((path / "config.json").read_text())
    config[part] |= change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words) as error:
        load_base(str(path), torch.float32)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_model_without_sdpa_takes_its_own_attention(tmp_path):
    """Gemma 2 caps its attention's logits, which PyTorch's function cannot."""
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    made = Gemma2ForCausalLM(config)
    made.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    loaded = load_base(str(tmp_path), torch.float32)
    assert torch.equal(loaded.eval()(ids).logits, made.eval()(ids).logits)


def test_a_processor_of_another_family_is_named(tmp_path):
    """As in the folder of a run, without a config.json."""
    own = load_family(BASE).processor
    CLIPProcessor(own.image_processor, own.tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"^{tmp_path} has a CLIPProcessor, but needs a LlavaProcessor"):
        load_family(str(tmp_path), BASE)


@pytest.fixture
def published(tmp_path):
    """The embedded model with the files that llava-hf's checkpoints have for their processor."""
    folder = tmp_path / "published"
    shutil.copytree(BASE, folder)
    (folder / "chat_template.jinja").unlink()
    size = {"height": 112, "width": 112}
    images = {
        "crop_size": size,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_resize": True,
    }
    images |= {"do_rescale": True, "rescale_factor": 1 / 255, "resample": 3, "size": {"shortest_edge": 112}}
    images |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    images |= {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    settings = {"image_token": "<image>", "patch_size": 14, "vision_feature_select_strategy": "default"}
    (folder / "processor_config.json").write_text(json.dumps(settings | {"processor_class": "LlavaProcessor"}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "USER: {{ messages }}"}))
    return folder


def test_published_processor_becomes_llavas(published):
    """It would crop the centre and count one token too few."""
    found, expected = load_family(str(published)).processor, load_family(BASE).processor
    picture = Image.linear_gradient("L").convert("RGB").resize((90, 40))
    one, other = (p(text="<image> a", images=picture, return_tensors="pt") for p in (found, expected))
    assert torch.equal(one["pixel_values"], other["pixel_values"])
    assert torch.equal(one["input_ids"], other["input_ids"]) and (one["input_ids"] == 2047).sum() == 64
    assert found.chat_template == expected.chat_template


def test_processor_of_another_model_is_refused(published):
    config = json.loads((published / "config.json").read_text())
    vision = config["vision_config"]
    (published / "config.json").write_text(json.dumps(config | {"vision_config": vision | {"image_size": 336}}))
    with pytest.raises(ModelError, match="its processor makes pictures of 112 pixels, its vision tower expects 336"):
        load_family(str(published))
    (published / "config.json").write_text(json.dumps(config | {"image_token_index": 32_000}))
    with pytest.raises(ModelError, match="<image> is token 2047 in its tokenizer and 32000 in its config.json"):
        load_family(str(published))
    (published / "config.json").write_text(json.dumps(config | {"vision_feature_select_strategy": "full"}))
    with pytest.raises(ModelError, match="a picture is 64 tokens in its processor and 65 features in its model"):
        load_family(str(published))
    (published / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((published / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<image>"]
    (published / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="its tokenizer has no token <image>: take the tokenizer that was published"):
        load_family(str(published))


def test_inspect_shows_the_spectra_of_the_weights(tmp_path, capsys):
    base = load_base(BASE, torch.float32)
    get_peft_model(base, FuraConfig(target_modules=TARGETS)).save_pretrained(tmp_path)
    inspect(InspectConfig(model=str(tmp_path)))
    weight = LlavaForConditionalGeneration.from_pretrained(BASE, dtype=torch.float64).state_dict()
    weight = next(
        w for name, w in weight.items() if name.endswith("layers.0.self_attn.q_proj.weight") and "lang" in name
    )
    values = torch.linalg.svdvals(torch.stack(weight.split(16, dim=1)))
    printed = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    worst = [float(cells[6]) for cells in printed[1:]]
    assert len(worst) > 3 and worst[:-1] == sorted(worst[:-1], reverse=True) and worst[-1] == worst[0]  # that of all
    row = next("|".join(cells) for cells in printed if "layers.0.self_attn.q_proj" in cells[1])
    blocks, largest, smallest = [cell.strip() for cell in row.split("|")][2:5]
    assert blocks == "16 x 16"
    assert float(largest) == pytest.approx(values.max().item(), rel=5e-3)
    assert float(smallest) == pytest.approx(values.min().item(), rel=5e-3)
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ModelError, match="no FuRA adapter"):
        inspect(InspectConfig(model=BASE))
    with pytest.raises(ModelError, match="x.doc has another format: --output_path must end in .png, .svg or .pdf"):
        inspect(InspectConfig(model=str(tmp_path), output_path="x.doc"))
    with pytest.raises(ModelError, match=r"lora_ranks is \[0\]: give numbers above 0"):
        inspect(InspectConfig(model=str(tmp_path), lora_ranks=[0]))
    capsys.readouterr()
    inspect(InspectConfig(model=str(tmp_path), output_path=str(tmp_path / "new/spectra.svg"), lora_ranks=[3, 5]))
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[-2:]] == ["3", "5"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["spectra.svg"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_without_their_scales_are_not_loaded(dtype, tmp_path):
    folder = shutil.copytree(BASE, tmp_path / "model")
    shard = folder / "model-00002-of-00002.safetensors"
    weights = load_file(shard)
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    save_file(weights | {name: weights[name].to(dtype)}, shard, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"is quantised: {name} is {str(dtype)[6:]} there"):
        load_base(str(folder), torch.float32)


@pytest.mark.parametrize("index", ['{"weight_map": {"a": 5}}', '{"weight_map": {}}', "[]", "{}", "{"])
def test_an_index_that_names_no_files(index, tmp_path):
    folder = shutil.copytree(BASE, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match="index.json is damaged: download it again"):
        load_base(str(folder), torch.float32)


@pytest.mark.parametrize("wrong", [{"dtype": "torch.float16"}, {"dtype": "auto"}, {"quantization_config": "fp8"}])
def test_a_config_that_means_nothing(wrong, tmp_path):
    config = json.loads(Path(BASE, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | wrong))
    with pytest.raises(ModelError, match="config.json cannot be used .*: correct it, or download it again"):
        load_family(str(tmp_path))
