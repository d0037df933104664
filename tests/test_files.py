"""What has its name is whole: files and folders that are written beside and renamed."""

import pytest

from fura_vlm.files import finish, unfinished, whole_file, whole_folder, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as building:
        building.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(ZeroDivisionError), whole_file(path) as building:
        building.write_text("two")
        1 / 0  # noqa: B018
    assert path.read_text() == "one" and names(path.parent) == ["a.txt"]
    write_text(path, "drei \udc80 ü")  # half a surrogate pair
    assert path.read_bytes() == "drei \\udc80 ü".encode()


def test_two_at_once_write_whole_files(tmp_path):
    path = tmp_path / "a"
    with whole_file(path) as one, whole_file(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and names(tmp_path) == ["a"]


def test_a_folder_appears_when_it_is_whole_and_takes_the_place_of_another(tmp_path):
    path = tmp_path / "in" / "a"
    unfinished(path).mkdir(parents=True)
    (unfinished(path) / "of one that was killed").touch()
    for name in ("one", "two"):
        with whole_folder(path) as building:
            (building / name).touch()
            assert not (path / name).exists()
        assert names(path) == [name]
    with pytest.raises(ZeroDivisionError), whole_folder(path) as building:
        (building / "three").touch()
        1 / 0  # noqa: B018
    assert names(path) == ["two"] and names(path.parent) == ["a"]


def test_finishing_what_others_wrote(tmp_path):
    path = tmp_path / "a"
    for name in ("one", "two"):
        unfinished(path).mkdir()
        (unfinished(path) / name).touch()
        finish(unfinished(path), path)
    assert names(path) == ["two"] and names(tmp_path) == ["a"]
