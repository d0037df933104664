"""A checkout is a folder: moved, or copied with its environment, it works, and runs its own code.

The environment is a small one, made as ``scripts/env.sh`` makes it, whose packages are those of the tests' own.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml

from fura_vlm.embedded.embedded import EmbeddedConfig, write_embedded

ROOT = Path(__file__).parents[1]
SAYS_WHERE = "\nprint('code of', __file__)\n"
WHERE = "import importlib.util; print(importlib.util.find_spec('fura_vlm').origin)"
OWN = {"VIRTUAL_ENV", "FURA_VLM_VENV", "PYTHONPATH"}  # what env.sh sets or is told


def run(folder: Path, *command: str, **env: str) -> str:
    """What a command in ``folder`` prints."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN} | env
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A checkout, with an environment as pip leaves it."""
    folder = tmp_path_factory.mktemp("checkouts") / "original"
    for name in ("fura_vlm", "scripts", "eval", "data/tiny-llava"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, folder)
    with open(folder / "fura_vlm" / "__init__.py", "a") as file:
        file.write(SAYS_WHERE)

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    packages = next((folder / ".venv").glob("lib/python*/site-packages"))
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["-m", "pip", "--python", folder / ".venv/bin/python", "install", "--quiet", "--editable", folder]
    subprocess.run([sys.executable, *install, "--no-deps", "--no-build-isolation"], check=True)
    installs = f"#!{folder}/.venv/bin/python\nfrom deepspeed.launcher.runner import main\nmain()\n"
    (folder / ".venv/bin/deepspeed").write_text(installs)
    (folder / ".venv/bin/deepspeed").chmod(0o755)
    both = (folder / "pyproject.toml").read_bytes() + (folder / "constraints.txt").read_bytes()
    [checksum] = subprocess.run(["cksum"], input=both, capture_output=True).stdout.decode().splitlines()
    (folder / ".venv/.fura-vlm-installed").write_text(f"{folder} {checksum}\ntrain eval demo quant dev\n")
    return folder


@pytest.fixture
def copied(original, tmp_path) -> Path:
    """A copy of the checkout while the original is still there."""
    copy = tmp_path / "a copy"
    run(original, "bash", "-c", "source scripts/env.sh train")
    subprocess.run(["cp", "-r", original, copy], check=True)
    return copy


def test_a_copys_commands_are_its_own(copied, original):
    """Before any script has run in it, and however they are called."""
    own = str(copied / "fura_vlm" / "__init__.py")
    assert f"code of {own}" in run(copied, ".venv/bin/fura-vlm", "--version")
    assert run(copied.parent, str(copied / ".venv/bin/python"), "-c", WHERE).strip() == own
    assert f"code of {own}" in run(
        copied.parent, "bash", "-c", 'source "a copy/.venv/bin/activate"; fura-vlm --version'
    )
    (copied.parent / "fura-vlm").symlink_to(copied / ".venv/bin/fura-vlm")
    assert f"code of {own}" in run(copied.parent, "./fura-vlm", "--version")
    assert f"code of {original}/" in run(original, ".venv/bin/fura-vlm", "--version")


def test_scripts_of_a_copy_run_its_code(copied, original, tmp_path):
    """Also through a link to it, with the original's environment active, and where both have one environment."""
    where = ["bash", "-c", f'source scripts/env.sh train; cd /; fura-vlm --version; python -c "{WHERE}"']
    own = [f"code of {copied}/fura_vlm/__init__.py", "fura-vlm 0.1.0", f"{copied}/fura_vlm/__init__.py"]
    assert run(copied, *where).splitlines()[1:] == own
    assert run(copied, *where).splitlines() == own  # the second time there is nothing to set right
    (tmp_path / "link").symlink_to(copied)
    assert run(tmp_path / "link", *where).splitlines() == own
    active = {"VIRTUAL_ENV": f"{original}/.venv", "PATH": f"{original}/.venv/bin:{os.environ['PATH']}"}
    assert run(copied, *where, PYTHONPATH=str(original), **active).splitlines() == own
    assert run(copied, *where, FURA_VLM_VENV=f"{original}/.venv").splitlines()[1:] == own
    assert run(original, *where)[-len(f"{original}/fura_vlm/__init__.py\n") :] == f"{original}/fura_vlm/__init__.py\n"


def test_an_environment_of_before_is_set_right(original, tmp_path):
    """As pip made it, copied, with the original gone; nothing is installed again, and hard links are no trouble."""
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", original, copy], check=True)
    script = copy / ".venv/bin/fura-vlm"
    script.write_text(
        re.sub(r"\A.*?(?=import re)", f"#!{tmp_path}/gone/.venv/bin/python3\n", script.read_text(), flags=re.S)
    )
    os.link(script, tmp_path / "twin")
    before = script.read_text()
    said = run(copy, "bash", "-c", "source scripts/env.sh train; fura-vlm --version", PYTHON="/bin/false")
    assert f"code of {copy}/" in said and "Setting up" not in said
    assert (tmp_path / "twin").read_text() == before != script.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is compiled where there is a GPU")
def test_a_folder_that_nothing_can_be_compiled_in_is_named(original, tmp_path):
    """ninja takes a dollar for the beginning of a variable: it would look for files that are not there."""
    home = tmp_path / "for $5"
    subprocess.run(["cp", "-r", original, home], check=True)
    command = [str(home / ".venv/bin/fura-vlm"), "train", "--model_name_or_path", "data/tiny-llava", "--data_path", "x"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"{home}/.venv has '$' in its name" in done.stderr and "move the checkout" in done.stderr


def test_a_moved_copy_trains_evaluates_and_chats(original, tmp_path):
    """In a folder with a space in its name, with the original gone."""
    home = tmp_path / "my work"
    subprocess.run(["cp", "-r", original, home], check=True)
    shutil.rmtree(original)
    data = home / "data" / "embedded"
    write_embedded(EmbeddedConfig(output_dir=str(data), train_records=8, eval_per_family=1))
    recipe = {"model_name_or_path": "data/tiny-llava", "data_path": "data/embedded/train.json", "bf16": False}
    recipe |= {"output_dir": "runs/tuned", "report_to": [], "max_steps": 1, "dataloader_num_workers": 0}
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    compiled = os.environ.get("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")  # of the same packages
    said = run(home, "bash", "scripts/finetune_fura.sh", "recipe.yaml", TORCH_EXTENSIONS_DIR=compiled)
    assert (home / "runs/tuned/adapter/adapter_model.safetensors").is_file()
    said += run(home, "bash", "scripts/eval.sh", "--help") + run(home, "bash", "scripts/demo.sh", "--help")
    code = re.findall("code of (.*)", said)
    assert len(code) >= 3 and set(code) == {str(home / "fura_vlm" / "__init__.py")}
    assert str(original) not in said
