"""Answers that a tokenizer spells, against words counted by hand."""

import pytest
from transformers import AutoTokenizer

from fura_vlm.data.answer_tokens import spelling, warning


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("tests/parity/processor")  # a small one that is never made anew


def ids(tokenizer, texts):
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def by_hand(tokenizer, words):
    pieces = [tokenizer.tokenize(word) for word in words]
    letters = [[piece for piece in each if piece != "▁"] for each in pieces]
    flat = [piece for each in letters for piece in each]
    single = [p for each in letters if len(each) > 1 for p in each if len(p.strip("▁")) == 1 or p.startswith("<0x")]
    return len(words), len(flat) / len(words), len(single) / len(flat)


def test_words_tokens_and_letters(tokenizer):
    words = ["cat", "A", "zyxw", "Yes", "dog"] * 5
    assert spelling(ids(tokenizer, words), tokenizer) == pytest.approx(by_hand(tokenizer, words))


def test_only_words_that_are_spelt_are_warned_of(tokenizer):
    known = sorted(token.strip("▁") for token in tokenizer.get_vocab() if token.startswith("▁") and token[1:].isalpha())
    assert len(known) > 20 and warning(ids(tokenizer, known), tokenizer) == ""
    spelt = ["qzxj", "wvkq", "jjxz", "xqwz"] * 6
    assert f"splits a word into {by_hand(tokenizer, spelt)[1]:.1f} tokens" in warning(ids(tokenizer, spelt), tokenizer)
    assert warning(ids(tokenizer, spelt[:5]), tokenizer) == ""  # too few to tell
    assert warning(ids(tokenizer, ["12", "3.5", "猫", "ไทย"] * 20), tokenizer) == ""
