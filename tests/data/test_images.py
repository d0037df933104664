import io

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from fura_vlm.data.images import ImageError, check_image, load_image


@pytest.fixture
def photo():
    """40 x 24, smooth, red grows to the right and green downwards."""
    y, x = np.mgrid[:24, :40]
    return Image.fromarray(np.stack([x * 6, y * 10, np.full_like(x, 80)], -1).astype(np.uint8))


def close(image, expected, tolerance=0):
    assert image.mode == "RGB" and image.size == expected.size
    difference = np.abs(np.asarray(image, int) - np.asarray(expected.convert("RGB"), int))
    assert difference.max() <= tolerance


# ------------------------------------------------------------------------------------------- what can be read


@pytest.mark.parametrize("options", [{"format": "PNG"}, {"format": "BMP"}, {"format": "WEBP", "lossless": True}])
def test_lossless_formats_are_exact(photo, tmp_path, options):
    photo.save(tmp_path / "image", **options)
    close(load_image(tmp_path / "image"), photo)


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(photo, tmp_path, progressive):
    photo.save(tmp_path / "image.jpg", quality=95, progressive=progressive)
    close(load_image(tmp_path / "image.jpg"), photo, tolerance=16)


def test_cmyk_jpeg(photo, tmp_path):
    photo.convert("CMYK").save(tmp_path / "image.jpg", quality=95)
    assert Image.open(tmp_path / "image.jpg").mode == "CMYK"
    close(load_image(tmp_path / "image.jpg"), photo, tolerance=16)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"ramp.{suffix}")
    read = np.asarray(load_image(tmp_path / f"ramp.{suffix}"))
    assert (read == np.arange(256).reshape(16, 16, 1)).all()


def test_grey_and_black_and_white(photo, tmp_path):
    for mode in ("L", "1"):
        photo.convert(mode).save(tmp_path / "image.png")
        close(load_image(tmp_path / "image.png"), photo.convert(mode))


def test_transparency_becomes_white(tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:, 1, 3], rgba[:, 2, 3] = 128, 255  # columns: transparent, half, opaque red
    Image.fromarray(rgba).save(tmp_path / "image.png")
    read = np.asarray(load_image(tmp_path / "image.png"), int)
    assert (read[:, 0] == 255).all()
    assert np.abs(read[:, 1] - [227, 127, 127]).max() <= 1
    assert (read[:, 2] == [200, 0, 0]).all()


def test_grey_with_alpha_becomes_white(tmp_path):
    Image.fromarray(np.array([[[0, 0], [0, 255]]], np.uint8)).save(tmp_path / "image.png")
    assert np.asarray(load_image(tmp_path / "image.png")).tolist() == [[[255] * 3, [0] * 3]]


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 250])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "image.png", transparency=0)
    assert np.asarray(load_image(tmp_path / "image.png")).tolist() == [[[255] * 3, [200, 0, 0], [0, 0, 250]]]


def test_colour_key_transparency(tmp_path):
    Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8)).save(tmp_path / "i.png", transparency=(1, 2, 3))
    assert np.asarray(load_image(tmp_path / "i.png")).tolist() == [[[255] * 3, [9] * 3]]


def test_animated_gif_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    close(load_image(tmp_path / "image.gif"), frames[0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_exif_orientation_is_applied(photo, tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    photo.save(path, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(path))
    assert expected.size == (photo.size if orientation < 5 else photo.size[::-1])
    close(load_image(path), expected)


def test_rotated_jpeg_photo_is_upright(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the viewer has to rotate by 90 degrees clockwise
    photo.save(tmp_path / "image.jpg", exif=exif, quality=95)
    close(load_image(tmp_path / "image.jpg"), photo.rotate(-90, expand=True), tolerance=16)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_picture_readable(photo, tmp_path):
    photo.save(tmp_path / "image.jpg", quality=95, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    close(load_image(tmp_path / "image.jpg"), photo, tolerance=16)


def test_the_content_decides_not_the_name(photo, tmp_path):
    photo.save(tmp_path / "image.jpg", format="PNG")
    close(load_image(tmp_path / "image.jpg"), photo)


def test_the_image_outlives_its_file(photo, tmp_path):
    photo.save(tmp_path / "image.png")
    image = load_image(tmp_path / "image.png")
    (tmp_path / "image.png").unlink()
    close(image, photo)


# ---------------------------------------------------------------------------------------- what cannot be read


def refused(path, reason, header_too=True, **options):
    """The error names file and reason in one line, and the check before training finds the same."""
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(path, **options)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and ": " in message
    with pytest.raises(ImageError, match=reason):
        check_image(path, decode=True, **options)
    if header_too:
        with pytest.raises(ImageError, match=reason):
            check_image(path, decode=False, **options)
    else:
        check_image(path, decode=False, **options)


def test_missing(tmp_path):
    refused(tmp_path / "none.png", "does not exist")


def test_folder(tmp_path):
    refused(tmp_path, "is a folder")


def test_name_that_no_file_can_have(tmp_path):
    refused(tmp_path / "a\0b", "cannot be opened")


def test_zero_bytes(tmp_path):
    (tmp_path / "image.jpg").touch()
    refused(tmp_path / "image.jpg", "is empty")


@pytest.mark.parametrize("content", [b"<html>404</html>", b'<svg xmlns="http://www.w3.org/2000/svg"/>', b"\x00" * 999])
def test_not_an_image(tmp_path, content):
    (tmp_path / "image.png").write_bytes(content)
    refused(tmp_path / "image.png", "not an image that Pillow can read")


@pytest.mark.parametrize(
    "options",
    [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}, {"format": "TIFF"}],
)
def test_truncated(tmp_path, options, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as importing lmms-eval leaves it
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, **options)
    (tmp_path / "image").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) * 2 // 3])
    refused(tmp_path / "image", "truncated or damaged", header_too=False)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest drops the module's own filter
def test_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    before = Image.MAX_IMAGE_PIXELS
    refused(tmp_path / "bomb.png", "10000 x 10000 pixels, and 100,000,000 or more are refused")
    assert Image.MAX_IMAGE_PIXELS == before


def test_bomb_that_pillow_itself_refuses(tmp_path):
    Image.new("1", (20_000, 9_000)).save(tmp_path / "bomb.png")
    refused(tmp_path / "bomb.png", "too many pixels")


def test_the_limit_is_a_parameter(photo, tmp_path):
    photo.save(tmp_path / "image.png")
    assert load_image(tmp_path / "image.png", max_pixels=40 * 24 + 1).size == (40, 24)
    refused(tmp_path / "image.png", "40 x 24 pixels, and 960 or more", max_pixels=40 * 24)


@pytest.mark.parametrize("values", [np.float32([[0.0, 0.5]]), np.int32([[0, 1 << 20]])])
def test_pixels_without_a_defined_white(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "image.tiff")
    refused(tmp_path / "image.tiff", "pixels, whose range is not known", header_too=False)
