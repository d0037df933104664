"""What knows of one family of models, and which way imports go."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fura_vlm"

WORDS = re.compile(r"Llava|vision_tower|multi_modal_projector|crop_size|ASSISTANT")

MAY_KNOW = ("families/", "embedded/", "modelling/assemble.py")
"""LLaVA-1.5 is meant here."""

SETTING = re.compile(r"(?<![\w.])((config|train)\.)?vision_tower(_lr)?(?![\w.])")
"""Settings are called as LLaVA's scripts call them: a field, an argument, ``config.vision_tower``; a module of a model
(``model.vision_tower``) is none."""


def lines_that_know(text: str) -> list[str]:
    found = []
    for line in text.splitlines():
        if WORDS.search(SETTING.sub("", line)):
            found.append(line.strip())
    return found


def test_one_family_is_known_in_its_place_alone():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(MAY_KNOW) and (lines := lines_that_know(path.read_text("utf-8"))):
            found[name] = lines
    assert not found


def test_settings_are_told_from_modules():
    settings = [
        "vision_tower: str = 'x'",
        "if config.vision_tower != 'full':",
        "vision_tower_lr=config.vision_tower_lr,",
    ]
    modules = ["model.model.vision_tower.parameters()", "self.vision_tower(pixels)", 'skip = ["model.vision_tower"]']
    assert not lines_that_know("\n".join(settings))
    assert lines_that_know("\n".join(modules)) == modules


MAY_IMPORT = {
    "fura": {"errors", "fura"},
    "families": {"errors", "families"},
    "data": {"errors", "files", "shipped", "families", "data"},
    "modelling": {"errors", "extras", "files", "shipped", "tables", "fura", "families", "modelling"},
}


def imported(path: Path) -> set[str]:
    """The parts of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("fura_vlm.")}
    return found


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_one_way(part):
    wrong = {
        (path.relative_to(PACKAGE).as_posix(), other)
        for path in (PACKAGE / part).rglob("*.py")
        for other in imported(path) - MAY_IMPORT[part]
    }
    assert not wrong


def test_all_files_import_absolutely():
    """Or else the test before would not see it."""
    for path in PACKAGE.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in nodes), path


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by their names alone."""
    names = sorted(path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py")
    assert names == sorted(set(names))
