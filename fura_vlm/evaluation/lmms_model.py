"""A model of any family, with or without an adapter, as a model of lmms-eval: batched, several processes.

lmms-eval finds it by the entry point in ``pyproject.toml``::

    python -m lmms_eval --model fura_vlm --model_args pretrained=BASE,adapter=FOLDER --tasks gqa --batch_size auto

What differs from lmms-eval's own ``llava_hf``: any batch size; an exception names the document and ends the
evaluation, where ``llava_hf`` goes on with an empty answer; no video library is needed; finished batches are kept on
disk, where a ``cache`` is named.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import version

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger
from transformers import GenerationConfig

import fura_vlm.fura  # noqa: F401  registers FuRA with PEFT
from fura_vlm.evaluation.answers import AnswerStore, request_key
from fura_vlm.evaluation.generation import Answerer, EvaluationError, Question, batch_limit
from fura_vlm.evaluation.source import find_model

MAX_NEW_TOKENS = 128
"""The limit if a task sets none: that of LLaVA's own evaluation scripts."""


class Answering(lmms):
    """A model for lmms-eval that writes answers: ``answer_with`` says how. It supports neither ``loglikelihood`` nor
    rounds of questions."""

    is_simple = True

    def answer_with(self, answerer, cache: str | None, identity: list[str]) -> None:
        """
        Args:
            answerer: an ``Answerer``, or what has its ``answers`` and ``batch_size``.
            cache: a folder for finished answers, or ``None``. Only greedy answers are kept.
            identity: all that an answer depends on besides its question.
        """
        self.answerer, self._identity = answerer, identity
        self._store = AnswerStore(cache, self._rank) if cache else None

    @property
    def batch_size(self) -> int:
        """Requests answered at once, as far as is known now."""
        return self.answerer.batch_size

    def loglikelihood(self, requests: list[Instance]):
        raise EvaluationError("fura_vlm generates answers; this task asks for log-likelihoods: choose another one")

    def generate_until_multi_round(self, requests: list[Instance]):
        raise EvaluationError("fura_vlm answers single questions; this task has several rounds: choose another one")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers, in the order of ``requests``.

        Raises:
            EvaluationError: if a request cannot be answered; the message has its task and document.
        """
        answers: list[str | None] = [None] * len(requests)
        keys, positions, questions = {}, [], []
        for position, request in enumerate(requests):
            if request.metadata.get("__padding_only__"):  # gives all processes as many requests; its answer is not used
                answers[position] = ""
                continue
            question = self._question(request)
            if self._store and not question.arguments["do_sample"]:
                keys[position] = self._key(request, question.arguments)
                answers[position] = self._store.get(keys[position])
            if answers[position] is None:
                positions.append(position)
                questions.append(question)
        for batch in self.answerer.answers(questions, progress=self._rank == 0):
            batch = {positions[number]: text for number, text in batch.items()}
            for position, text in batch.items():
                answers[position] = text
            if self._store:
                self._store.add({keys[position]: text for position, text in batch.items() if position in keys})
        return answers

    def _question(self, request: Instance) -> Question:
        context, arguments, doc_to_visual, document, task, split = request.args

        def pictures() -> list:
            visuals = doc_to_visual(self.task_dict[task][split][document])
            return visuals if isinstance(visuals, list) else [visuals] if visuals is not None else []

        return Question(f"{task}, document {document}", context, pictures, generation_arguments(arguments))

    def _key(self, request: Instance, generation: dict) -> str:
        context, _, _, document, task, split = request.args
        return request_key(
            model=self._identity,
            task=task,
            version=request.metadata.get("version"),
            data=self.task_dict[task][split]._fingerprint,
            document=document,
            context=context,
            generation=generation,
        )


class FuraVLM(Answering):
    """A model in this process.

    Args:
        pretrained: a model, merged or not (a folder or a name on the hub), a run folder, or an adapter's folder.
        adapter: any PEFT adapter over ``pretrained``.
        processor: where the processor is, if not with the model.
        batch_size: requests answered at once, or ``"auto"``: as many as fit, at most ``max_batch_size``. Either is
            halved, for good, when memory runs out.
        max_batch_size: the most that ``"auto"`` tries.
        device: where the model runs; by default the GPU of this process, or the CPU.
        dtype: ``"auto"`` is bfloat16 on a GPU and float32 elsewhere; or the name of a torch dtype.
        attn_implementation: as in transformers.
        num_workers: processes that decode and preprocess ahead of the model; by default up to 8 beside a GPU, none
            without one.
        cache: a folder for finished answers; by default none are kept. Only greedy answers are.

    Raises:
        ModelError: if model, adapter or processor cannot be used.
        EvaluationError: if ``batch_size`` is no number above 0 and not ``"auto"``.
    """

    def __init__(
        self,
        pretrained: str = "llava-hf/llava-1.5-7b-hf",
        adapter: str | None = None,
        processor: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        num_workers: int | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        batch_limit(batch_size, max_batch_size)  # before a large model is loaded
        source = find_model(str(pretrained), adapter)
        source = replace(source, processor=processor or source.processor)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            device = device or str(self.accelerator.device)
        model, family, used = source.place(dtype, device, attn_implementation)
        self.device = model.device
        identity = []
        if cache:
            name = str(used).removeprefix("torch.")
            identity = [source.fingerprint(), name, version("lmms-eval"), version("transformers")]
        answerer = Answerer(model, family, used, batch_size, max_batch_size, num_workers)
        self.answer_with(answerer, cache, identity)


_KNOWN = frozenset(GenerationConfig().to_dict()) | {"min_p", "typical_p"}
_FOR_OTHER_MODELS = frozenset({"image_aspect_ratio"})


def generation_arguments(task: dict | None) -> dict:
    """The arguments of ``generate`` for what a task asks, with ``until``, a list of strings that end an answer.

    lmms-eval's tasks write a temperature of 0 for greedy decoding, which transformers refuses, and name sampling
    settings beside it, which it warns about.
    """
    given = dict(task or {})
    until = given.pop("until", None) or []
    limit = given.pop("max_gen_toks", None)
    temperature = given.pop("temperature", None)
    sample = bool(given.pop("do_sample", temperature)) and temperature != 0
    settings = {name: given.pop(name, None) for name in ("top_p", "top_k")}
    arguments = {name: value for name, value in given.items() if name in _KNOWN}
    unknown = given.keys() - arguments.keys() - _FOR_OTHER_MODELS
    if unknown:
        logger.warning(f"Generation arguments that transformers does not know are left out: {sorted(unknown)}")
    if not sample:
        settings, temperature = {"top_p": None, "top_k": None}, None
    elif temperature is None:
        temperature = 1.0
    arguments |= {name: value for name, value in settings.items() if not sample or value is not None}
    arguments["max_new_tokens"] = given.get("max_new_tokens") or limit or MAX_NEW_TOKENS
    return arguments | {
        "until": [until] if isinstance(until, str) else list(until),
        "do_sample": sample,
        "temperature": temperature,
    }
