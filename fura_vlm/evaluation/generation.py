"""Answers to many questions about pictures: batched, padded on the left, the pictures prepared ahead of the model.

What is behind the model for lmms-eval, without lmms-eval. Three things keep a GPU busy:

- Pictures are decoded and resized by other processes, a whole batch ahead; only copying them to the GPU is left.
- The longest questions come first, so that a batch that does not fit in memory shows at once, and those of a length
  share batches: where nothing is padded, attention needs no mask and takes its fastest form.
- Keys and values are written into buffers that have room for the answer. transformers' own cache copies all of them
  for every new token: for LLaVA-1.5-7B, 640 tokens and a batch of 128, that is 43 GB a token. On a GPU the steps are
  CUDA graphs, too (``fura_vlm/decoding/loop.py``).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from accelerate.utils.memory import should_reduce_batch_size
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import Cache, DynamicCache, StoppingCriteriaList, StopStringCriteria
from transformers.cache_utils import DynamicLayer

from fura_vlm.data.messages import IMAGE
from fura_vlm.decoding.loop import Loop
from fura_vlm.errors import FuraVLMError, first_line
from fura_vlm.families.base import Family
from fura_vlm.families.messages import Message, Picture, Text

MAX_BATCH_SIZE = 256
"""Where ``auto`` starts."""


class EvaluationError(FuraVLMError):
    """An evaluation that cannot continue; the message names the task and the document."""


class Question(NamedTuple):
    """What is asked.

    Args:
        name: its name in an error: task and document.
        text: the question; a mark for a picture in it is left out, for pictures stand before it, as in training.
        pictures: loads its pictures, one, several or none; called in another process.
        arguments: for ``generate``, and ``until``, a list of strings that end an answer.
    """

    name: str
    text: str
    pictures: Callable[[], Sequence[Image.Image]]
    arguments: dict


class Answerer:
    """A model that answers questions in batches.

    Args:
        model: as it is or within a PEFT model, where it is to run.
        family: that of the model.
        dtype: of the pictures, that of the vision tower.
        batch_size: questions answered at once, or ``"auto"``: as many as fit, at most ``max_batch_size``. Either is
            halved, for good, when memory runs out.
        max_batch_size: the most that ``"auto"`` tries, by default ``MAX_BATCH_SIZE``.
        num_workers: processes that decode and preprocess ahead of the model; by default up to 8 beside a GPU, none
            without one.

    Attributes:
        batch_size: questions answered at once, as far as is known now.
        waited: seconds in which the model has waited for pictures, in the last call of ``answers``.

    Raises:
        EvaluationError: if a size is no number above 0 and ``batch_size`` not ``"auto"``.
    """

    def __init__(
        self,
        model,
        family: Family,
        dtype: torch.dtype,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        num_workers: int | None = None,
    ) -> None:
        self.model, self.family, self.dtype = model.eval(), family, dtype
        self.device = next(model.parameters()).device
        self.batch_size = batch_limit(batch_size, max_batch_size)
        if num_workers is None:
            num_workers = min(8, os.cpu_count() or 1) if self.device.type == "cuda" else 0
        self.num_workers, self.waited = num_workers, 0.0
        self._criteria: dict[tuple[str, ...], StoppingCriteriaList] = {}
        self._loop = Loop(model, family)
        # The workers are copies of this process; tokenizers would warn about its threads once for each of them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def answers(self, questions: Sequence[Question], progress: bool = True) -> Iterator[dict[int, str]]:
        """Yields the answers of each batch when they are there, by the number of the question.

        Questions with the same arguments share batches.

        Raises:
            EvaluationError: if a question cannot be answered; the message names it.
        """
        self.waited = 0.0
        lengths = self._lengths(questions)
        groups: dict[str, list[int]] = {}
        for number, question in enumerate(questions):
            groups.setdefault(repr(sorted(question.arguments.items())), []).append(number)
        for group in groups.values():
            group.sort(key=lambda number: -lengths[number])
        order = [number for group in groups.values() for number in group]
        prepared = iter(self._loader(questions, order))
        with tqdm(total=len(order), desc="answers", disable=not progress or not order, mininterval=1) as bar:
            for group in groups.values():
                while group:
                    size = _first_batch([lengths[number] for number in group[: self.batch_size + 1]], self.batch_size)
                    batch, group = group[:size], group[size:]
                    inputs = self._take(prepared, size)
                    try:
                        texts = self.in_parts(inputs, partial(self._generate, arguments=questions[batch[0]].arguments))
                    except Exception as error:
                        raise EvaluationError(f"{_names(questions, batch)}: {first_line(error)}") from error
                    yield dict(zip(batch, texts, strict=True))
                    bar.update(size)

    def _lengths(self, questions: Sequence[Question]) -> list[int]:
        """Their lengths in tokens, without conversation and pictures."""
        texts = [question.text for question in questions]
        return list(self.family.tokenizer(texts, return_length=True)["length"]) if texts else []

    def _loader(self, questions: Sequence[Question], order: list[int]) -> DataLoader:
        workers = min(self.num_workers, len(order))
        return DataLoader(
            Prepared(self.family, questions, self.dtype),
            sampler=order,
            batch_size=None,
            num_workers=workers,
            # Functions that load pictures need not be picklable: the workers are forks.
            multiprocessing_context=multiprocessing.get_context("fork") if workers else None,
            prefetch_factor=max(2, -(-self.batch_size // workers)) if workers else None,
            pin_memory=self.device.type == "cuda",
        )

    def _take(self, prepared: Iterator, count: int) -> list[dict]:
        start, inputs = time.perf_counter(), []
        for _ in range(count):
            item = next(prepared)
            if isinstance(item, EvaluationError):
                raise item
            inputs.append(item)
        self.waited += time.perf_counter() - start
        return inputs

    def in_parts(self, inputs: list, compute: Callable[[list], list]) -> list:
        """What ``compute`` makes of a batch, one for each of its inputs, in as many parts as memory asks for."""
        made: list = []
        while len(made) < len(inputs):
            part = inputs[len(made) : len(made) + self.batch_size]
            try:
                made += compute(part)
            except RuntimeError as error:
                if len(part) == 1 or not should_reduce_batch_size(error):
                    raise
                self.batch_size = len(part) // 2
                tqdm.write(f"Out of memory: batches of {self.batch_size} from now on", file=sys.stderr)
            else:
                continue
            gc.collect()  # after the except clause, because its traceback holds the tensors of the failed batch
            torch.cuda.empty_cache()
        return made

    @torch.inference_mode()
    def _generate(self, inputs: list[dict], arguments: dict) -> list[str]:
        until = arguments["until"]
        texts = written(
            self.model,
            self.family,
            inputs,
            **{name: value for name, value in arguments.items() if name != "until"},
            **self.how(arguments),
            stopping_criteria=self._ends(until),
        )
        return [cut(text, until) for text in texts]

    def how(self, arguments: dict) -> dict:
        """More arguments for ``generate``: steps as CUDA graphs, or else a cache with room for the answer, or nothing
        if a layer or beam search needs transformers' own."""
        if (arguments.get("num_beams") or self.model.generation_config.num_beams or 1) > 1:
            return {}
        if self._loop.able:
            return {"custom_generate": self._loop}
        layers = DynamicCache(config=self.model.config.get_text_config(decoder=True)).layers
        if any(type(layer) is not DynamicLayer for layer in layers):
            return {}
        return {"past_key_values": Cache(layers=[RoomyLayer(arguments["max_new_tokens"]) for _ in layers])}

    def _ends(self, until: list[str]) -> StoppingCriteriaList | None:
        """transformers' criterion for ``until``, made once, for it goes through the whole vocabulary."""
        if not until:
            return None
        if tuple(until) not in self._criteria:
            criterion = StopStringCriteria(self.family.tokenizer, until)
            self._criteria[tuple(until)] = StoppingCriteriaList([criterion])
        return self._criteria[tuple(until)]


def written(model, family: Family, inputs: Sequence[dict], **arguments) -> list[str]:
    """What a model writes to several prompts at once.

    Args:
        model: as it is or within a PEFT model, in evaluation mode.
        inputs: of each prompt what ``Family.inputs`` makes; pictures are taken in the model's dtype.
        arguments: for ``generate``.

    Returns: the answers without the tokens that end them, one for each prompt.
    """
    device, dtype = model.device, model.dtype
    batch = {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype, non_blocking=True)
        for name, value in family.batch(inputs).items()
    }
    ids = model.generate(**batch, pad_token_id=family.tokenizer.pad_token_id, **arguments)
    return family.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


class RoomyLayer(DynamicLayer):
    """Keys and values (n, heads, tokens, size) as views of buffers with room for ``room`` more tokens."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not start:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:-2], end + self.room, key_states.shape[-1])
            self._buffers = key_states.new_empty(shape), value_states.new_empty(shape)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return (self.keys, self.values) if start else (key_states, value_states)


class Prepared(Dataset):
    """Questions as the model takes them, each a batch of one (``Family.inputs``). Where preparing one fails, its
    ``EvaluationError`` stands in its place.
    """

    def __init__(self, family: Family, questions: Sequence[Question], dtype: torch.dtype):
        self.family, self.questions, self.dtype = family, questions, dtype

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, number: int) -> dict | EvaluationError:
        question = self.questions[number]
        try:
            pictures = list(question.pictures())
            if not all(isinstance(picture, Image.Image) for picture in pictures):
                raise TypeError("it has a video or a sound, and only pictures are used")
            inputs = self.family.inputs(messages_of(self.family, question.text, len(pictures)), pictures)
        except Exception as error:
            return EvaluationError(f"{question.name}: {first_line(error)}")
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def batch_limit(batch_size: int | str, max_batch_size: int | None = None) -> int:
    """The size to begin with.

    Raises:
        EvaluationError: as :class:`Answerer`.
    """
    if batch_size == "auto":
        batch_size = MAX_BATCH_SIZE if max_batch_size is None else max_batch_size
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise EvaluationError(f"batch_size is {batch_size!r}: give a number above 0, or auto")
    return int(batch_size)


def _first_batch(lengths: list[int], limit: int) -> int:
    """How many of the first questions make a batch: ``limit``, or fewer, at least half of it, up to where a new length
    begins.
    """
    changes = (number for number in range(-(-limit // 2), len(lengths)) if lengths[number] != lengths[number - 1])
    return min(next(changes, limit), limit, len(lengths))


def messages_of(family: Family, text: str, pictures: int) -> list[Message]:
    """A question as a conversation. Pictures stand before the words, as in training; marks for them that a task has
    written into its words are left out."""
    for mark in (IMAGE, family.placeholder):
        text = text.replace(mark, "") if mark else text
    return [Message("user", (*[Picture("")] * pictures, Text(text.strip())))]


def cut(text: str, until: Sequence[str]) -> str:
    """An answer up to the first of the strings that end it."""
    for end in until:
        text = text.split(end)[0]
    return text.strip()


def _names(questions: Sequence[Question], numbers: list[int]) -> str:
    more = f" and {len(numbers) - 8} more of its batch" if len(numbers) > 8 else ""
    return "; ".join(questions[number].name for number in numbers[:8]) + more
