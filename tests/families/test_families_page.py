"""docs/families.md: its table is what the code says, and its example of a family is one that works."""

import json
import re
import shutil
from pathlib import Path

import pytest
import test_family_model
import test_methods
import test_planning
import test_tokens
import torch
import transformers
from family_models import BUILDERS, CHATML, _ids, _save, _text, bpe
from family_talk import assistant, user
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from fura_vlm.errors import ModelError
from fura_vlm.families import registry
from fura_vlm.families.base import EncodingError, Family
from fura_vlm.families.text import Language
from fura_vlm.modelling.load import load_base, load_family
from fura_vlm.training.methods import METHODS, compile_layers

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def mistral3(folder: Path) -> None:
    """Mistral Small 3.1: it has no file in families/, but is the page's example of one."""
    tokenizer = bpe(
        ["[IMG]", "[IMG_BREAK]", "[IMG_END]", "<|im_start|>", "<|im_end|>", "<pad>"],
        eos_token="<|im_end|>", pad_token="<pad>",
    )  # fmt: skip
    images = transformers.models.pixtral.image_processing_pil_pixtral.PixtralImageProcessorPil(
        size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}
    )
    processor = transformers.PixtralProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, spatial_merge_size=2,
        chat_template=CHATML.replace("IMAGE", "'[IMG]'"),
    )  # fmt: skip
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
            image_size=112, patch_size=14,
        ),
        text_config=transformers.MistralConfig(vocab_size=len(tokenizer), head_dim=8, **_text()),
        spatial_merge_size=2,
        tie_word_embeddings=False,
        **_ids(tokenizer, image_token_index="[IMG]"),
    )  # fmt: skip
    _save(folder, transformers.Mistral3ForConditionalGeneration, config, processor, tokenizer)


@pytest.fixture(scope="module")
def general(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistral3")
    mistral3(folder)
    return folder


@pytest.fixture(scope="module")
def example() -> type[Family]:
    """The class in the page's block of code."""
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert code.count("\n") < 80
    names = {"__name__": "fura_vlm.families.mistral3"}
    exec(compile(code, str(PAGE), "exec"), names)
    [made] = [value for value in names.values() if isinstance(value, type) and value.__module__ == names["__name__"]]
    return made


@pytest.fixture
def family(example, general, monkeypatch) -> Family:
    """Found as the page says: once it is among the families, its models are its own."""
    assert type(load_family(str(general))) is Family
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, example))
    found = load_family(str(general))
    assert type(found) is example
    return found


@pytest.fixture
def name() -> str:
    return "mistral3"


@pytest.fixture
def folder(general) -> Path:
    return general


# ---------------------------------------------------------------------------------------------------------- the table


def row_of(folder: Path) -> str:
    """What the code says of the family of a model, a small one to look at."""
    family, model = load_family(str(folder)), load_base(str(folder), torch.float32)
    cls = type(family)
    types = ", ".join(f"`{each}`" for each in cls.model_types)
    if not types:
        types = "any language model" if cls is Language else "any other that sees and writes"
    how = "the processor is asked" if cls.expansion is Family.expansion else "from the size alone"
    tokens = "none" if not family.sees else f"by its size: {how}" if family.needs_sizes else "always as many"
    methods = [method for method in METHODS if METHODS[method].language or family.names.projectors]
    projector = "none" if not family.names.projectors else "no: `full` or `frozen`"
    if family.names.projectors and test_methods.has_linear_projector(family, model):
        projector = "yes"
    compile_layers(model, family)
    assert any(each._compiled_call_impl for each in family.parts(model).decoder.modules())
    layers = family.parts(model).tower.modules() if family.sees else []
    compiled = "none" if not family.sees else "yes" if any(each._compiled_call_impl for each in layers) else "no"
    cells = [
        f"[`{cls.__module__.rpartition('.')[2]}`](../{cls.__module__.replace('.', '/')}.py)",
        types,
        tokens,
        "all" if len(methods) == len(METHODS) else f"all but {', '.join(sorted(METHODS.keys() - methods))}",
        projector,
        compiled,
        ", ".join(cls.conversations),
    ]
    return f"| {' | '.join(cells)} |"


def test_the_table_is_what_the_code_says(folder_of, general):
    by_class = {Family: general}
    for built in BUILDERS:
        by_class.setdefault(registry.family_class(AutoConfig.from_pretrained(folder_of(built))), folder_of(built))
    assert by_class.keys() == {*registry.FAMILIES, Language, Family}  # each has a small model, so that all is tested
    wanted = [row_of(by_class[cls]) for cls in (*registry.FAMILIES, Language, Family)]
    found = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| [`")]
    assert found == wanted, "put this into the page:\n" + "\n".join(wanted)


def test_the_page_names_every_method_and_files_that_exist():
    text = PAGE.read_text("utf-8")
    assert all(f"`{method}`" in text for method in METHODS)
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (PAGE.parent / link).exists(), link


# -------------------------------------------------------------------------------------------------------- the example


@pytest.mark.parametrize(
    "check",
    [
        test_tokens.test_tokens_are_the_processors_own,
        test_tokens.test_labels_are_on_the_answers_and_their_end,
        test_tokens.test_the_prompt_is_what_comes_before_the_answer,
        test_tokens.test_expansion_is_the_processors_for_odd_sizes,
        test_tokens.test_cut_never_halves_a_picture,
        test_tokens.test_typed_tokens_are_refused,
        test_family_model.test_rows_joined_are_what_the_processor_makes_of_the_batch,
    ],
)
def test_the_example_makes_the_processors_tokens(check, family, name):
    check(family, name)


@pytest.mark.parametrize(
    "check",
    [
        test_family_model.test_loss_and_gradients_are_the_models_own,
        test_family_model.test_a_blank_picture_changes_nothing_and_reaches_all,
        test_family_model.test_parts_cover_the_model,
    ],
)
def test_the_example_trains_as_its_model_does(check, family, name, general):
    model = AutoModelForImageTextToText.from_pretrained(general, dtype=torch.float32).train()
    check(family, model, name)


def test_the_examples_patches_need_no_processor(family, general):
    test_planning.test_patches_by_the_configuration_are_those_by_the_processor(family, general)


def test_the_example_refuses_a_picture_of_which_nothing_would_be_left(family):
    with pytest.raises(ValueError):
        family.pixels([Image.new("RGB", (2000, 1))])
    [made] = family.encode([([user(1, "What?"), assistant("No.")], [(2000, 1)])])
    assert isinstance(made, EncodingError) and "takes no picture" in str(made)


def test_the_example_says_what_the_general_family_says(family):
    general = Family(family.processor, family.config)
    general.check()
    family.check()
    assert family.names == general.names


@pytest.mark.parametrize("method", list(METHODS))
def test_without_a_file_every_method_trains(method, general, name):
    test_methods.test_each_method_trains_its_parts_and_learns(method, general, name)


# ----------------------------------------------------------------------------------------- what else the page says


def test_other_tokens_than_the_processors_are_refused(general):
    class Short(Family):
        def expansion(self, width, height):
            return super().expansion(width, height).removesuffix("[IMG_END]")

    family = load_family(str(general))
    with pytest.raises(ModelError, match="makes other attention_mask and input_ids of a conversation"):
        Short(family.processor, family.config).check()


def test_a_template_that_changes_answers_is_refused(general, tmp_path):
    shutil.copytree(general, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text("utf-8").replace("part['text']", "part['text'] | upper"), "utf-8")
    with pytest.raises(ModelError, match="cannot be trained here: the model's chat template changes answers"):
        load_family(str(tmp_path / "model"))


def test_code_of_a_models_own_is_not_run(tmp_path):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n", "utf-8")
    with pytest.raises(ModelError, match="brings Python code of its own, which is never run here"):
        load_family(str(tmp_path))
    assert not (tmp_path / "ran").exists()
