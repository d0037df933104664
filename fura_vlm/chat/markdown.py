"""What users and models write, as Markdown that a page can show safely."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt

JOINER = "\u2060"  # takes no room and breaks no line
MARKDOWN = MarkdownIt("commonmark")


def literal(text: str) -> str:
    """Markdown without HTML and pictures. Gradio would show all tags but scripts, some of them over the whole page, and
    the browser would fetch whatever picture an answer names. In blocks of code both are text already, and stay as they
    are: code is copied.
    """
    text = re.sub(r"<(?=[a-zA-Z/!?])|!(?=\[)", rf"\g<0>{JOINER}", re.sub(r"\r\n?", "\n", text))
    if JOINER not in text:  # nearly always, and this is called for the whole conversation with each token
        return text
    lines = text.split("\n")
    for block in MARKDOWN.parse(text):
        if block.type == "fence" and block.level == 0:
            first, end = block.map
            lines[first + 1 : end] = [line.replace(JOINER, "") for line in lines[first + 1 : end]]
    return "\n".join(lines)
