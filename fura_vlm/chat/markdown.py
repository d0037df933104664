"""What users and models write, as Markdown that makes no browser fetch anything."""

from __future__ import annotations

import re

JOINER = "\u2060"  # takes no room and breaks no line; the page leaves it out of what is copied
FETCHED = re.compile(r"<(?=[a-zA-Z/!?])|!(?=\[)|`(?=mermaid)")


def literal(text: str) -> str:
    """Markdown without HTML, pictures and diagrams. Gradio would show all tags but scripts, some of them over the whole
    page, and the browser would fetch whatever a picture or a diagram of an answer names.

    Blocks of code are changed, too. Gradio's Markdown takes other text for code than CommonMark does (it ends a block
    at "```~", and looks for formulas within blocks), so nothing but the text itself says that a tag is none.
    """
    return FETCHED.sub(rf"\g<0>{JOINER}", re.sub(r"\r\n?", "\n", text))
