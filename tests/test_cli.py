"""The command line as a user types it."""

import subprocess
import sys

import pytest

from fura_vlm.cli import main
from fura_vlm.commands import parse


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fura_vlm.cli", *arguments], capture_output=True, text=True, timeout=300
    )


def test_help_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['fura-vlm', '--help']\n"
        "from fura_vlm.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'deepspeed', 'datasets', 'gradio'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("train", "eval", "chat", "merge", "data"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (("train", "--learning_rat", "1"), "learning_rate"),
        (("train", "--gradient_acumulation_steps", "2"), "gradient_accumulation_steps"),
        (("eval", "somewhere", "--batchsize", "2"), "batch_size"),
    ],
)
def test_unknown_setting_names_the_nearest(arguments, hint):
    done = run(*arguments)
    assert done.returncode != 0
    assert f"Did you mean '{hint}'?" in done.stderr


def test_wrong_type_is_refused():
    done = run("train", "--learning_rate", "fast")
    assert done.returncode != 0
    assert "learning_rate" in done.stderr and "Traceback" not in done.stderr


def test_missing_model_is_one_sentence():
    with pytest.raises(SystemExit, match=r"^fura-vlm eval: There is no model at \./nowhere.*$"):
        main(["eval", "./nowhere"])


def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "mixture.json").write_text('[{"image": "1.png"}]')
    (tmp_path / "file").touch()
    arguments = ["data", "verify", str(tmp_path / "mixture.json"), "--report_dir", str(tmp_path / "file")]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == f"fura-vlm data verify: {tmp_path}/file: File exists: check the path and its permissions"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["assemble", "--config", "FILE", "out"], {"output_dir": "out", "mm_projector": "p.bin", "seed": 7}),
        (["assemble", "out", "--config", "FILE"], {"output_dir": "out", "mm_projector": "p.bin", "seed": 7}),
        (["assemble", "--config=FILE"], {"output_dir": "o", "mm_projector": "p.bin", "seed": 7}),
        (["assemble", "out", "q.bin", "--seed", "1", "--config", "FILE"], {"mm_projector": "q.bin", "seed": 1}),
        (["assemble", "out", "--config=FILE", "--config", "SECOND"], {"mm_projector": "p.bin", "seed": 9}),
        (["data", "llava-558k", "--workers", "1", "--config", "DATA"], {"workers": 1, "sources": ["coco"]}),
    ],
)
def test_what_is_typed_overrides_the_file(arguments, expected, tmp_path):
    files = {
        "FILE": "output_dir: o\nmm_projector: p.bin\nseed: 7",
        "SECOND": "seed: 9",
        "DATA": "workers: 2\nsources: [coco]",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        arguments = [part.replace(name, str(tmp_path / name)) for part in arguments]
    _, options = parse(arguments)
    assert expected.items() <= options.items()
