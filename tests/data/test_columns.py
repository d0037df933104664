"""Mixtures in columns, against what the datasets library itself reads and decodes."""

import json
import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fura_vlm.data.columns import address, names_columns
from fura_vlm.data.image_checks import check_images
from fura_vlm.data.images import ImageError, check_image, load_image
from fura_vlm.data.index import open_index
from fura_vlm.data.messages import DataError
from fura_vlm.data.records import iter_records, read_records
from fura_vlm.data.verify import Counts, verify_images

CONTENT = [{"text": datasets.Value("string"), "type": datasets.Value("string")}]
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "images": datasets.List(datasets.Image()),
        "messages": [{"role": datasets.Value("string"), "content": CONTENT}],
    }
)


def picture(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), dtype=np.uint8))


def row(number, pictures):
    """A row with one, two or no pictures, which are all different."""
    parts = [{"type": "image", "text": None}] * len(pictures) + [{"type": "text", "text": f"What is {number}?"}]
    answer = [{"type": "text", "text": f"It is {number}."}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"id": f"r{number}", "images": pictures, "messages": messages}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def made():
    rows = [row(number, [picture(10 * number + n) for n in range(number % 3)]) for number in range(7)]
    return datasets.Dataset.from_list(rows, features=FEATURES)


def save_parquet(made, folder):
    made.to_parquet(folder / "made.parquet", batch_size=3)
    return folder / "made.parquet"


def save_folder(made, folder):
    made.save_to_disk(folder / "made", num_shards=3)
    return folder / "made"


def save_splits(made, folder):
    datasets.DatasetDict({"test": made.select([0]), "train": made}).save_to_disk(folder / "made")
    return folder / "made"


def save_hub_snapshot(made, folder):
    (folder / "made/data").mkdir(parents=True)
    for shard in range(2):
        made.shard(2, shard, contiguous=True).to_parquet(folder / f"made/data/train-0000{shard}-of-00002.parquet")
    return folder / "made"


@pytest.mark.parametrize("save", [save_parquet, save_folder, save_splits, save_hub_snapshot])
def test_records_and_pictures_are_those_of_the_library(made, tmp_path, save):
    path = save(made, tmp_path)
    records, problems = read_records(path)
    assert not problems and [record.place for record in records] == [f"row {n}" for n in range(1, 8)]
    for record, expected in zip(records, made, strict=True):
        assert record.id == expected["id"] and record.file == str(path)
        question, answer = record.messages
        assert question.text == expected["messages"][0]["content"][-1]["text"]
        assert answer.text == expected["messages"][1]["content"][0]["text"]
        assert len(question.pictures) == len(record.pictures) == len(expected["images"])
        for source, image in zip(record.pictures, expected["images"], strict=True):
            assert address(source).file.endswith(".arrow")
            assert np.array_equal(np.asarray(load_image(source)), np.asarray(image))
            check_image(source, decode=False)
    good, broken = check_images(records, "decode")
    assert good == records and not broken


def test_one_picture_in_a_column_and_paths_in_another(tmp_path):
    picture(1).save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    features = datasets.Features(
        {"image": datasets.Image(), "conversations": [{k: datasets.Value("string") for k in ("from", "value")}]}
    )
    rows = [{"image": picture(2), "conversations": talk}, {"image": None, "conversations": talk}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "m.parquet")
    [record], [problem] = read_records(tmp_path / "m.parquet")
    assert np.array_equal(np.asarray(load_image(record.pictures[0])), np.asarray(picture(2)))
    assert problem.place == "row 2" and "<image> in the conversation but no image" in problem.reason

    # a picture that is not in the column but named in it; and plain bytes, as pandas writes them
    rows = {"images": [[{"bytes": None, "path": "a.png"}]], "conversations": [talk]}
    pq.write_table(pa.table(rows), tmp_path / "p.parquet")
    [record], problems = read_records(tmp_path / "p.parquet")
    assert record.pictures == [str(tmp_path / "a.png")] and not problems
    pq.write_table(
        pa.table({"image": [(tmp_path / "a.png").read_bytes()], "conversations": [talk]}), tmp_path / "b.parquet"
    )
    [record], problems = read_records(tmp_path / "b.parquet")
    assert np.array_equal(np.asarray(load_image(record.pictures[0])), np.asarray(picture(1))) and not problems


def test_pictures_and_sound_in_other_columns_are_problems(tmp_path):
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    for column in ("picture", "second", "audio"):
        table = pa.table({column: [{"bytes": b"abc", "path": None}], "messages": [talk]})
        pq.write_table(table, tmp_path / f"{column}.parquet")
        records, [problem] = read_records(tmp_path / f"{column}.parquet")
        assert not records and f"{column} holds a picture, which is not read" in problem.reason


def test_a_broken_picture_in_a_column_names_its_row(made, tmp_path):
    rows = [row(1, [{"bytes": b"no picture", "path": "a.png"}]), row(2, [{"bytes": b"", "path": None}]), row(3, [])]
    datasets.Dataset.from_list(rows, features=FEATURES).save_to_disk(tmp_path / "made")
    good, problems = check_images(read_records(tmp_path / "made")[0])
    assert [record.id for record in good] == ["r3"]
    assert [problem.place for problem in problems] == ["row 1", "row 2"]
    assert "not an image that Pillow can read" in problems[0].reason and "is empty" in problems[1].reason
    source = read_records(tmp_path / "made")[0][0].pictures[0]
    with pytest.raises(ImageError, match="has changed since its index was made"):
        load_image(source.replace("::0::images::0", "::0::images::5"))
    with pytest.raises(ImageError, match="does not exist"):
        load_image(source.replace("made", "gone"))


def test_reading_does_not_read_the_pictures(tmp_path):
    rows = [row(number, [{"bytes": bytes([number]) * 500_000, "path": None}]) for number in range(40)]
    datasets.Dataset.from_list(rows, features=FEATURES).save_to_disk(tmp_path / "made")
    del rows
    next(iter_records(tmp_path / "made"))  # what is imported and mapped
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    assert sum(record is not None for record, _ in iter_records(tmp_path / "made")) == 40
    held = pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 2_000_000, "of 20 MB"


def test_an_index_of_columns(made, tmp_path, llava):
    path = save_parquet(made.select([0, 1, 3, 4]), tmp_path)  # no, one, no and one picture
    dataset, advice = open_index(path, None, llava, 200, tmp_path / "run", progress=False).dataset(llava)
    assert len(dataset) == 4 and not dataset.problems and not advice
    assert dataset.has_image.tolist() == [False, True, False, True]
    expected = llava.processor.image_processor(picture(10), return_tensors="pt")["pixel_values"]
    assert dataset[1]["pictures"]["pixel_values"].equal(expected)
    again = open_index(path, None, llava, 200, tmp_path / "run", progress=False)
    assert len(list((tmp_path / "made.parquet.index").glob("*/index.json"))) == 1 and again.folder.parent.exists()
    whole = open_index(save_folder(made, tmp_path), None, llava, 200, tmp_path / "run", progress=False)
    dataset, _ = whole.dataset(llava)
    assert len(dataset) == 7 and not dataset.problems
    expected = llava.processor.image_processor([picture(20), picture(21)], return_tensors="pt")["pixel_values"]
    assert dataset[2]["pictures"]["pixel_values"].equal(expected) and len(expected) == 2
    assert (dataset[2]["input_ids"] == llava.run_id).sum() == 2 * llava.image_tokens


def test_pictures_of_columns_are_verified(made, tmp_path):
    path = save_parquet(made, tmp_path)
    assert verify_images(path, tmp_path, tmp_path / "report", 1, progress=False) == {"images": Counts(6, 6)}


def test_a_name_on_the_hub(made, tmp_path, monkeypatch):
    """The library is asked for the name, its configuration and split."""
    monkeypatch.chdir(tmp_path)
    seen, load = [], datasets.load_dataset
    snapshot = save_hub_snapshot(made, tmp_path)

    def from_hub(name, config=None):
        seen.append((name, config))
        return load(str(snapshot))

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    for name in ("user/set", "user/set:small", "user/set@train", "user/set:small@train"):
        records, problems = read_records(name)
        assert len(records) == 7 and not problems and records[0].file == name
    assert seen == [("user/set", None), ("user/set", "small")] * 2
    with pytest.raises(DataError, match="user/set@test has no split test; it has train: give user/set@train"):
        read_records("user/set@test")


def test_what_is_read_in_columns(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps([]))
    assert names_columns(tmp_path) and names_columns("a.parquet") and names_columns("user/name:config@train")
    assert not any(map(names_columns, ("data/train.json", "data/train.jsonl", tmp_path / "m.json", "name", "a/b/c")))


def test_what_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "bad.parquet").write_bytes(b"no Parquet")
    (tmp_path / "empty").mkdir()
    for path, reason in (
        (tmp_path / "bad.parquet", "bad.parquet cannot be read as a data set"),
        (tmp_path / "none.parquet", "none.parquet cannot be read .No such file"),
        (tmp_path / "empty", "empty cannot be read as a data set"),
        ("nobody/nothing-at-all", "nobody/nothing-at-all \\(not a file here, .*\\) cannot be read"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            read_records(path)
        assert "\n" not in str(caught.value) and "check data_path" in str(caught.value)
