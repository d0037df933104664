"""The model for lmms-eval with every family: each answer is what the model and its own processor give alone."""

from pathlib import Path

import pytest
import torch
from family_models import BUILDERS
from family_talk import PICTURES
from lmms_eval.api.instance import Instance
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from fura_vlm.evaluation.generation import EvaluationError
from fura_vlm.evaluation.lmms_model import FuraVLM

LENGTH = 12
GREEDY = {"max_new_tokens": LENGTH, "temperature": 0, "do_sample": False}
QUESTIONS = ["What is this?", "How many are there in the picture? Describe it please.", "Is it red?"]


class Documents(list):
    _fingerprint = "tests"


WORDS = Documents({"pictures": [], "text": text} for text in QUESTIONS)
MIXED = Documents(
    {"pictures": [PICTURES[number] for number in numbers], "text": QUESTIONS[place % 3]}
    for place, numbers in enumerate([(1,), (), (2, 3), (3,), (1, 2), ()])
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=list(BUILDERS))
def folder(request, folder_of) -> Path:
    return folder_of(request.param)


def answers(folder: Path, documents: Documents, **settings) -> list[str]:
    model = FuraVLM(pretrained=str(folder), dtype="float32", device="cpu", **settings)
    model.task_dict = {"things": {"test": documents}}
    return model.generate_until(
        [
            Instance(
                "generate_until",
                (document["text"], dict(GREEDY), lambda document: document["pictures"], number, "things", "test"),
                0,
                {"task": "things", "doc_id": number, "repeats": 1},
            )
            for number, document in enumerate(documents)
        ]
    )


@torch.inference_mode()
def expected(folder: Path, documents: Documents) -> list[str]:
    """What transformers alone makes of each question."""
    processor, text_alone = AutoProcessor.from_pretrained(folder), folder.name == "text"
    if not text_alone:
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    cls = AutoModelForCausalLM if text_alone else AutoModelForImageTextToText
    model, made = cls.from_pretrained(folder, dtype=torch.float32).eval(), []
    for document in documents:
        parts = [{"type": "image", "image": picture} for picture in document["pictures"]]
        parts.append({"type": "text", "text": document["text"]})
        messages = [{"role": "user", "content": document["text"] if text_alone else parts}]
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=LENGTH)[0, inputs["input_ids"].shape[1] :]
        made.append(getattr(processor, "tokenizer", processor).decode(ids, skip_special_tokens=True).strip())
    return made


def test_any_batch_gives_the_answers_of_the_model_itself(folder):
    documents = WORDS if folder.name == "text" else MIXED
    alone = expected(folder, documents)
    assert len(set(alone)) > 1
    assert answers(folder, documents, batch_size=1) == alone
    assert answers(folder, documents, batch_size=len(documents)) == alone


def test_a_picture_for_a_model_of_text_alone(folder_of):
    with pytest.raises(EvaluationError, match="^things, document 1: it has a picture, and the model takes text alone$"):
        answers(folder_of("text"), Documents([WORDS[0], MIXED[0]]), batch_size=2)
