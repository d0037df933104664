"""Ties an environment to the checkout that it belongs to, by where they lie and not by where they were made.

    VENV/bin/python -I scripts/relocate.py ROOT

pip writes absolute paths into an environment: a checkout that is copied together with its environment would run the
code of the one it was copied from, and one that is moved would not start at all. Afterwards nothing in the
environment depends on the place, if it is a folder of the checkout: copied or moved together they work as they are.
(C shell's ``activate.csh`` cannot know where it lies. The next of the project's scripts sets it right.)

Files are replaced and not written into: those of the copy may be hard links to the original's.
"""

import json
import os
import re
import shlex
import sys
import sysconfig
from pathlib import Path

# To a shell, the first lines of a script in bin start the interpreter beside it; to Python they are a string.
HERE = '"$(dirname -- "$(realpath -- "$0")")"'
START = f"#!/bin/sh\n'''exec' {HERE}/python \"$0\" \"$@\"\n' '''\n"
# pip's first lines, and those it takes where a path is too long for the kernel or has a space.
MADE_BY_PIP = re.compile(
    rb"\A(#![^\n]*/python[\d.]*\n|#!/bin/sh\n'''exec' [^\n]*/python[\d.]*\"? \"\$0\" \"\$@\"\n' '''\n)"
)


def replace(path: Path, content: bytes) -> None:
    if path.read_bytes() != content:
        building = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        building.write_bytes(content)
        building.chmod(path.stat().st_mode)
        building.replace(path)


def relocate_scripts(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            replace(path, MADE_BY_PIP.sub(lambda _: START.encode(), content, count=1))


def relocate_activation(venv: Path) -> None:
    beside = '"$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE:-$0}")/.." && pwd)"'  # $0: in zsh; other shells cannot say
    otherwise = f'[ -x "$VIRTUAL_ENV/bin/python" ] || VIRTUAL_ENV={shlex.quote(str(venv))}'
    fish = "set -gx VIRTUAL_ENV (realpath (dirname (status filename))/..)"
    for name, line, instead in (
        ("activate", r"^(\s*(?:export )?)VIRTUAL_ENV=(?!\$\(cygpath).*$", f"VIRTUAL_ENV={beside}; {otherwise}"),
        ("activate.fish", r"^(\s*)set -gx VIRTUAL_ENV .*$", fish),
        ("activate.csh", r"^(\s*)setenv VIRTUAL_ENV .*$", f"setenv VIRTUAL_ENV {shlex.quote(str(venv))}"),
    ):
        path = venv / "bin" / name
        if path.is_file():
            text = re.sub(line, lambda match, new=instead: match[1] + new, path.read_text("utf-8"), flags=re.M)
            replace(path, text.encode())


def relocate_package(root: Path, venv: Path, packages: Path) -> None:
    """The package is found through one line in a .pth file, relative to it if the environment lies in the checkout."""
    [information] = packages.glob("fura_vlm-*.dist-info")
    version = information.name.removesuffix(".dist-info")
    link = packages / f"__editable__.{version}.pth"
    inside = venv.resolve().is_relative_to(root)
    replace(link, f"{os.path.relpath(root, packages.resolve()) if inside else root}\n".encode())
    for finder in packages.glob("__editable___fura_vlm_*_finder.py"):  # setuptools', which holds an absolute path
        finder.unlink(missing_ok=True)
    source = {"dir_info": {"editable": True}, "url": root.as_uri()}
    replace(information / "direct_url.json", json.dumps(source).encode())


if __name__ == "__main__":
    checkout, environment = Path(sys.argv[1]), Path(sys.prefix)
    relocate_scripts(environment / "bin")
    relocate_activation(environment)
    relocate_package(checkout, environment, Path(sysconfig.get_path("purelib")))
