"""Whether a tokenizer knows the words of the answers that are trained.

A model learns a word of one token in a few examples. A word that the tokenizer splits into letters or bytes is a
sequence that the model has never written, and learning it takes many more steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MOST_PIECES = 2.5  # tokens a word: English in Llama's tokenizer has 1.3
MOST_SINGLE = 0.4  # of these tokens, the share of single letters and bytes
LEAST_WORDS = 20  # fewer say nothing

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def spelling(answers: Iterable[Sequence[int]], tokenizer) -> tuple[int, float, float]:
    """How a tokenizer splits words. Only scripts with upper and lower case count, because others do not separate words.

    Args:
        answers: token ids of each answer.

    Returns:
        The number of words, tokens a word, and the share of tokens that are a single letter or byte of a longer word.
    """
    words = pieces = single = 0
    for ids in answers:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        found = [word for word in re.findall(r"[^\W\d_]+", text) if word.lower() != word.upper()]
        if not found:
            continue
        words += len(found)
        special = set(tokenizer.all_special_ids)
        for token in tokenizer.convert_ids_to_tokens([number for number in ids if number not in special]):
            letters = [character for character in token if character.lower() != character.upper() and character != "Ġ"]
            if _BYTE.fullmatch(token):
                letters = [token]
            pieces += bool(letters)
            single += len(letters) == 1
        single -= sum(len(word) == 1 for word in found)  # "A" is a word
    return words, pieces / max(words, 1), max(single, 0) / max(pieces, 1)


def warning(answers: Iterable[Sequence[int]], tokenizer) -> str:
    """A warning if the tokenizer does not know the words of the answers, or ""."""
    words, pieces, single = spelling(answers, tokenizer)
    if words < LEAST_WORDS or pieces <= MOST_PIECES and single <= MOST_SINGLE:
        return ""
    return (
        f"The model's tokenizer does not know the words of these answers: it splits a word into {pieces:.1f} tokens, "
        f"{single:.0%} of them single letters. Such words take many more steps to learn: train longer, write the "
        "answers as the model was pretrained to write (upper and lower case count), or choose another model"
    )
