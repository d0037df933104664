"""Tables for people at a terminal, and for files and programs."""

import os
import pty
import re
import subprocess
import sys

from markdown_it import MarkdownIt

from fura_vlm.tables import Table, markdown

PROGRAM = """
from fura_vlm.tables import Table, show
show(["*Layers*, the worst first:", Table(["layer", "s"], [["model.layers.0.q|k [b]", "0.25"], ["a *c*", "1,000"]])])
"""


def printed_on_a_terminal(columns: int) -> str:
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=theirs, env=environment)
    os.close(theirs)
    text = b""
    try:
        while piece := os.read(ours, 4096):
            text += piece
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return text.decode()


def test_drawn_on_a_terminal():
    text = printed_on_a_terminal(80)
    assert "───" in text and "|--" not in text and "*" not in text
    lines = [re.sub(r"\x1b\[\d*m", "", line).split() for line in text.splitlines()]
    assert ["model.layers.0.q|k", "[b]", "0.25"] in lines and ["a", "c", "1,000"] in lines


def test_numbers_stay_whole_where_the_terminal_is_narrow():
    text = re.sub(r"\x1b\[\d*m", "", printed_on_a_terminal(24))
    assert "0.25" in text and "1,000" in text and "model.layers" in text and "model.layers.0.q|k" not in text
    assert max(map(len, text.splitlines())) <= 24


def test_markdown_where_it_is_piped():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    parts = [
        "*Layers*, the worst first:",
        Table(["layer", "s"], [["model.layers.0.q|k [b]", "0.25"], ["a *c*", "1,000"]]),
    ]
    assert done.stdout == markdown(parts)
    cells = read(done.stdout)
    assert cells == ["layer", "s", "model.layers.0.q|k [b]", "0.25", "a *c*", "1,000"]


def test_a_cell_ends_where_it_ends():
    rows = [["a | b", "1"], ["two\nlines", "2"], ["", "3"]]
    assert read(Table(["x", "n"], rows).markdown()) == ["x", "n", "a | b", "1", "two lines", "2", "", "3"]
    assert "|---|---:|" in Table(["x", "n"], rows).markdown()


def read(text: str) -> list[str]:
    """The cells of the tables in a Markdown text, as another parser reads them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    opens = ("th_open", "td_open")
    return [tokens[at + 1].content for at, token in enumerate(tokens) if token.type in opens]
