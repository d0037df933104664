"""The wheel, installed where there is no checkout: FuRA by itself, and the command line with its extras.

Nothing is downloaded. An environment gets links to the files of exactly those distributions that the wheel's metadata
declare for its extras, and of what these need in their turn; pip then installs the wheel without an index, and would
refuse if one were lacking.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
OWN = {"PYTHONPATH", "VIRTUAL_ENV"}  # what scripts/env.sh sets


def requirements_of(lines: Iterable[str], extras: Iterable[str]) -> list[Requirement]:
    """Those that hold here and with these extras."""
    found = [Requirement(line) for line in lines]
    cases = ["", *extras]
    return [each for each in found if not each.marker or any(each.marker.evaluate({"extra": case}) for case in cases)]


def closure(name: str, lines: list[str], extras: set[str]) -> set[str]:
    """The distributions that are needed for a package with these requirements, and not the package itself."""
    seen: set[tuple[str, str]] = set()
    queue = [(name, extra) for extra in ["", *extras]]
    while queue:
        package, extra = queue.pop()
        if (package, extra) in seen:
            continue
        seen.add((package, extra))
        needed = requirements_of(lines if package == name else metadata.requires(package) or [], [extra])
        for requirement in needed:
            queue += [(canonicalize_name(requirement.name), each) for each in ["", *requirement.extras]]
    return {package for package, _ in seen} - {name}


class Environment:
    """A virtual environment with some of the packages of the one that the tests run in."""

    def __init__(self, folder: Path):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.packages = next(folder.glob("lib/python*/site-packages"))

    def link(self, names: Iterable[str]) -> None:
        for name in names:
            for file in metadata.distribution(name).files:
                source, target = Path(file.locate()), self.packages / file
                if file.suffix == ".pth" or not source.is_file():
                    continue
                if ".." in file.parts:  # a command
                    if file.parent.name == "bin":
                        shutil.copy(source, self.folder / "bin")
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.is_symlink():
                    target.symlink_to(source)

    def install(self, wheel: Path, extras: str = "") -> None:
        """Of the wheel's own files, and only if all that it declares is there."""
        pip = [sys.executable, "-m", "pip", "--python", self.folder / "bin/python", "--isolated"]
        wanted = f"{wheel}[{extras}]" if extras else str(wheel)
        subprocess.run([*pip, "install", "--quiet", "--no-index", "--force-reinstall", "--no-deps", wheel], check=True)
        subprocess.run([*pip, "install", "--quiet", "--no-index", wanted], check=True)
        subprocess.run([*pip, "check"], check=True, stdout=subprocess.DEVNULL)

    def run(self, where: Path, *command: str, status: int = 0) -> str:
        """What a command of the environment prints, run in a folder that is no checkout."""
        environment = {name: value for name, value in os.environ.items() if name not in OWN}
        environment |= {"PATH": f"{self.folder}/bin:{environment['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
        # In the tests' own folder everybody would compile anew after this: paths are part of what is compiled.
        environment["TORCH_EXTENSIONS_DIR"] = f"{self.folder}/torch_extensions"
        done = subprocess.run(
            [self.folder / "bin" / command[0], *command[1:]],
            cwd=where,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == status, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what is in the checkout; setuptools leaves files where it builds."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("fura_vlm", "scripts", "eval", "data/tiny-llava"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for path in (ROOT / "README.md", ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    for path in (ROOT / "data").glob("*.yaml"):
        shutil.copy(path, folder / "data")
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder / "dist"]
    subprocess.run([sys.executable, "-m", "pip", *build, folder], check=True)
    [built] = (folder / "dist").glob("fura_vlm-*.whl")
    return built


@pytest.fixture(scope="module")
def declared(wheel) -> list[str]:
    """The wheel's requirements."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")


@pytest.fixture(scope="module")
def core(wheel, declared, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("core") / "venv")
    environment.link(closure("fura-vlm", declared, set()))
    environment.install(wheel)
    return environment


@pytest.fixture
def nowhere(tmp_path) -> Path:
    """A folder that is no checkout."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_the_wheel_has_what_people_run_and_nothing_of_theirs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name.removeprefix("fura_vlm/share/") for name in archive.namelist() if "/share/" in name}
        code = [name for name in archive.namelist() if name.endswith(".py")]
        model = archive.read("fura_vlm/share/data/tiny-llava/config.json")
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "scripts").rglob("*") if path.suffix in (".json", ".yaml")}
    there |= {str(path.relative_to(ROOT)) for path in (ROOT / "eval").rglob("*.yaml")}
    there |= {str(path.relative_to(ROOT)) for path in (ROOT / "data").glob("*.yaml")}
    there |= {str(path.relative_to(ROOT)) for path in (ROOT / "data/tiny-llava").iterdir()}
    assert shipped == there and len(there) > 15
    assert model == (ROOT / "data/tiny-llava/config.json").read_bytes()
    assert {name.split("/")[0] for name in code} == {"fura_vlm"}
    assert wheel.stat().st_size < 40e6


def test_the_method_needs_four_packages(declared):
    plain = {requirement.name for requirement in requirements_of(declared, [])}
    assert plain == {"torch", "transformers", "peft", "safetensors"}


def test_all_is_all(declared):
    extras = {"cli", "data", "plots", "train", "quant", "eval", "demo"}
    named = {extra for line in declared for extra in re.findall(r'extra == "([\w-]+)"', line)}
    others = {"dev", "lm-eval", "smollm2", "rl", "server"}  # some tasks, one model, one way to train, one to answer
    assert named == extras | {"all"} | others
    assert closure("fura-vlm", declared, {"all"}) == closure("fura-vlm", declared, extras)


FURA = """
import fura_vlm
from fura_vlm import FuraConfig, FuraModel
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
base = LlamaForCausalLM(config)
base.save_pretrained("base")
model = get_peft_model(base, FuraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
assert isinstance(model.base_model, FuraModel)
ids = torch.arange(24).view(2, 12)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(3):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
tuned = model(input_ids=ids).logits
model.save_pretrained("adapter")
again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter")
torch.testing.assert_close(again(input_ids=ids).logits, tuned)
merged = again.merge_and_unload()
torch.testing.assert_close(merged(input_ids=ids).logits, tuned, rtol=1e-4, atol=1e-4)
print("code in", fura_vlm.__file__)
"""


def test_the_method_alone(core, nowhere):
    absent = ("datasets", "deepspeed", "jsonargparse", "matplotlib", "gradio", "lmms_eval", "__editable__")
    assert not [name for name in absent if list(core.packages.glob(f"{name}*"))]
    assert f"code in {core.packages}" in core.run(nowhere, "python", "-c", FURA)


@pytest.mark.parametrize(
    "arguments, extras",
    [
        ([], "cli"),
        (["train", "--config", "tiny"], "train"),
        (["grpo", "--config", "grpo-tiny"], "rl"),
        (["plan", "llava-1.5-7b"], "cli"),
        (["eval", "runs/tiny-fura"], "eval"),
        (["compare", "a", "b"], "eval"),
        (["chat"], "demo"),
        (["merge", "a", "b"], "cli"),
        (["assemble", "a"], "cli"),
        (["inspect", "a"], "cli,plots"),
        (["data", "embedded"], "data"),
    ],
)
def test_each_command_names_the_extra_that_it_lacks(core, nowhere, arguments, extras):
    said = core.run(nowhere, "fura-vlm", *arguments, status=1)
    name = " ".join(["fura-vlm", *arguments[:1]])
    assert re.fullmatch(rf'{name}: [\w, -]+ are not installed: pip install "fura-vlm\[{extras}\]"\n', said)
    assert "jsonargparse" in said


def test_each_extra_brings_what_its_commands_import(core, wheel, declared, nowhere):
    """One after the other in one environment, the smallest first."""
    core.link(closure("fura-vlm", declared, {"cli"}))
    core.install(wheel, "cli")
    assert "| fura | " in core.run(nowhere, "fura-vlm", "plan", "llava-1.5-7b", "--methods", "[fura]")
    listed = ", ".join(sorted(path.stem for path in (ROOT / "scripts/configs").glob("*.yaml")))
    said = core.run(nowhere, "fura-vlm", "plan", "llava", status=1)
    assert said.startswith("fura-vlm plan: There is no recipe at llava, ") and said.endswith(f"the names {listed}\n")
    said = core.run(nowhere, "fura-vlm", "train", status=1)
    assert said.startswith("fura-vlm train: ") and "jsonargparse" not in said and "fura-vlm[train]" in said

    core.link(closure("fura-vlm", declared, {"train"}))
    core.install(wheel, "train")
    small = ["--train_records", "24", "--eval_per_family", "1"]
    assert "The embedded model is in data/tiny-llava" in core.run(nowhere, "fura-vlm", "data", "embedded", *small)
    train = ["fura-vlm", "train", "--config", "tiny", "--max_steps", "2", "--dataloader_num_workers", "0"]
    said = core.run(nowhere, *train, "--deepspeed", "zero1", "--eval_data_path", "null")
    assert (nowhere / "runs/tiny-fura/adapter/adapter_model.safetensors").is_file()
    assert "fura-vlm eval runs/tiny-fura" in said and "scripts" not in said
    assert "| all " in core.run(nowhere, "fura-vlm", "inspect", "runs/tiny-fura")
    said = core.run(nowhere, "fura-vlm", "train", "--method", "qfura", status=1)
    assert said.endswith('fura-vlm train: bitsandbytes is not installed: pip install "fura-vlm[quant]"\n')


def test_evaluation_and_chat(wheel, declared, nowhere, tmp_path):
    """Without the extra of training."""
    environment = Environment(tmp_path / "venv")
    environment.link(closure("fura-vlm", declared, {"eval", "demo"}))
    environment.install(wheel, "eval,demo")
    assert not list(environment.packages.glob("deepspeed*"))
    model = environment.packages / "fura_vlm/share/data/tiny-llava"
    evaluate = ["fura-vlm", "eval", str(model), "--limit", "1", "--output_dir", "results"]
    said = environment.run(nowhere, *evaluate, "--tasks", "popes_paper", status=1)
    assert "lmms-eval has no task 'popes_paper': did you mean pope_paper" in said
    environment.run(nowhere, *evaluate, "--tasks", "pope_paper,textvqa_paper", "--data", "embedded")
    assert "| pope_paper | 1 |" in (nowhere / "results/results.md").read_text()
    assert "usage: fura-vlm chat" in environment.run(nowhere, "fura-vlm", "chat", "--help")
