"""The page as a user gets it: a server of its own process, and a Chromium."""

import os

import pytest
import torch
from chat_server import ROOT, TINY, serving
from peft import get_peft_model

from fura_vlm import FuraConfig
from fura_vlm.embedded.scenes import draw, make_scene
from fura_vlm.modelling.load import load_base

os.environ["OMP_NUM_THREADS"] = "1"  # engines keep it
torch.set_num_threads(1)  # the model is small, and threads that wait for each other are slow beside other processes
LAYERS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj|.*multi_modal_projector\.linear_[12]"
ARTEFACTS = ROOT / "runs" / "test-artefacts"


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> str:
    """A run folder. Its adapter is random, so that its answers differ from the base's."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    torch.manual_seed(0)
    config = FuraConfig(target_modules=LAYERS, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(load_base(TINY, torch.float32), config)
    for name, parameter in model.named_parameters():
        if "fura_" in name:
            parameter.data *= 3
    model.save_pretrained(folder / "adapter")
    return str(folder)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> list[str]:
    """Pictures of twenty different scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(20):
        draw(make_scene(7, "eval", number, with_sign=True)).save(folder / f"scene-{number}.png")
    return [str(folder / f"scene-{number}.png") for number in range(20)]


@pytest.fixture(scope="session")
def address(run) -> str:
    with serving("--model", run) as (address, _):
        yield address


@pytest.fixture
def page(browser, address, request):
    """A fresh tab on the chat. It fails if the page asks any other server for something, or throws."""
    context = browser.new_context(viewport=getattr(request, "param", {"width": 1200, "height": 900}))
    context.grant_permissions(["camera"])
    context.set_default_timeout(60_000)
    page = context.new_page()
    foreign, thrown = [], []
    page.on(
        "request", lambda seen: None if seen.url.startswith((address, "data:", "blob:")) else foreign.append(seen.url)
    )
    page.on("pageerror", lambda error: thrown.append(str(error)))
    page.goto(address)
    page.locator("#question textarea").wait_for()
    yield page
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"{request.node.name}.png", full_page=True)
    context.close()
    assert not foreign and not thrown
