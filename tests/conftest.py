"""What tests of several parts share: a browser; a small model of each family; a small Llama tokenizer and, with it,
LLaVA-1.5's family for pictures of 28 x 28 pixels, which take 4 tokens."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlamaConfig, LlamaTokenizer, LlavaConfig

from fura_vlm.families.llava import Llava, make_processor
from fura_vlm.families.vicuna import SYSTEM_PROMPT

# PyTorch's compiler keeps code made for one set of instructions and takes it for another, with wrong results. Where the
# set is chosen by ATEN_CPU_CAPABILITY, each has a folder of its own. An import above has set the variable already.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(
    tempfile.gettempdir(), f"fura-vlm-inductor-{torch.backends.cpu.get_cpu_capability()}"
)
sys.path.append(str(Path(__file__).with_name("families")))  # where the models are made, and what is said to them

WORDS = "USER: ASSISTANT: What is this? A cat Yes No red dog. And that?"


def make_tokenizer(**kwargs) -> LlamaTokenizer:
    """Knows each word of the system prompt and of WORDS as one token, all else as bytes."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, special_tokens=special, show_progress=False)
    bpe.train_from_iterator([f" {SYSTEM_PROMPT} {WORDS}", *WORDS.split()], trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = LlamaTokenizer(vocab=model["vocab"], merges=merges, pad_token="<pad>", add_bos_token=True, **kwargs)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return tokenizer


def make_llava(tokenizer, image_size: int = 28, conversation: str = "v1") -> Llava:
    """Patches are of 14 x 14 pixels."""
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=image_size,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image)
    return Llava(make_processor(tokenizer, image_size, 14), config, conversation=conversation)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def legacy_tokenizer():
    return make_tokenizer(legacy=True)


@pytest.fixture(scope="session")
def llava_of():
    """Makes LLaVA-1.5's family of a tokenizer."""
    return make_llava


@pytest.fixture(scope="session")
def llava(tokenizer):
    return make_llava(tokenizer)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """By the name of a family: a folder with a small random model of it, made once and not to be changed."""
    from family_models import BUILDERS

    made = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if not (made / name).exists():
            BUILDERS[name](made / name)
        return made / name

    return folder


@pytest.fixture(scope="session")
def merged(tmp_path_factory) -> str:
    """The embedded model, in float32, merged with an adapter of random weights, so that it answers otherwise."""
    from peft import get_peft_model

    from fura_vlm import FuraConfig
    from fura_vlm.modelling.config import MergeConfig
    from fura_vlm.modelling.load import load_base
    from fura_vlm.modelling.merge import merge

    folder, base = tmp_path_factory.mktemp("served"), Path(__file__).parents[1] / "data" / "tiny-llava"
    torch.manual_seed(0)
    config = FuraConfig(target_modules=r".*language_model.*_proj", init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(load_base(str(base), torch.float32), config)
    for name, parameter in model.named_parameters():
        if "fura_" in name:
            parameter.data *= 3
    model.save_pretrained(folder / "run" / "adapter")
    merge(MergeConfig(str(folder / "run"), str(folder / "model"), dtype="float32"))
    return str(folder / "model")


@pytest.fixture(scope="session")
def model_server(merged, tmp_path_factory) -> str:
    """The address of a transformers serve with the merged model, and nothing in the cache of the hub."""
    cache = tmp_path_factory.mktemp("hub")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", merged, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    with open(cache / "serve.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from transformers.cli.transformers import main; main()", *command],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (cache / "serve.log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def interpreted():
    """Runs a script that has Triton's interpreter, which must be chosen before Triton is imported, and prints an object
    of JSON a line; returns these by their ``case``."""

    def run(worker: Path, *arguments: object) -> dict[str, dict]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, worker, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return {row.pop("case"): row for row in rows}

    return run


@pytest.fixture(scope="module")
def one_thread():
    """Models as small as these are done before a second one has begun."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def browser():
    """One for all: Playwright's synchronous form runs once in a process."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("no Chromium here: apt-get install chromium, then the tests of the page run too")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)  # a busy machine is slow, and not wrong
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--use-fake-device-for-media-stream",  # a camera that shows a test pattern
                "--use-fake-ui-for-media-stream",
            ],
        )
        yield browser
        browser.close()
