"""What a LLaVA with another language model is put together from."""

import json

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from fura_vlm.embedded.embedded import EmbeddedError
from fura_vlm.embedded.parts import FIRST_SCENE, write_captions, write_tower
from fura_vlm.embedded.scenes import draw, make_scene, split_of


def test_the_tower_sees_what_the_embedded_model_sees(tmp_path):
    write_tower(tmp_path / "tower")
    whole = LlavaForConditionalGeneration.from_pretrained("data/tiny-llava", dtype=torch.float32).eval()
    tower = CLIPVisionModel.from_pretrained(tmp_path / "tower").eval()
    pixels = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        seen = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        expected = whole.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(seen, expected)
    with pytest.raises(EmbeddedError, match="exists: remove it"):
        write_tower(tmp_path / "tower")


def test_captions_are_records_of_llava_about_scenes_for_training(tmp_path):
    folder = tmp_path / "captions"
    assert write_captions(folder, 6) and not write_captions(folder, 6)
    records = json.loads((folder / "captions.json").read_text())
    assert len(records) == 6 == len(list((folder / "images").iterdir()))
    for index, record in enumerate(records):
        scene = make_scene(0, "train", FIRST_SCENE + index)
        assert split_of(scene) == "train"
        assert Image.open(folder / record["image"]).tobytes() == draw(scene).tobytes()
        asked, said = record["conversations"]
        assert (
            asked == {"from": "human", "value": "<image>"}
            and said["from"] == "gpt"
            and said["value"].endswith((".", "\n"))
        )
    assert len({record["conversations"][1]["value"] for record in records}) == 6
    assert write_captions(folder, 5)  # other settings, the same kind of folder
    (folder / "recipe.json").unlink()
    with pytest.raises(EmbeddedError, match="holds something else"):
        write_captions(folder, 6)
