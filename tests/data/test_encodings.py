"""Python's own codecs write what is guessed at."""

import pytest

from fura_vlm.data.encodings import guess_encoding, wide_encoding

JAPANESE, CHINESE = "これは猫の写真です。何人いますか？", "这是一张猫的照片，它坐在沙发上。图中有几个人？"


@pytest.mark.parametrize(
    "codec, text, name",
    [
        ("gb2312", CHINESE, "GBK"),
        ("gbk", CHINESE + "镕", "GBK"),
        ("gb18030", CHINESE + "𠀀", "GB18030"),
        ("big5", "這是一張貓的照片，牠坐在沙發上。圖中有幾個人？", "BIG5"),
        ("cp932", JAPANESE, "SHIFT_JIS"),
        ("euc_jp", JAPANESE, "EUC-JP"),
        ("euc_kr", "이것은 고양이 사진입니다. 몇 명이 있습니까?", "EUC-KR"),
        ("cp1251", "Это фотография кошки. Сколько людей?", "CP1251"),
        ("koi8_r", "Это фотография кошки. Сколько людей?", "KOI8-R"),
        ("cp866", "Это фотография кошки. Сколько людей?", "CP866"),
        ("latin-1", "Où est le café déjà vu? Größe, señor, às três", "LATIN1"),
    ],
)
def test_guess(codec, text, name):
    content = f'[{{"from": "human", "value": "{text}"}}]'.encode(codec)
    assert guess_encoding(content)[0] == name
    assert wide_encoding(content) is None


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_wide(codec):
    assert wide_encoding('{"a": "猫"}'.encode(codec)).lower() == codec.replace("-le", "le").replace("-be", "be")
    assert wide_encoding('{"a": "猫"}'.encode("utf-8-sig")) is None
