"""The advice is run as it is given."""

import shlex
import subprocess

from fura_vlm.data.locate import image_hint


def test_advice_for_folders_with_spaces_can_be_pasted(tmp_path):
    folder, found = tmp_path / "my data", tmp_path / "my data/more pictures"
    (found / "train").mkdir(parents=True)
    (found / "train/a b.jpg").touch()
    advice = image_hint(folder, ["train/a b.jpg"])
    assert shlex.split(advice.partition("pass ")[2]) == ["--image_folder", str(found)]
    command = image_hint(folder, ["coco/train/a b.jpg"]).partition(": ")[2]
    subprocess.run(command, shell=True, check=True)
    assert (folder / "coco/train/a b.jpg").is_file()
