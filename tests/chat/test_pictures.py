"""Pictures are read by a process of its own, within limits."""

import os
import resource
import signal
import threading

import numpy as np
import psutil
import pytest
from hostile_pictures import hostile_pictures
from PIL import Image

from fura_vlm.chat.pictures import Pictures
from fura_vlm.data.images import ImageError, load_image


@pytest.fixture
def pictures():
    pictures = Pictures(seconds=1)
    pictures.others = readers()  # of chats that this process has served before
    yield pictures
    pictures.close()


@pytest.fixture
def noise(tmp_path) -> str:
    Image.effect_noise((300, 200), 90).convert("RGB").save(tmp_path / "noise.jpg")
    return str(tmp_path / "noise.jpg")


def readers(besides=()) -> list[psutil.Process]:
    found = [child for child in psutil.Process().children() if "fura_vlm.chat.pictures" in child.cmdline()]
    return [child for child in found if child not in besides]


def test_what_costs_too_much_is_refused_by_name(pictures, noise, tmp_path):
    """After each one a good picture is read, and nothing of it was read by this process."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in hostile_pictures(tmp_path):
        with pytest.raises(ImageError, match=f"^{name} takes too much time or memory to decode: save it anew"):
            pictures.read(str(tmp_path / name))
        Image.open(noise).save(noise)  # anew, so that it is not kept
        assert pictures.read(noise).size == (300, 200)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 200_000  # kilobytes
    assert len(readers(pictures.others)) == 1


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "L", "CMYK"])
def test_the_largest_pictures_that_are_meant_are_read(mode, tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (4990, 4990), dtype=np.uint16)
    image = Image.fromarray(values) if mode == "I;16" else Image.fromarray((values >> 8).astype(np.uint8)).convert(mode)
    name = str(tmp_path / ("large.tif" if mode == "CMYK" else "large.png"))
    image.save(name, **({"compression": "tiff_lzw"} if mode == "CMYK" else {"compress_level": 1}))
    pictures = Pictures()
    seen = pictures.read(name, (336, 336))
    assert np.array_equal(seen, load_image(name, draft=(336, 336)))
    assert pictures.header(name) == ((4990, 4990), False)
    pictures.close()


def test_a_process_that_was_killed_is_started_again(pictures, noise):
    assert pictures.header(noise).size == (300, 200)
    [reader] = readers(pictures.others)
    os.kill(reader.pid, signal.SIGKILL)
    with pytest.raises(ImageError, match="^noise.jpg takes too much"):
        pictures.read(noise)
    assert np.array_equal(pictures.read(noise), load_image(noise))


def test_a_picture_that_was_replaced_is_read_anew(pictures, noise):
    pictures.read(noise).paste("black", (0, 0, 300, 200))  # the caller's copy
    assert np.array_equal(pictures.read(noise), load_image(noise))
    Image.new("RGB", (30, 40), "red").save(noise)
    assert pictures.read(noise).size == pictures.header(noise).size == (30, 40)


def test_pictures_of_many_threads_are_not_mistaken(pictures, tmp_path):
    colours = [(number * 12, 255 - number * 12, number) for number in range(20)]
    for number, colour in enumerate(colours):
        Image.new("RGB", (10 + number, 10), colour).save(tmp_path / f"{number}.png")
    seen = {}

    def read(number):
        seen[number] = pictures.read(str(tmp_path / f"{number}.png"))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [((10 + number, 10), colour) for number, colour in enumerate(colours)]
    assert [(seen[number].size, seen[number].getpixel((5, 5))) for number in range(20)] == expected
