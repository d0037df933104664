"""Many answers at once over one copy of the weights.

One thread owns the model. Between two tokens it takes in a question that waits (its prompt is read alone, so that
nobody waits for more than one) and lets go of the answers that are complete or no longer wanted. Answers of the same
adapter are decoded together as one batch, a token each per step; the batches take turns. Since nothing else calls the
model, PEFT's switch between adapters, which is one for the whole model, concerns no one else.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections import deque

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import DynamicCache, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from fura_vlm.chat.partner import ChatError, Generation, Sampling, Writer
from fura_vlm.chat.threads import thread_tuner
from fura_vlm.decoding.rows import Alone, Decoder, Rows, can_join
from fura_vlm.errors import first_line
from fura_vlm.families.base import Family

SWITCHED = BaseTunerLayer, AuxiliaryTrainingWrapper  # what PEFT turns on and off


START_SECONDS = 2  # for choosing the number of threads before the first question


class Engine(Writer):
    """Answers many questions with one model. Thread-safe.

    Args:
        model: as it is or within a PEFT model, in evaluation mode. From now on nothing else may call it.
        family: that of the model.
        max_rows: answers written at the same time; more wait, first come, first served.
        graphs: steps as CUDA graphs, where the model is on one GPU and allows it.
    """

    def __init__(self, model, family: Family, max_rows: int = 24, graphs: bool = True):
        self.model, self._family = model, family
        self._peft = model.base_model if isinstance(model, PeftModel) else None
        self._switches = [] if self._peft is None else [m for m in model.modules() if isinstance(m, SWITCHED)]
        self._plain = model.get_base_model() if isinstance(model, PeftModel) else model
        settings, text_config = self._plain.generation_config, self._plain.config.get_text_config(decoder=True)
        ends = settings.eos_token_id or text_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list) else {ends}
        penalty = getattr(settings, "repetition_penalty", None) or 1.0
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1.0 else None
        self._joins, self._text_config = can_join(text_config), text_config
        self._decoder = Decoder(self._plain, family, graphs)
        takes = inspect.signature(self._plain.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._max_rows = max_rows
        self._adapter: str | None = None  # that the model is switched to
        self._active = model.active_adapter if self._peft is not None else None  # that PEFT turns on
        self._enable(False)
        self._waiting: deque[Generation] = deque()
        self._writing: list[Generation] = []
        self._batches: dict[tuple, Rows | Alone] = {}
        self._kept: dict[tuple, Rows] = {}  # which nothing is written to, with their graphs
        self._wake = threading.Condition()
        self._closed = False
        self._threads = thread_tuner(self._plain.device)  # one: a change between prompts and tokens takes time itself
        self._thread = threading.Thread(target=self._run, name="chat-engine", daemon=True)
        self._thread.start()

    def submit(self, inputs: dict[str, torch.Tensor], adapter: str | None, sampling: Sampling) -> Generation:
        generation = Generation(dict(inputs), adapter, sampling)
        with self._wake:
            if self._closed:
                raise ChatError("The chat is closing")
            self._waiting.append(generation)
            self._wake.notify()
        return generation

    @property
    def load(self) -> tuple[int, int]:
        return sum(not generation.done for generation in self._writing), len(self._waiting)

    def close(self, seconds: float | None = None) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(seconds)

    # ------------------------------------------------------------------------------------------ the engine's thread

    @torch.inference_mode()
    def _run(self) -> None:
        self._choose_threads()
        while not self._closed:
            newcomer = None
            with self._wake:
                while not (self._waiting or self._batches or self._closed):
                    self._wake.wait()
                if self._waiting and self.load[0] < self._max_rows:
                    newcomer = self._waiting.popleft()
                    self._writing = [*(row for row in self._writing if not row.done), newcomer]
            if newcomer is not None:
                self._guarded([newcomer], self._admit, newcomer)
            for key, batch in list(self._batches.items()):
                self._guarded(batch.rows, self._advance, batch)
                if not batch.rows:
                    del self._batches[key]
                    if batch.keeps:
                        self._kept[key] = batch
        for generation in [*self._waiting, *self._writing]:
            if not generation.done:
                self._finish(generation)

    def _choose_threads(self) -> None:
        """Before the first question, on tokens that nobody asked for. It goes on with those of the answers."""
        tuner, token = self._threads, torch.zeros(1, 1, dtype=torch.long, device=self._plain.device)
        read = functools.partial(self._family.parts(self._plain).decoder, input_ids=token, use_cache=False)
        end = time.monotonic() + START_SECONDS
        tuner.begin(read)
        while tuner.tunes and not (tuner.settled or self._waiting or self._closed) and time.monotonic() < end:
            with tuner.step("start"):
                read()

    def _guarded(self, concerned: list[Generation], step, *arguments) -> None:
        """Runs a step. If it fails, the answers it concerned fail, and nothing else does."""
        concerned = list(concerned)
        try:
            step(*arguments)
            return
        except Exception as error:
            reason = explain(error)
        # Outside the except clause: until it ends, the error's traceback keeps the tensors alive.
        for generation in concerned:
            self._finish(generation, reason)
        for batch in self._batches.values():
            if any(row in concerned for row in batch.rows):
                batch.clear()
        self._kept.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _admit(self, generation: Generation) -> None:
        """Reads the prompt and writes the first token."""
        if generation.cancelled:
            self._finish(generation)
            return
        self._use(generation.adapter)
        inputs = {name: value.to(self._plain.device) for name, value in generation.inputs.items()}
        for name, value in inputs.items():
            if value.is_floating_point():
                inputs[name] = value.to(self._plain.dtype)
        generation.inputs = {}  # the picture is needed no longer
        if self._penalty is not None:
            generation.prompt = inputs["input_ids"]
        cache = DynamicCache() if self._joins else DynamicCache(config=self._text_config)
        # Prompts of about the same length take about as long.
        with self._threads.step(("prompt", len(inputs), inputs["input_ids"].shape[1].bit_length())):
            output = self._plain(**inputs, past_key_values=cache, use_cache=True, **self._last_only)
        token = self._write([generation], output.logits[:, -1])
        if not generation.done:
            key = (generation.adapter, None if self._joins else id(generation))
            if key not in self._batches:
                kept = self._kept.pop(key, None)
                self._batches[key] = kept or (Rows if self._joins else Alone)(self._decoder)
            batch = self._batches[key]
            offset = self._family.position_offset(self._plain, inputs)
            self._guarded([generation, *batch.rows], batch.add, generation, cache, token, offset)

    def _advance(self, batch: Rows | Alone) -> None:
        """Writes the next token of each row."""
        for row in batch.rows:
            if row.cancelled:
                self._finish(row)
        _drop_done(batch)
        if batch.rows:
            self._use(batch.rows[0].adapter)
            with self._threads.step(("tokens", batch.rows[0].adapter, len(batch.rows))):
                logits = batch.step()
            batch.last = self._write(batch.rows, logits)
            _drop_done(batch)

    def _use(self, adapter: str | None) -> None:
        if adapter == self._adapter:
            return
        if adapter is None or self._adapter is None:
            self._enable(adapter is not None)
        if adapter not in (None, self._active):
            self._peft.set_adapter(adapter)
            self._active = adapter
        self._adapter = adapter

    def _enable(self, enabled: bool) -> None:
        """Turns the adapters on or off. PEFT's own walks through all modules, which takes twice as long: side by
        side, this is done for every token."""
        for module in self._switches:
            module.enable_adapters(enabled)

    def _write(self, rows: list[Generation], logits: torch.Tensor) -> torch.Tensor:
        """Chooses a token for each row, from (rows, vocabulary), and ends the rows that are complete.

        Returns: the tokens, (rows) int64, on the device.
        """
        # Which of equal ones is taken depends on the dtype: ``generate`` has this one.
        logits = logits.float()
        if self._penalty is not None:
            logits = torch.cat([self._penalized(row, logits[i : i + 1]) for i, row in enumerate(rows)])
        tokens = logits.argmax(-1)
        for index, row in enumerate(rows):
            if row.sampling.temperature > 0:
                tokens[index] = _draw(logits[index : index + 1], row.sampling)
        now = time.monotonic()
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.began = row.began or now
            row.tokens.append(token)
            if token in self._ends or len(row.tokens) >= row.sampling.max_new_tokens:
                self._finish(row)
        return tokens

    def _penalized(self, row: Generation, logits: torch.Tensor) -> torch.Tensor:
        """With what the prompt and the answer have already less likely, as the model's settings ask."""
        written = torch.tensor([row.tokens], dtype=torch.long, device=logits.device)
        return self._penalty(torch.cat([row.prompt, written], dim=1), logits)

    def _finish(self, generation: Generation, error: str | None = None) -> None:
        generation.inputs, generation.prompt = {}, None
        generation.error = error
        generation.ended = time.monotonic()
        generation.done = True  # last: a reader who sees it finds all the rest in place


def _drop_done(batch: Rows | Alone) -> None:
    """Takes out the rows that are complete."""
    batch.keep([index for index, row in enumerate(batch.rows) if not row.done])


def _draw(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """A token from (1, vocabulary), as ``generate`` draws it with these settings."""
    scores = TemperatureLogitsWarper(float(sampling.temperature))(None, logits.float())
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(float(sampling.top_p))(None, scores)
    return torch.multinomial(scores.softmax(-1), 1)[0, 0]


def explain(error: Exception) -> str:
    """What to tell the user when the model fails."""
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
    if memory:
        return "The model ran out of memory: ask again later, or start a new conversation with shorter questions"
    return f"The model failed ({type(error).__name__}: {first_line(error)})"
