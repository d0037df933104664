"""Image files as a vision-language model needs them: upright, opaque, 8-bit RGB; or else one clear error.

LLaVA v1.5's scripts call ``Image.open(path).convert("RGB")``. This module differs where that loses the
picture:

- EXIF orientation is applied, so that a photo taken with the camera turned is upright.
- 16-bit greyscale is scaled to 8 bit; ``convert`` clips it, which turns nearly all of it white.
- Transparency is composited on white; ``convert`` shows the colour beneath it, often black.

One trap of LLaVA v1.5's mixture is known here: it names every OCR-VQA image ``.jpg``, because its authors saved them
all so, but the data set's own script saves GIF and PNG files under their own names. Where a ``.jpg`` is missing, the
``.gif``, ``.png`` or ``.jpeg`` of the same name is taken (``find_image``): as the content decides the format, that is
what the authors' renamed file holds.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from fura_vlm.data.columns import address, stored_picture
from fura_vlm.errors import FuraVLMError

MAX_PIXELS = 100_000_000
"""Images of this many pixels or more are refused: a small file can unpack to gigabytes."""

# Pillow warns when it opens a large image. Such images get an error here, which also says which one it is;
# and a warning cannot be silenced for a single call where threads share the filters.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

STAND_INS = (".gif", ".png", ".jpeg")
"""The endings that are tried, in this order, if a file whose name ends in .jpg is missing."""

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = 5, 6, 7, 8  # width and height change places


class ImageError(FuraVLMError):
    """An image file that cannot be used. The message is one sentence: the file, the reason, the way out."""


def find_image(path: str | os.PathLike) -> str | None:
    """``path`` if there is such a file; the file that stands for it if ``path`` is a ``.jpg`` that another format's
    name replaces; or else ``None``."""
    if stored := address(os.fspath(path)):
        return os.fspath(path) if os.path.isfile(stored.file) else None
    stem, suffix = os.path.splitext(os.fspath(path))
    names = [path, *(stem + other for other in STAND_INS if suffix == ".jpg")]
    return next((os.fspath(name) for name in names if os.path.isfile(name)), None)


def load_image(
    path: str | os.PathLike,
    max_pixels: int = MAX_PIXELS,
    formats: Sequence[str] | None = None,
    draft: tuple[int, int] | None = None,
) -> Image.Image:
    """Reads an image file as 8-bit RGB, detached from the file.

    The content decides the format, not the name. Of an animation it is the first frame. What is transparent
    becomes white; 16-bit grey is scaled to 8 bit; CMYK and all else is converted by Pillow; EXIF orientation
    is applied.

    Args:
        path: a file in a format that Pillow reads; a missing ``.jpg`` as in ``find_image``; or the address of a picture
            in a column, as in ``fura_vlm.data.columns``.
        max_pixels: images of this many pixels or more are refused before they are decoded. Pillow itself
            refuses twice ``PIL.Image.MAX_IMAGE_PIXELS`` (179 million), whatever is given here.
        formats: Pillow's names of the formats that are opened; by default all that it knows.
        draft: width and height that are enough. A larger image comes at the half, the third, ... of its size that is
            still as wide and as high: JPEG is decoded so (to a half, a quarter or an eighth), which saves time and
            memory; others are reduced when they are decoded.

    Raises:
        ImageError: if the file is missing, empty, truncated, too large, not an image or of another format.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # some libraries turn it on for all: what is missing would be grey
    with _open(path, max_pixels, formats) as image:
        try:
            enough = None if draft is None else draft if upright_size(image) == image.size else draft[::-1]
            if enough is not None:
                image.draft(None, enough)
            image.load()
            rgb = _rgb(_upright(image), path)
            factor = 1 if draft is None else min(rgb.width // draft[0], rgb.height // draft[1])
            return rgb.reduce(factor) if factor > 1 else rgb
        except ImageError:
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
            reason = f"{path} is truncated or damaged ({error}): fetch it again or remove it"
            raise ImageError(reason) from error


def check_image(path: str | os.PathLike, decode: bool, max_pixels: int = MAX_PIXELS) -> None:
    """Raises the ``ImageError`` that ``load_image`` would raise.

    Args:
        path: the file.
        decode: decode the pixels too. Otherwise only the header is read, which is many times faster: it finds
            what is missing, empty, no image or too large, but not what is truncated after its header.
        max_pixels: as in ``load_image``.
    """
    if decode:
        load_image(path, max_pixels)
    else:
        _open(path, max_pixels).close()


def image_size(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of the picture that ``load_image`` gives, in pixels; only the header is read.

    Raises:
        ImageError: as ``check_image`` without decoding.
    """
    with _open(path, max_pixels) as image:
        return upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height once EXIF orientation is applied; nothing is decoded."""
    return image.size[::-1] if _orientation(image) in _SIDEWAYS else image.size


def _open(path: str | os.PathLike, max_pixels: int, formats: Sequence[str] | None = None) -> Image.Image:
    """The image with its header read and its size checked, nothing decoded."""
    too_large = f"{path} has {{}} pixels, and {max_pixels:,} or more are refused: make it smaller"
    try:
        file = _file(path)
        if not (file.getbuffer().nbytes if isinstance(file, io.BytesIO) else os.path.getsize(file)):
            raise ImageError(f"{path} is empty (0 bytes): fetch it again or remove it")
        image = Image.open(file, formats=formats)
    except FileNotFoundError as error:
        raise ImageError(f"{path} does not exist: check the path, or the image folder of the mixture") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path} is a folder, not an image: correct the path in the record") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{path} is not an image that Pillow can read: convert it to PNG or JPEG, or remove it"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(too_large.format("too many")) from error
    except ImageError:
        raise
    except Exception as error:  # no permission, a header that breaks Pillow's parser, ...
        raise ImageError(f"{path} cannot be opened ({error}): repair or remove it") from error
    width, height = image.size
    if width * height >= max_pixels:
        image.close()
        raise ImageError(too_large.format(f"{width} x {height}"))
    return image


def _file(path: str | os.PathLike) -> str | os.PathLike | io.BytesIO:
    """The file that holds a picture; the content of one that is stored in a column."""
    if stored := address(os.fspath(path)):
        return io.BytesIO(stored_picture(stored))
    return path if os.path.exists(path) else find_image(path) or path


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata does not make the picture unreadable; it has no orientation then
        return None


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    # Of a TIFF, Pillow has applied the tag while loading and has removed it.
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image, path: str | os.PathLike) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # "I" is how 16-bit PGM comes out of Pillow
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{path} has 32-bit pixels, whose range is not known: convert it to 8 bit")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")  # 65535 = 257 * 255
    if image.mode == "F":
        raise ImageError(f"{path} has float pixels, whose range is not known: convert it to 8 bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    # A picture that is RGB already is copied: the caller must get one that lives without its file.
    return image.convert("RGB") if image.mode != "RGB" else image.copy()
