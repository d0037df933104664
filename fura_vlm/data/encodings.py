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


_PACKED = {
    b"\x1f\x8b": ("gzip", "unpack it, for example with gunzip"),
    b"PK\x03\x04": ("zip", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "unpack it, for example with unzstd"),
    b"BZh": ("bzip2", "unpack it, for example with bunzip2"),
    b"\xfd7zXZ": ("xz", "unpack it, for example with unxz"),
    b"PAR1": ("Parquet", "let its name end in .parquet"),
    b"ARROW1": ("Arrow", "give the folder of the data set"),
    b"version https://git-lfs": ("a pointer of Git LFS", "fetch it with git lfs pull"),
}


def packed(beginning: bytes) -> tuple[str, str] | None:
    """What a file is that holds no text, and what to do about it."""
    return next((said for magic, said in _PACKED.items() if beginning.startswith(magic)), None)


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
_SMALL_CYRILLIC = _share(("\u0430", "\u044f"))
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


def is_damaged_utf8(text: bytes) -> bool:
    """Whether nearly all that is beyond ASCII is UTF-8, so that some bytes of it were lost or changed.

    Half of GBK's characters are UTF-8 by chance.
    """
    decoded = text.decode(errors="replace")
    lost = decoded.count("\ufffd")
    return sum(character > "\x7f" for character in decoded) > 10 * lost


def guess_encoding(text: bytes) -> tuple[str, str]:
    """The likeliest encoding of a text that is not UTF-8, as iconv names it, and its language.

    This is a guess: a text that decodes with an East Asian encoding into characters of its language is taken for that.
    Otherwise several bytes beyond ASCII in a row mean Russian, in the encoding in which most letters are small, and
    single ones Latin-1.
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
        codecs_of = {"CP1251": "cp1251", "KOI8-R": "koi8_r", "CP866": "cp866"}
        return max(codecs_of, key=lambda name: _SMALL_CYRILLIC(text.decode(codecs_of[name], "replace"))), "Russian"
    return "LATIN1", "Western Europe"
