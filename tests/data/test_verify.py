import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fura_vlm.data.config import VerifyConfig
from fura_vlm.data.messages import DataError
from fura_vlm.data.records import read_records
from fura_vlm.data.verify import Counts, verify, verify_images

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
COMMAND = [str(Path(sys.executable).with_name("fura-vlm")), "data", "verify"]


@pytest.fixture
def mix(tmp_path, mixture):
    """A mixture as LLaVA v1.5's: images of several sources, some named twice, some not well."""
    good = tmp_path / "good"
    Image.effect_noise((60, 40), 90).convert("RGB").save(good, "JPEG")

    def put(name, content=None):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(good.read_bytes() if content is None else content)

    for name in ("coco/train2017/1.jpg", "coco/train2017/2.jpg", "coco/train2017/unused.jpg", "vg/VG_100K/1.jpg"):
        put(name)
    put("coco/train2017/list.txt", b"no image")
    put("gqa/images/cut.jpg", good.read_bytes()[:900])
    put("gqa/images/empty.jpg", b"")
    put("gqa/images/page.jpg", b"<html>404</html>")
    Image.new("P", (8, 8), 3).save(tmp_path / "book.gif")
    put("ocr_vqa/images/1.gif", (tmp_path / "book.gif").read_bytes())
    put("ocr_vqa/images/2.jpg", (tmp_path / "book.gif").read_bytes())
    names = [
        *("coco/train2017/1.jpg", "coco/train2017/1.jpg", "coco/train2017/2.jpg", "coco/train2017/3.jpg"),
        *("gqa/images/cut.jpg", "gqa/images/empty.jpg", "gqa/images/page.jpg"),
        *("ocr_vqa/images/1.jpg", "ocr_vqa/images/2.jpg", "vg/VG_100K/1.jpg", "textvqa/train_images/0.jpg"),
    ]
    records = [{"image": name, "conversations": "not looked at"} for name in names]
    return mixture([*records, {"conversations": []}, "no record"])


EXPECTED = {
    "coco": Counts(3, 2, 1, 0, 1),
    "gqa": Counts(3, 0, 0, 3, 0),
    "ocr_vqa": Counts(2, 2, 0, 0, 0),
    "vg": Counts(1, 1, 0, 0, 0),
    "textvqa": Counts(1, 0, 1, 0, 0),
}


def test_counts_and_list(mix, tmp_path):
    assert verify_images(mix, tmp_path, tmp_path / "report", 2, progress=False) == EXPECTED
    rows = [json.loads(line) for line in (tmp_path / "report/images.jsonl").read_text().splitlines()]
    assert [(row["source"], row["state"], row["image"]) for row in rows] == [
        ("coco", "extra", "coco/train2017/unused.jpg"),
        ("coco", "missing", "coco/train2017/3.jpg"),
        ("gqa", "broken", "gqa/images/cut.jpg"),
        ("gqa", "broken", "gqa/images/empty.jpg"),
        ("gqa", "broken", "gqa/images/page.jpg"),
        ("textvqa", "missing", "textvqa/train_images/0.jpg"),
    ]
    reasons = [row["reason"] for row in rows]
    assert "truncated" in reasons[2] and "is empty" in reasons[3] and "not an image" in reasons[4]


def test_a_second_run_decodes_what_is_new(mix, tmp_path):
    def counts():
        return verify_images(mix, tmp_path, tmp_path / "report", 2, progress=False)

    assert counts() == EXPECTED
    for number in (1, 2):  # damaged behind its back: same size and time
        path = tmp_path / f"coco/train2017/{number}.jpg"
        state = path.stat()
        path.write_bytes(b"\0" * state.st_size)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    shutil.copy(tmp_path / "good", tmp_path / "gqa/images/cut.jpg")  # fetched again
    mended = EXPECTED | {"gqa": Counts(3, 1, 0, 2, 0)}
    assert counts() == mended
    os.utime(tmp_path / "coco/train2017/1.jpg")
    assert counts() == mended | {"coco": Counts(3, 1, 1, 1, 1)}
    (tmp_path / "report/good.txt").unlink()
    assert counts() == mended | {"coco": Counts(3, 0, 1, 2, 1)}


def test_the_command(mix, tmp_path, capsys):
    with pytest.raises(DataError) as caught:
        verify(VerifyConfig(str(mix), workers=1))
    assert str(caught.value) == (
        f"2 images are missing and 3 are broken of the 10 that {mix} names in {tmp_path}: see {mix}.images/images.jsonl"
    )
    shown = capsys.readouterr().out
    assert [row.split() for row in shown.splitlines() if "gqa" in row] == ["│ gqa │ 3 │ 0 │ 0 │ 3 │ 0 │".split()]
    assert "None of 1 images in textvqa: pass the folder that holds textvqa/train_images/0.jpg" in shown

    record = {"image": "train2017/1.jpg"}
    mix.write_text(json.dumps([record]))
    verify(VerifyConfig(str(mix), str(tmp_path / "coco"), workers=1))
    assert f"All 1 images can be used. Train with --image_folder {tmp_path / 'coco'}" in capsys.readouterr().out


def test_what_training_leaves_out_is_not_good(mixture, tmp_path):
    """Images outside of the folder, and names that are no text; whatever else lies out there is not extra."""
    (tmp_path / "in/a").mkdir(parents=True)
    for name in ("in/a/1.png", "in/a/2.png", "in/a/3.png", "out.png", "other.png"):
        Image.new("L", (4, 4)).save(tmp_path / name)
    names = ["a/1.png", "../in/a/2.png", str(tmp_path / "in/a/3.png"), "./a/1.png"]
    names += ["../out.png", str(tmp_path / "out.png"), "a/\ud800.png"]
    path = mixture([{"id": name, "image": name, "conversations": TURNS} for name in names])
    found = verify_images(path, tmp_path / "in", tmp_path / "report", 1, progress=False)
    assert found == {"a": Counts(4, 3, 0, 1, 0), "..": Counts(1, 0, 0, 1, 0)}
    rows = [json.loads(line) for line in (tmp_path / "report/images.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == ["../out.png", "a/\ud800.png"]
    assert "leads out of the image folder" in rows[0]["reason"] and "half of a surrogate pair" in rows[1]["reason"]
    records, problems = read_records(path, tmp_path / "in")
    assert len(records) == 4 and len(problems) == 3


def test_paths_of_windows_and_addresses(mixture, tmp_path):
    (tmp_path / "coco").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "coco/1.png")
    names = ["coco\\1.png", "coco\\2.png", "https://x.org/a.png", "C:\\coco\\1.png"]
    found = verify_images(mixture([{"image": n} for n in names]), tmp_path, tmp_path / "report", 1, progress=False)
    assert found == {"coco": Counts(2, 1, 1), "https:": Counts(1, 0, 0, 1), ".": Counts(1, 0, 0, 1)}
    rows = [json.loads(line) for line in (tmp_path / "report/images.jsonl").read_text().splitlines()]
    assert {row["image"] for row in rows} == {"coco/2.png", *names[2:]}


def test_at_least_one_process(mix):
    with pytest.raises(DataError, match="workers is 0: give at least 1"):
        verify(VerifyConfig(str(mix), workers=0))


def test_links_that_lead_in_a_circle(mix, tmp_path):
    (tmp_path / "coco/train2017/up").symlink_to(tmp_path / "coco")
    assert verify_images(mix, tmp_path, tmp_path / "report", 1, progress=False) == EXPECTED


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on(tmp_path, mixture, number):
    names = [f"coco/{number}.jpg" for number in range(600)]
    (tmp_path / "coco").mkdir()
    Image.effect_noise((500, 400), 90).convert("RGB").save(tmp_path / names[0], quality=95)
    for name in names[1:]:
        os.link(tmp_path / names[0], tmp_path / name)
    path = mixture([{"image": name} for name in names])
    journal = Path(f"{path}.images/good.txt")
    process = subprocess.Popen(
        [*COMMAND, str(path), "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell that runs the tests in the background has them ignore Ctrl-C, and all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (journal.exists() and journal.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Stopped; the same command goes on" in output and "Traceback" not in output
    before = journal.read_text().splitlines()
    assert 0 < len(before) < len(names)
    done = subprocess.run([*COMMAND, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    after = journal.read_text().splitlines()
    assert after[: len(before)] == before and len(after) == len(names)


@pytest.mark.parametrize("content, reason", [([], "names no images"), ([{"conversations": []}], "names no images")])
def test_nothing_to_verify(mixture, tmp_path, content, reason):
    with pytest.raises(DataError, match=reason):
        verify_images(mixture(content), tmp_path, tmp_path / "report", 1)


def test_no_folder(mix, tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        verify(VerifyConfig(str(mix), str(tmp_path / "nowhere")))
