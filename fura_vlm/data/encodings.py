"""Guesses the encoding of a text that is not UTF-8, for the advice in an error."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable

_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins like UTF-16's, so it comes first
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def wide_encoding(beginning: bytes) -> str | None:
    """UTF-16 or UTF-32, as iconv names it: by the byte order mark or, in JSON, by the zeros of its first character."""
    for mark, name in _BOMS.items():
        if beginning.startswith(mark):
            return name
    if len(beginning) < 4:
        return None
    zeros = [byte == 0 for byte in beginning[:4]]
    patterns = {
        (True, True, True, False): "UTF-32BE",
        (False, True, True, True): "UTF-32LE",
        (True, False, True, False): "UTF-16BE",
        (False, True, False, True): "UTF-16LE",
    }
    return patterns.get(tuple(zeros))


def _share(*ranges: tuple[str, str]) -> Callable[[str], float]:
    """The share of a text's characters beyond ASCII that lie in ``ranges``."""
    inside = re.compile("[" + "".join(f"{first}-{last}" for first, last in ranges) + "]")

    def share(text: str) -> float:
        beyond = re.sub(r"[\x00-\x7f]", "", text)
        return len(inside.findall(beyond)) / max(1, len(beyond))

    return share


_KANA, _HANGUL = _share(("\u3040", "\u30ff")), _share(("\uac00", "\ud7a3"))
_HANZI = _share(("\u4e00", "\u9fff"), ("\u3000", "\u303f"), ("\uff00", "\uffef"), ("\U00020000", "\U0002ffff"))

_GUESSES = [
    # what iconv calls it, the language, Python's codec, the share of what, and how much of it
    ("SHIFT_JIS", "Japanese", "cp932", _KANA, 0.25),
    ("EUC-JP", "Japanese", "euc_jp", _KANA, 0.25),
    ("EUC-KR", "Korean", "euc_kr", _HANGUL, 0.9),
    ("GBK", "Chinese", "gb2312", _HANZI, 0.8),
    ("BIG5", "Chinese, traditional", "big5", _HANZI, 0.9),
    ("GBK", "Chinese", "gbk", _HANZI, 0.9),
    ("GB18030", "Chinese", "gb18030", _HANZI, 0.9),
]


def guess_encoding(text: bytes) -> tuple[str, str]:
    """The likeliest encoding of a text that is not UTF-8, as iconv names it, and its language.

    This is a guess: a text that decodes with an East Asian encoding into characters of its language is taken for that.
    Otherwise several bytes beyond ASCII in a row mean Russian (Windows-1251), and single ones Latin-1.
    """
    for name, language, codec, share, least in _GUESSES:
        decoded = codecs.getincrementaldecoder(codec)()
        try:
            if share(decoded.decode(text)) >= least:  # the last character may be cut
                return name, language
        except UnicodeDecodeError:
            continue
    runs = re.findall(rb"[\x80-\xff]+", text)
    if sum(len(run) for run in runs if len(run) > 2) > sum(map(len, runs)) / 2:
        return "CP1251", "Russian"
    return "LATIN1", "Western Europe"
