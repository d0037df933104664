"""The index gives what reading and tokenizing the mixture gives, and is made once."""

import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fura_vlm.data import index as module
from fura_vlm.data.collator import Collator
from fura_vlm.data.dataset import ConversationDataset
from fura_vlm.data.image_checks import check_images
from fura_vlm.data.index import open_index
from fura_vlm.data.messages import DataError
from fura_vlm.data.records import read_records


def record(name, question="What is this?", answer="A cat", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns} | more


@pytest.fixture
def items(tmp_path):
    """Good and bad records, with three pictures of which one is broken and one missing."""
    (tmp_path / "a").mkdir()
    Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / "a/1.png")
    (tmp_path / "a/cut.png").write_bytes((tmp_path / "a/1.png").read_bytes()[:600])
    return [
        record("picture", "<image>\nWhat is this?", image="a/1.png"),
        record("text"),
        record("no answer", answer=""),
        record("long", "<image>\nWhat?", "A cat " * 50, image="a/1.png"),
        record("broken", "<image>\nWhat?", image="a/cut.png"),
        record("end token", "What is </s>?"),
        record("missing", "<image>\nWhat?", "A cat " * 50, image="a/none.png"),
        "no record",
        record("猫", "猫は？", "はい"),
        record("picture again", "What is this?\n<image>", "A dog.", image="a/1.png"),
        record("last"),
    ]


@pytest.fixture
def opened(llava, tmp_path):
    def open_(path, max_length=80, image_folder=None, family=llava):
        return open_index(path, image_folder, family, max_length, tmp_path / "elsewhere")

    return open_


def same(dataset, other):
    assert len(dataset) == len(other) > 0
    assert dataset.lengths.tolist() == other.lengths.tolist()
    assert dataset.has_image.tolist() == other.has_image.tolist()
    for row, expected in zip(dataset, other, strict=True):
        row, expected = row | row.pop("pictures"), expected | expected.pop("pictures")
        assert row.keys() == expected.keys()
        assert all(torch.equal(row[key], expected[key]) and row[key].dtype == expected[key].dtype for key in row)


def names(problems):
    return sorted((problem.place, problem.record, problem.reason, problem.skipped) for problem in problems)


@pytest.mark.parametrize("part", [1, 3, 11, 20_000])
@pytest.mark.parametrize("lines", [False, True])
def test_it_is_what_reading_gives(mixture, items, llava, opened, monkeypatch, part, lines):
    monkeypatch.setattr(module, "PART", part)
    path = mixture("\n".join(map(json.dumps, items)) if lines else items)
    records, problems = read_records(path)
    good, broken = check_images(records)
    expected = ConversationDataset(good, llava, 80)

    index = opened(path)
    dataset, advice = index.dataset(llava)
    same(dataset, expected)
    assert names(dataset.problems) == names(problems + broken + expected.problems)
    assert len([problem for problem in dataset.problems if problem.skipped]) == 5 and not advice
    assert len(index.files) == (len(items) // part + 1)
    assert index.folder.parent == path.with_name("mixture.json.index")


def test_it_is_made_once(mixture, items, llava, opened):
    path = mixture(items)
    first, _ = opened(path).dataset(llava)
    state = path.stat()
    path.write_bytes(b" " * state.st_size)  # nobody reads this
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    again, _ = opened(path).dataset(llava)
    same(again, first)
    assert names(again.problems) == names(first.problems)


def test_what_the_rows_depend_on_is_another_index(
    mixture, items, llava, llava_of, tokenizer, legacy_tokenizer, opened, tmp_path
):
    path = mixture(items)
    first = opened(path)
    longer = opened(path, max_length=90)
    (tmp_path / "b").mkdir()
    elsewhere = opened(path, image_folder=tmp_path / "b")
    legacy = opened(path, family=llava_of(legacy_tokenizer))
    larger = opened(path, family=llava_of(tokenizer, 42))
    folders = {index.folder for index in (first, longer, elsewhere, legacy, larger)}
    assert len(folders) == 5 and all(folder.is_dir() for folder in folders)

    mixture(items[:2])
    changed = opened(path)
    assert [folder.name for folder in changed.folder.parent.iterdir() if folder.is_dir()] == [changed.folder.name]
    assert len(changed.dataset(llava)[0]) == 2


def test_captions_for_pretraining(mixture, items, tokenizer, llava_of, opened):
    path, plain = mixture(items), llava_of(tokenizer, conversation="plain")
    index = opened(path, family=plain)
    same(index.dataset(plain)[0], ConversationDataset(_good(path), plain, 80))
    assert index.folder != opened(path).folder


def test_an_interrupted_making_goes_on(mixture, items, llava, opened, monkeypatch):
    monkeypatch.setattr(module, "PART", 3)
    path = mixture(items)
    write, done = module._write_part, []

    def interrupted(file, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(file)
        return write(file, *rest)

    monkeypatch.setattr(module, "_write_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened(path)
    times = [file.stat().st_mtime_ns for file in done]
    monkeypatch.setattr(module, "_write_part", write)
    index = opened(path)
    assert [os.stat(file).st_mtime_ns for file in index.files[:2]] == times
    assert not list(index.folder.parent.rglob("*.tmp"))
    shutil.rmtree(index.folder)
    same(index_of := opened(path).dataset(llava)[0], ConversationDataset(_good(path), llava, 80))
    assert names(index_of.problems) == names(index.dataset(llava)[0].problems)


def _good(path):
    return check_images(read_records(path)[0])[0]


def test_two_processes_make_one(mixture, items, llava, opened):
    path = mixture(items)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(opened, [path, path])
    assert one == two


def test_files_are_read_by_datasets(mixture, items, opened, llava):
    index = opened(mixture(items))
    rows = datasets.Dataset.from_file(index.files[0])
    assert rows.column_names == ["input_ids", "supervised", "runs", "length", "images", "file", "place", "id"]
    assert rows[0]["id"] == "picture" and len(rows[0]["input_ids"]) == len(rows[0]["supervised"])
    assert llava.tokenizer.decode(rows[1]["input_ids"]).endswith("ASSISTANT: A cat</s>")


def test_processes_map_the_files(mixture, items, opened, llava):
    index = opened(mixture(items))
    dataset, _ = index.dataset(llava)
    sent = pickle.dumps(dataset)
    assert len(sent) < 50_000
    same(pickle.loads(sent), dataset)
    loader = DataLoader(dataset, 4, num_workers=2, collate_fn=Collator(llava))
    assert sum(len(batch["input_ids"]) for batch in loader) == len(dataset)
    shutil.rmtree(index.folder)
    with pytest.raises(DataError, match=r"part-00000.arrow is not on this machine: keep the mixture where all"):
        pickle.loads(sent)[0]


def test_half_characters_in_an_id_or_a_path(mixture, items, opened, llava):
    path = mixture([items[0], record("\ud800"), record("2", "<image>\nWhat?", image="\ud800.png")])
    dataset, _ = opened(path).dataset(llava)
    assert len(dataset) == 2 and dataset._table["id"].to_pylist() == ["picture", "\\ud800"]
    [problem] = dataset.problems
    assert problem.record == "2" and "half of a surrogate pair" in problem.reason


def test_a_damaged_file(mixture, items, opened, llava):
    index = opened(mixture(items))
    with open(index.files[0], "r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=f"The index {index.folder} is damaged .*: remove it"):
        opened(index.mixture).dataset(llava)


def test_where_nothing_can_be_written_beside_the_mixture(mixture, items, opened, tmp_path):
    path = mixture(items)
    path.with_name("mixture.json.index").touch()  # in the way
    assert opened(path).folder.parent == tmp_path / "elsewhere"


def test_it_is_used_from_another_folder(mixture, items, llava, tmp_path, monkeypatch):
    mixture(items)
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    made = open_index("mixture.json", ".", llava, 80, "elsewhere")
    monkeypatch.chdir(tmp_path / "b")
    again = open_index("../mixture.json", "..", llava, 80, "elsewhere")
    assert again.folder == made.folder
    dataset, _ = again.dataset(llava)
    assert {problem.file for problem in dataset.problems} == {str(tmp_path / "mixture.json")}
    same(dataset, ConversationDataset(_good(tmp_path / "mixture.json"), llava, 80))


def test_somebody_elses_index(mixture, items, opened, llava, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "DECODE_UP_TO", 2)
    path = mixture(items)
    index = opened(path)
    monkeypatch.setattr(module.os, "access", lambda folder, mode: index.folder != folder)
    assert len(opened(path).dataset(llava, "decode")[0]) == 6
    assert not (index.folder / "images.json").exists()
    (tmp_path / "a/1.png").unlink()  # has been found good
    assert len(opened(path).dataset(llava)[0]) == 6
    assert opened(path).folder == index.folder


def test_good_images_of_a_large_mixture_are_checked_once(mixture, items, opened, llava, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "DECODE_UP_TO", 2)
    path = mixture(items)
    assert len(opened(path).dataset(llava, "decode")[0]) == 6
    shutil.copy(tmp_path / "a/1.png", tmp_path / "a/cut.png")  # mended
    (tmp_path / "a/1.png").unlink()
    dataset, _ = opened(path).dataset(llava)
    assert len(dataset) == 7
    with pytest.raises(DataError, match="1.png does not exist"):
        dataset[0]
    assert len(opened(path).dataset(llava, "none")[0]) == 8


# --------------------------------------------------------------------------------------- images sit elsewhere


@pytest.mark.parametrize(
    "there, hint",
    [
        ("pictures/a/1.png", "a/1.png is in {folder}/pictures: pass --image_folder {folder}/pictures"),
        ("1.png", "a/1.png is there as {folder}/1.png: ln -s {folder} {folder}/a"),
        ("x/y/a/1.png", "a/1.png is in {folder}/x/y: pass --image_folder {folder}/x/y"),
        (None, "pass the folder that holds a/1.png as --image_folder"),
    ],
)
def test_all_images_sit_elsewhere(mixture, opened, llava, tmp_path, there, hint):
    if there:
        (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / there).touch()
    path = mixture([record("1", "<image>\nWhat?", image="a/1.png"), record("text")])
    with pytest.raises(DataError) as caught:
        opened(path).dataset(llava)
    assert str(caught.value) == f"None of the 1 images of {path} is in {tmp_path}: " + hint.format(folder=tmp_path)


def test_the_folder_of_the_images_is_one_too_deep(mixture, opened, llava, tmp_path, items):
    path = mixture(items[:2])
    with pytest.raises(DataError, match=f"a/1.png is in {tmp_path}: pass --image_folder {tmp_path}$"):
        opened(path, image_folder=tmp_path / "a").dataset(llava)


def test_one_source_sits_elsewhere(mixture, opened, llava, tmp_path, items):
    (tmp_path / "train2017").mkdir()
    shutil.copy(tmp_path / "a/1.png", tmp_path / "train2017/7.png")
    path = mixture([*items[:2], record("7", "<image>\nWhat?", image="coco/train2017/7.png")])
    dataset, advice = opened(path).dataset(llava)
    assert len(dataset) == 2
    target, link = tmp_path / "train2017", tmp_path / "coco/train2017"
    assert advice == (
        f"None of 1 images in coco: coco/train2017/7.png is there as {target}/7.png: "
        f"mkdir -p {link.parent} && ln -s {target} {link}"
    )
    link.parent.mkdir()
    link.symlink_to(target)
    assert len(opened(path).dataset(llava)[0]) == 3
