"""Merging from files, against PEFT's own merge of the whole model in memory."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, BitsAndBytesConfig, LlavaForConditionalGeneration

from fura_vlm.fura import FuraConfig, export_delta
from fura_vlm.modelling.config import MergeConfig
from fura_vlm.modelling.load import load_base, load_family
from fura_vlm.modelling.merge import merge
from fura_vlm.modelling.shards import ModelError, building

BASE = "data/tiny-llava"
LANGUAGE = r".*language_model\.layers\.[07]\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
PROJECTOR = r".*multi_modal_projector\.linear_[12]"
METHODS = {
    "fura": FuraConfig(target_modules=f"{LANGUAGE}|{PROJECTOR}"),
    "fura_output": FuraConfig(target_modules=LANGUAGE, train_side="output", modules_to_save=["multi_modal_projector"]),
    "fura_delta": FuraConfig(target_modules=f"{LANGUAGE}|{PROJECTOR}"),
    "qfura": FuraConfig(target_modules=f"{LANGUAGE}|{PROJECTOR}"),
    "lora": LoraConfig(target_modules=LANGUAGE, r=8, modules_to_save=["multi_modal_projector"]),
    "lora_bias": LoraConfig(target_modules=f"{LANGUAGE}|{PROJECTOR}", r=8, bias="all"),
    "qlora": LoraConfig(target_modules=f"{LANGUAGE}|{PROJECTOR}", r=8),
    "dora": LoraConfig(target_modules=f"{LANGUAGE}|{PROJECTOR}", r=8, use_dora=True),
}


def train_a_little(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.fixture(scope="module", params=list(METHODS))
def adapter(request, tmp_path_factory):
    """The folder of an adapter that does something."""
    folder = tmp_path_factory.mktemp(request.param)
    four_bits = None
    if request.param.startswith("q"):
        pytest.importorskip("bitsandbytes")
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=["vision_tower", "multi_modal_projector"],
        )
    base = load_base(BASE, torch.float32, quantization_config=four_bits)
    model = get_peft_model(base, copy.deepcopy(METHODS[request.param]))
    train_a_little(model)
    if request.param == "fura_delta":
        export_delta(model, folder)
    else:
        model.save_pretrained(folder)
    return folder


def merged_by_peft(adapter) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(load_base(BASE, torch.float32), str(adapter)).merge_and_unload()
    return model.state_dict()


def test_it_is_pefts_merge_written_in_shards(adapter, tmp_path):
    target = tmp_path / "merged"
    settings = {"model": str(adapter), "output_dir": str(target), "dtype": "float32"}
    merge(MergeConfig(**settings, max_shard_size="5MB"))
    assert len(list(target.glob("model-*.safetensors"))) > 5
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        weight.nbytes for file in target.glob("*.safetensors") for weight in load_file(file).values()
    )
    model, info = LlavaForConditionalGeneration.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.float32
    expected = merged_by_peft(adapter)
    assert model.state_dict().keys() == expected.keys()
    moved = 0
    base = load_base(BASE, torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        moved += not torch.equal(weight, base[name])
    assert moved >= 14  # seven linears of two layers
    assert model.generation_config.pad_token_id == 2046
    pixels, wanted = (
        AutoProcessor.from_pretrained(path, backend="pil").image_processor.to_dict() for path in (target, BASE)
    )
    assert pixels == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("adapter", ["fura", "lora"], indirect=True)
def test_in_the_dtype_of_the_base_it_is_rounded_once(adapter, tmp_path):
    merge(MergeConfig(model=str(adapter), output_dir=str(tmp_path / "merged")))
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16
    base = load_base(BASE, torch.bfloat16).state_dict()
    expected = merged_by_peft(adapter)
    for name, weight in model.state_dict().items():
        if "vision_tower" in name or "norm" in name or "embed" in name:
            assert torch.equal(weight, base[name]), name
        torch.testing.assert_close(weight, expected[name].to(torch.bfloat16), rtol=2**-7, atol=1e-6)


def test_whatever_layout_the_names_are_in(tmp_path):
    """Names as transformers 4.40, 4.52 and 5 have written them load and merge to the same."""
    renamed = {
        "v4": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
        "v5": lambda name: (
            name.replace("language_model.lm_head", "lm_head")
            .replace("language_model.model.", "model.language_model.")
            .replace("vision_tower.", "model.vision_tower.")
            .replace("multi_modal_projector.", "model.multi_modal_projector.")
        ),
    }
    weights = {}
    for file in sorted(os.listdir(BASE)):
        if file.endswith(".safetensors"):
            weights |= load_file(f"{BASE}/{file}")
    get_peft_model(load_base(BASE, torch.float32), copy.deepcopy(METHODS["fura"])).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for layout, rename in renamed.items():
        base = tmp_path / layout
        shutil.copytree(BASE, base, ignore=shutil.ignore_patterns("model*"))
        save_file({rename(name): weight for name, weight in weights.items()}, base / "model.safetensors")
        config["base_model_name_or_path"] = str(base)
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        merge(MergeConfig(model=str(tmp_path / "adapter"), output_dir=str(tmp_path / f"{layout}-merged")))
        assert set(load_file(tmp_path / f"{layout}-merged" / "model.safetensors")) == {rename(name) for name in weights}
        found = load_base(str(tmp_path / f"{layout}-merged"), torch.bfloat16).state_dict()
        for name, weight in load_base(BASE, torch.bfloat16).state_dict().items():
            assert torch.equal(found[name], weight), name  # an untrained adapter changes nothing


MEASURE = """
import sys, threading, time
from pathlib import Path
from fura_vlm.modelling.config import MergeConfig
from fura_vlm.modelling.merge import merge

def anonymous():  # KiB that belong to no file
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
merge(MergeConfig(model=sys.argv[1], output_dir=sys.argv[2], max_shard_size="8MB"))
done = True
watcher.join()
print("MEMORY", (peak - before) * 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="counts memory as Linux does")
def test_memory_is_that_of_a_shard_and_a_layer(tmp_path):
    """A model of many shards: what is allocated stays a fraction of it."""
    config = LlavaForConditionalGeneration.from_pretrained(BASE).config
    config.text_config.num_hidden_layers, config.text_config.hidden_size = 24, 512
    config.text_config.intermediate_size, config.text_config.head_dim = 1408, 128
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="8MB")
    load_family(BASE).processor.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        load_base(str(tmp_path / "base"), torch.bfloat16), LoraConfig(target_modules=LANGUAGE, r=4)
    )
    train_a_little(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    size = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    assert size > 150e6
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "adapter"), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    used = int(done.stdout.partition("MEMORY ")[2])
    assert used < 60e6  # the modules of the model without their weights, a shard of 8 MB, copies of one layer
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 15


@pytest.fixture
def plain(tmp_path):
    """A copy of the base, and an adapter over it."""
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    train = get_peft_model(load_base(str(base), torch.float32), copy.deepcopy(METHODS["fura"]))
    train.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def refused(adapter, tmp_path, sentence):
    with pytest.raises(ModelError, match=sentence):
        merge(MergeConfig(model=str(adapter), output_dir=str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob("*.tmp"))


def test_half_a_base(plain, tmp_path):
    base, adapter = plain
    first, second = sorted(base.glob("*.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    refused(adapter, tmp_path, f"{second} is cut off or damaged: download it again")
    second.unlink()
    refused(adapter, tmp_path, f"1 of its 2 files are missing, first {second.name}: finish the download")
    (base / "model.safetensors.index.json").write_text('{"weight_map": []}')
    refused(adapter, tmp_path, "model.safetensors.index.json is damaged: download it again")
    (base / "model.safetensors.index.json").unlink()
    refused(adapter, tmp_path, f"No weights of a model at {base}")
    first.rename(base / "model.safetensors")
    refused(adapter, tmp_path, r"not a complete model: \d+ weights are missing, first")


def test_another_base(plain, tmp_path):
    base, adapter = plain
    for shard in base.glob("*.safetensors"):
        save_file({name: 1.1 * weight for name, weight in load_file(shard).items()}, shard, {"format": "pt"})
    refused(adapter, tmp_path, "cannot be merged: .*: this base model's weight is not the one the adapter was made for")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 700
    (base / "config.json").write_text(json.dumps(config))
    refused(adapter, tmp_path, r"gate_proj.weight is \(704, 256\) and has to be \(700, 256\)")


def test_a_broken_adapter_leaves_nothing(plain, tmp_path):
    base, adapter = plain
    weights = load_file(adapter / "adapter_model.safetensors")
    last = max(name for name in weights if "fura_dR" in name)
    weights[last].fill_(float("nan"))
    save_file(weights, adapter / "adapter_model.safetensors")
    refused(adapter, tmp_path, "merging default gives NaN or Inf in float32; the adapter is broken")
    (adapter / "adapter_model.safetensors").write_bytes(b"{}")
    refused(adapter, tmp_path, f"The adapter at {adapter} cannot be used")
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, tmp_path, f"The adapter at {adapter} is not complete: adapter_model.safetensors is missing")


def test_a_method_that_cannot_be_merged(tmp_path):
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=8, token_dim=256, num_attention_heads=4
    )
    get_peft_model(load_base(BASE, torch.float32), config).save_pretrained(tmp_path / "adapter")
    refused(tmp_path / "adapter", tmp_path, "of the method PROMPT_TUNING, which cannot be merged")


def test_interrupted_building_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), building(str(tmp_path / "model"), 1) as folder:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.tmp").mkdir()  # one that was killed
    (tmp_path / "model.tmp" / "stale").touch()
    with building(str(tmp_path / "model"), 1) as folder:
        (folder / "config.json").touch()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


def test_no_room(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with (
        pytest.raises(ModelError, match=r"will take \d+\.\d GB and its disk has \d+\.\d GB left: make room"),
        building(str(tmp_path / "model"), 2 * free),
    ):
        pass
    assert not list(tmp_path.iterdir())
