"""What the pages say is so: messages are the program's, options and scripts exist, links lead somewhere."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TROUBLES = ROOT / "docs" / "troubleshooting.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MESSAGES = re.findall(r"^```text\n(.*)\n```$", TROUBLES.read_text("utf-8"), re.MULTILINE)


def fixed_parts(node: ast.expr) -> list[str] | None:
    """The words that are always in a string of the code, cut where a value is put in; ``None`` if it is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.split(r"%[sd]|\{\}", node.value)
    if not isinstance(node, ast.JoinedStr):
        return None
    parts = [""]
    for value in node.values:
        if isinstance(value, ast.Constant):
            parts[-1] += value.value
        else:
            parts.append("")
    return parts


def of_python(text: str) -> list[list[str]]:
    tree = ast.parse(text)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [parts for node in ast.walk(tree) if id(node) not in docs and (parts := fixed_parts(node))]


def of_shell(text: str) -> list[list[str]]:
    """What ``echo`` writes, up to the first command in it."""
    joined = re.sub(r'"\s*\\\n\s*"', " ", text)  # echo writes a space between its arguments
    strings = re.findall(r'echo "([^"]*)', joined) + re.findall(r"echo '([^']*)'", joined)
    return [re.split(r"\$\{[^}]*\}|\$\w+", string.partition("$(")[0]) for string in strings]


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z']+", text)


@pytest.fixture(scope="module")
def sentences() -> list[re.Pattern]:
    """A pattern for each string of the program with at least three fixed words, each fixed part a group."""
    found = []
    for path in sorted((ROOT / "fura_vlm").rglob("*.py")):
        found += of_python(path.read_text("utf-8"))
    for path in sorted((ROOT / "scripts").glob("*.sh")):
        found += of_shell(path.read_text("utf-8"))
    return [
        re.compile(".+?".join(f"({re.escape(part)})" for part in parts), re.IGNORECASE)
        for parts in found
        if len(words(" ".join(parts))) >= 3
    ]


def share_of_the_program(message: str, sentences: list[re.Pattern]) -> float:
    """The share of a message's plain words that are fixed words of sentences of the program. Paths, names and numbers
    do not count, nor what other programs said: what is in brackets, and the two sentences named here."""
    own = [False] * len(message)
    for sentence in sentences:
        if found := sentence.search(message):
            for group in range(1, sentence.groups + 1):
                own[slice(*found.span(group))] = [True] * (found.end(group) - found.start(group))
    others = r"^fura-vlm [a-z ]+: |\([^()]*\)|: We couldn't connect.*|FlashAttention2 .* installed\."

    def blank(match: re.Match) -> str:
        return match.group() if any(own[match.start() + 1 : match.end() - 2]) else " " * len(match.group())

    told = re.sub(others, blank, message)
    spans = [match.span() for match in re.finditer(r"(?<!\S)[A-Za-z']+(?=[,;:.]?(\s|$))", told)]
    return sum(all(own[start:end]) for start, end in spans) / len(spans)


def test_the_page_has_messages():
    blocks = TROUBLES.read_text("utf-8").count("```text")
    assert len(MESSAGES) == blocks > 40 and len(set(MESSAGES)) == blocks  # each on one line, each once


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_the_programs(message, sentences):
    assert share_of_the_program(message, sentences) >= 0.75


@pytest.mark.parametrize(
    "message",
    [
        "fura-vlm train: The memory of this machine does not suffice for 16 records of up to 2048 tokens: try fewer",
        "fura-vlm train: models/mine: the tokenizer numbers <image> otherwise than the config.json, which cannot be: "
        "its files belong to different models, so take the processor that was published with this one",
        "8 of 28 records are not used: look into runs/fura/skipped.jsonl",
        "A training process got signal 9; the system often does that when memory runs out.",
    ],
)
def test_other_words_are_found(message, sentences):
    assert share_of_the_program(message, sentences) < 0.75


# ------------------------------------------------------------------------------------------------- names on all pages

SETTINGS = {
    "training": ("TrainConfig", "PlanConfig"),
    "reinforcement": ("GrpoConfig",),
    "data": ("VerifyConfig", "DownloadConfig"),
    "evaluation": ("EvalConfig", "CompareConfig"),
    "chat": ("ChatConfig",),
    "modelling": ("AssembleConfig", "MergeConfig", "InspectConfig", "SmolLM2Config"),
}
OF_OTHERS = {
    "config", "help", "version",  # of every command
    "nodes", "gpus-per-node", "signal", "batch", "hostfile",  # SLURM, DeepSpeed
    "model_args", "include_path", "no-deps", "wheel-dir",  # lmms-eval, pip
}  # fmt: skip


def test_options_on_the_pages_exist():
    known = set(OF_OTHERS)
    for part, names in SETTINGS.items():
        module = importlib.import_module(f"fura_vlm.{part}.config")
        known |= {field.name for name in names for field in dataclasses.fields(getattr(module, name))}
    for page in (
        ROOT / "README.md",
        TROUBLES,
        *(ROOT / "docs" / f"{name}.md" for name in ("families", "machines", "tracks")),
    ):
        used = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text("utf-8")))
        assert not used - known, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_and_links_of_a_page_exist(page):
    text = page.read_text("utf-8")
    for script in re.findall(r"\b(?:scripts|benchmarks|demo|tests|docs)/[\w./-]*\w\.(?:sh|py|json|yaml|md)\b", text):
        assert (ROOT / script).is_file() or "NAME" in script, script
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not heading or heading in headings(target), link


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", line.lower()).replace(" ", "-") for line in lines}
