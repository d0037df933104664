"""The model for lmms-eval, against transformers' own generation without batches or padding."""

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from eval_models import BASE, ROOT
from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2
from loguru import logger
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from fura_vlm.embedded.scenes import draw, make_scene
from fura_vlm.evaluation.answers import AnswerStore
from fura_vlm.evaluation.generation import EvaluationError
from fura_vlm.evaluation.lmms_model import FuraVLM, generation_arguments
from fura_vlm.evaluation.source import Source, find_model
from fura_vlm.families.vicuna import SYSTEM_PROMPT

GREEDY = {"max_new_tokens": 12, "temperature": 0, "do_sample": False, "top_p": 1.0, "num_beams": 1}
QUESTIONS = [
    "What is this?",
    "Is there a star in the image?\nAnswer yes or no.",
    "How many circles are there?",
    "Where?",
]


class Documents(list):
    _fingerprint = "tests"


PICTURES = [draw(make_scene(0, "eval", number)) for number in range(10)]
DOCUMENTS = Documents(
    {"pictures": PICTURES[n : n + (1, 1, 0, 2)[n % 4]], "text": QUESTIONS[n % 3] * (1 + n % 2)} for n in range(9)
)


def requests(generation=GREEDY, documents=DOCUMENTS, visuals=lambda document: document["pictures"]):
    return [
        Instance(
            "generate_until",
            (document["text"], dict(generation), visuals, number, "shapes", "test"),
            0,
            {"task": "shapes", "doc_id": number, "repeats": 1},
        )
        for number, document in enumerate(documents)
    ]


@pytest.fixture(scope="module")
def make(adapter):
    def make(**settings):
        model = FuraVLM(pretrained=BASE, adapter=str(adapter), dtype="float32", device="cpu", **settings)
        model.task_dict = {"shapes": {"test": DOCUMENTS}}
        return model

    return make


@pytest.fixture(scope="module")
def expected(adapter):
    """What transformers answers to each question alone, the prompt written out by hand."""
    processor = AutoProcessor.from_pretrained(BASE, backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    answers = []
    for document in DOCUMENTS:
        marks = " ".join(["<image>"] * len(document["pictures"]))
        text = f"{SYSTEM_PROMPT} USER: {marks}{marks and chr(10)}{document['text']} ASSISTANT:"
        inputs = processor(text=text, images=document["pictures"] or None, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (4, 2), (32, 0)])
def test_any_batch_gives_the_answers_of_one(batch_size, workers, make, expected):
    assert len(set(expected)) > 3
    assert make(batch_size=batch_size, num_workers=workers).generate_until(requests()) == expected


def test_questions_of_a_length_share_batches(make, expected):
    model = make(batch_size=4)
    generate, padding = model.answerer.model.generate, []

    def watched(**inputs):
        padding.append((inputs["attention_mask"] == 0).sum(1).tolist())
        return generate(**inputs)

    model.answerer.model.generate = watched
    alike = Documents({"pictures": PICTURES[:1], "text": text} for text in ("Where?",) * 3 + ("Where is it?",) * 3)
    model.task_dict = {"shapes": {"test": alike}}
    model.generate_until(requests(documents=alike))
    assert padding == [[0, 0, 0], [0, 0, 0]]


def test_beams(make):
    model = make()
    processor, beams = model.answerer.family.processor, {"do_sample": False, "num_beams": 3, "max_new_tokens": 6}
    text = f"{SYSTEM_PROMPT} USER: <image>\n{DOCUMENTS[0]['text']} ASSISTANT:"
    inputs = processor(text=text, images=DOCUMENTS[0]["pictures"], return_tensors="pt")
    ids = model.answerer.model.generate(**inputs, **beams)[0, inputs["input_ids"].shape[1] :]
    answer = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert model.generate_until(requests(GREEDY | beams))[0] == answer


def test_adapter_changes_the_answers(make, expected):
    model = FuraVLM(pretrained=BASE, dtype="float32", device="cpu")
    model.task_dict = {"shapes": {"test": DOCUMENTS}}
    assert model.generate_until(requests()) != expected


def test_until_ends_an_answer(make, expected):
    word = next(word for word in expected[0].split()[1:] if word not in expected[0].split()[0])
    ended = make().generate_until(requests(GREEDY | {"until": [word, "never said"]}))
    assert ended == [answer.split(word)[0].strip() for answer in expected]


def test_groups_keep_the_order(make, expected):
    mixed = requests()
    for number in (1, 4, 5):
        mixed[number] = requests(GREEDY | {"max_new_tokens": 1})[number]
    answers = make().generate_until(mixed)
    for number, answer in enumerate(answers):
        if number in (1, 4, 5):
            assert len(answer) < len(expected[number]) and expected[number].startswith(answer)
        else:
            assert answer == expected[number]


def test_sampling_is_honoured(make, expected):
    model = make()
    sampled = requests({"max_new_tokens": 12, "temperature": 3.0})
    torch.manual_seed(0)
    first = model.generate_until(sampled)
    torch.manual_seed(0)
    assert model.generate_until(sampled) == first
    torch.manual_seed(1)
    assert model.generate_until(sampled) != first
    assert first != expected


@pytest.mark.parametrize(
    "task, sample, temperature",
    [
        ({"temperature": 0, "do_sample": True}, False, None),
        ({"temperature": 0.5}, True, 0.5),
        ({"do_sample": True}, True, 1.0),
        ({"until": "ASSISTANT:"}, False, None),
        (None, False, None),
    ],
)
def test_tasks_ways_to_ask(task, sample, temperature):
    arguments = generation_arguments(task)
    assert (arguments["do_sample"], arguments["temperature"]) == (sample, temperature)
    assert arguments["until"] == (["ASSISTANT:"] if task and "until" in task else [])


@pytest.mark.parametrize("workers", [0, 2])
def test_error_names_the_document(workers, make):
    def visuals(document):
        if document is DOCUMENTS[5] or document == DOCUMENTS[5]:
            raise OSError("the picture is cut off")
        return document["pictures"]

    with pytest.raises(EvaluationError, match="^shapes, document 5: the picture is cut off$"):
        make(num_workers=workers).generate_until(requests(visuals=visuals))


def test_videos_are_refused(make):
    with pytest.raises(EvaluationError, match="shapes, document 1: it has a video"):
        make().generate_until(requests(visuals=lambda document: ["clip.mp4"]))


def test_memory_runs_out(make, expected):
    model = make(batch_size="auto")
    generate, tried = model.answerer.model.generate, []

    def small_memory(**inputs):
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return generate(**inputs)

    model.answerer.model.generate = small_memory
    assert model.generate_until(requests()) == expected
    assert model.batch_size == 2 and tried == [9, 4, 2, 2, 2, 2, 1]


def test_interrupted_answers_are_not_asked_again(make, expected, tmp_path):
    class Switch(Exception):
        pass

    seen = []

    def visuals(document):
        seen.append(document)
        if len(seen) > 6:
            raise Switch("off")
        return document["pictures"]

    with pytest.raises(EvaluationError, match="off"):
        make(batch_size=1, cache=str(tmp_path)).generate_until(requests(visuals=visuals))
    [file] = tmp_path.iterdir()
    assert len(file.read_text().splitlines()) == 6
    file.write_text(file.read_text()[:-20])  # a crash in the middle of a line

    seen.clear()
    later = requests(visuals=lambda document: seen.append(document) or document["pictures"])
    assert make(batch_size=1, cache=str(tmp_path)).generate_until(later) == expected
    assert len(seen) == 4
    seen.clear()
    assert make(cache=str(tmp_path)).generate_until(later) == expected
    assert not seen
    make(cache=str(tmp_path)).generate_until(requests(GREEDY | {"max_new_tokens": 3}))  # other arguments, other answers
    assert len(file.read_text().splitlines()) == 5 + 4 + 9  # the broken row is gone


def test_answers_survive_line_separators_and_cut_characters(tmp_path):
    AnswerStore(tmp_path).add({"one": "a\u2028b\x85c", "two": "\u00e9" * 5})
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[: -len('\u00e9"}\n'.encode()) - 1])  # a crash in the middle of a character
    store = AnswerStore(tmp_path)
    assert store.get("one") == "a\u2028b\x85c" and store.get("two") is None
    store.add({"two": "b"})
    assert AnswerStore(tmp_path).get("two") == "b"


def test_rows_that_are_no_answers_are_skipped_with_a_word(tmp_path):
    for rank in (0, 1):
        AnswerStore(tmp_path, rank).add({f"{rank} one": "a", f"{rank} two": "b"})
    broken = [b"null", b"[1]", b"{}", b'{"key": 1, "answer": "a"}', b'{"key": "k"}', b"\xff\xfe", b"", b"[" * 100_000]
    for rank in (0, 1):
        file = tmp_path / f"answers-{rank}.jsonl"
        first, second = file.read_bytes().splitlines()
        file.write_bytes(b"\n".join([first, *broken, second, b'{"key": "cut']))
    said = []
    sink = logger.add(said.append, level="WARNING")
    store = AnswerStore(tmp_path)
    assert [store.get(f"{rank} {name}") for rank in (0, 1) for name in ("one", "two")] == ["a", "b"] * 2
    assert len(said) == 2 and "answers-0.jsonl: these lines are not readable as an answer: 2, 3, 4," in said[0]
    AnswerStore(tmp_path)
    logger.remove(sink)
    assert len(said) == 3 and "answers-1.jsonl" in said[2]  # its own file is mended, the other's is left to the other
    assert (tmp_path / "answers-1.jsonl").read_bytes().endswith(b'{"key": "cut')


def test_what_ends_an_answer_is_part_of_the_fingerprint(tmp_path):
    for file in Path(BASE).iterdir():
        (tmp_path / file.name).symlink_to(file.resolve())
    before = find_model(str(tmp_path)).fingerprint()
    assert find_model(str(tmp_path)).fingerprint() == before
    settings = json.loads((tmp_path / "generation_config.json").read_text()) | {"eos_token_id": 5}
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert find_model(str(tmp_path)).fingerprint() != before


def test_lmms_eval_finds_the_model():
    section = (ROOT / "pyproject.toml").read_text().split('[project.entry-points."lmms_eval.models"]')[1]
    name, value = re.match(r'\s*(\w+) = "(.+)"', section).groups()
    manifest = EntryPoint(name, value, "lmms_eval.models").load()()
    assert manifest.model_id == name
    registry = ModelRegistryV2()
    registry.register_manifest(manifest)
    assert registry.get_model_class("fura_llava") is FuraVLM


def test_batch_size_must_be_a_number():
    with pytest.raises(EvaluationError, match="give a number above 0, or auto"):
        FuraVLM(pretrained=BASE, batch_size="many")


def test_published_processors_pad_here(make):
    model = make()
    assert model.answerer.family.processor.image_processor.do_pad
    wide = Image.new("RGB", (112, 56), "red")
    batch = model.answerer.family.processor(text="<image>", images=[wide], return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(batch[:, 0, :].mean(-1), torch.zeros(3), atol=0.02)  # the mean colour, normalised


def test_a_run_that_trained_all_weights(tmp_path):
    for folder in ("model", "processor"):
        (tmp_path / folder).mkdir()
    (tmp_path / "config.yaml").write_text("{}")
    assert find_model(str(tmp_path)) == Source(str(tmp_path / "model"), None, str(tmp_path / "processor"))
