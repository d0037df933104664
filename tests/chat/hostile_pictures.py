"""Small files that cost a decoder far more than their size and their header say."""

import io
import struct
import zlib
from pathlib import Path

from PIL import Image


def many_scans(path: Path, scans: int) -> None:
    """A progressive JPEG of 24.9 megapixels. One scan, of a few bytes, is there again and again."""
    saved = io.BytesIO()
    Image.new("L", (4990, 4990), 128).save(saved, "JPEG", progressive=True)
    content = saved.getvalue()
    start = content.rindex(b"\xff\xda")
    path.write_bytes(content[:-2] + content[start:-2] * scans + content[-2:])


def large_tile(path: Path, side: int) -> None:
    """A TIFF of 16 x 16 pixels in one tile of ``side`` x ``side``, which is compressed a thousand to one."""
    packer = zlib.compressobj(9)
    tile = b"".join(packer.compress(bytes(3 * side)) for _ in range(side)) + packer.flush()
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 2), (277, 3), (322, side), (323, side)]
    tags += [(324, 8 + 2 + 12 * 10 + 4), (325, len(tile))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + tile)


def many_comments(path: Path, comments: int) -> None:
    """A GIF of 8 x 8 pixels with comments before its picture."""
    saved = io.BytesIO()
    Image.new("P", (8, 8)).save(saved, "GIF")
    content = saved.getvalue()
    start = 13 + 3 * (2 << (content[10] & 7)) if content[10] & 128 else 13
    path.write_bytes(content[:start] + b"\x21\xfe\x01a\0" * comments + content[start:])


def many_chunks(path: Path, chunks: int) -> None:
    """A PNG of 8 x 8 pixels with chunks that mean nothing before its picture."""
    saved = io.BytesIO()
    Image.new("RGB", (8, 8)).save(saved, "PNG")
    content, chunk = saved.getvalue(), b"\0\0\0\0teSt" + struct.pack(">I", zlib.crc32(b"teSt"))
    path.write_bytes(content[:33] + chunk * chunks + content[33:])


def many_tags(path: Path, bytes_each: int) -> None:
    """A TIFF with a thousand tags that all hold the same bytes."""
    tags = [struct.pack("<HHII", 40_000 + number, 7, bytes_each, 8) for number in range(1000)]
    entries = struct.pack("<HHII", 256, 4, 1, 16) + struct.pack("<HHII", 257, 4, 1, 16) + b"".join(tags)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, 1002) + entries + bytes(4) + bytes(bytes_each))


def hostile_pictures(folder: Path) -> list[str]:
    """Each takes more than a second or more than two gigabytes, on any machine."""
    many_scans(folder / "scans.jpg", 2_000)
    large_tile(folder / "tile.tif", 28_000)
    many_comments(folder / "comments.gif", 4_000_000)
    many_chunks(folder / "chunks.png", 2_000_000)
    many_tags(folder / "tags.tif", 4_000_000)
    return ["scans.jpg", "tile.tif", "comments.gif", "chunks.png", "tags.tif"]
