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
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import DynamicCache, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fura_vlm.chat.partner import ChatError, Generation, Sampling, Writer
from fura_vlm.chat.threads import thread_tuner
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
    """

    def __init__(self, model, family: Family, max_rows: int = 24):
        self.model, self._family = model, family
        self._peft = model.base_model if isinstance(model, PeftModel) else None
        self._switches = [] if self._peft is None else [m for m in model.modules() if isinstance(m, SWITCHED)]
        self._plain = model.get_base_model() if isinstance(model, PeftModel) else model
        settings, text_config = self._plain.generation_config, self._plain.config.get_text_config(decoder=True)
        ends = settings.eos_token_id or text_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list) else {ends}
        penalty = getattr(settings, "repetition_penalty", None) or 1.0
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1.0 else None
        # Rows can be joined where all that is kept of a token are its keys and values. Layers with a window keep all of
        # them, too: what is out of sight is masked.
        kinds = {type(layer) for layer in DynamicCache(config=text_config).layers}
        self._joins = kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        self._text_config = text_config
        takes = inspect.signature(self._plain.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._max_rows = max_rows
        self._adapter: str | None = None  # that the model is switched to
        self._active = model.active_adapter if self._peft is not None else None  # that PEFT turns on
        self._enable(False)
        self._waiting: deque[Generation] = deque()
        self._writing: list[Generation] = []
        self._batches: dict[tuple, _Batch] = {}
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
            batch = self._batches.setdefault(key, _Batch(self._plain, self._family))
            offset = self._family.position_offset(self._plain, inputs)
            self._guarded([generation, *batch.rows], batch.add, generation, cache, token, offset)

    def _advance(self, batch: _Batch) -> None:
        """Writes the next token of each row."""
        for row in batch.rows:
            if row.cancelled:
                self._finish(row)
        batch.drop_done()
        if batch.rows:
            self._use(batch.rows[0].adapter)
            with self._threads.step(("tokens", batch.rows[0].adapter, len(batch.rows))):
                logits = batch.step()
            batch.last = self._write(batch.rows, logits)
            batch.drop_done()

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


class _Batch:
    """Answers decoded together: rows of one key-value cache, padded on the left to the longest.

    What a step needs stays on the device, and the decoder is called without the model around it: a step of a few rows
    takes as long as it takes to launch its kernels, so that whatever else is done delays every token.

    Attributes:
        lengths: tokens of each row in the cache, padding not counted.
        last: each row's last token, (rows) int64, which is not in the cache yet.
        places: the same lengths, (rows) int64.
        offsets: how far the positions of a row's next tokens are from their places, (rows) int64.
    """

    def __init__(self, model, family: Family):
        self._model, self._parts = model, family.parts(model) if family.bare_head else None
        self.clear()

    def clear(self) -> None:
        self.rows: list[Generation] = []
        self.lengths: list[int] = []
        self.cache: DynamicCache | None = None
        self.last: torch.Tensor | None = None
        self.places: torch.Tensor | None = None
        self.offsets: torch.Tensor | None = None

    def add(self, row: Generation, cache: DynamicCache, last: torch.Tensor, offset: int) -> None:
        """Adds a row whose prompt is in a cache of its own; ``last`` (1) follows it."""
        length = cache.get_seq_length()
        place, offsets = torch.full_like(last, length), torch.full_like(last, offset)
        if not self.rows:
            self.cache, self.last, self.places, self.offsets = cache, last, place, offsets
        else:
            width = max(*self.lengths, length)
            for layer, new in zip(self.cache.layers, cache.layers, strict=True):
                layer.keys = torch.cat([_widen(layer.keys, width), _widen(new.keys, width)])
                layer.values = torch.cat([_widen(layer.values, width), _widen(new.values, width)])
            self.last, self.places = torch.cat([self.last, last]), torch.cat([self.places, place])
            self.offsets = torch.cat([self.offsets, offsets])
        self.rows.append(row)
        self.lengths.append(length)

    def step(self) -> torch.Tensor:
        """Gives each row's last token to the model; returns what comes next, (rows, vocabulary)."""
        mask, longest = None, max(self.lengths)
        if min(self.lengths) < longest:  # without padding attention needs no mask, and is faster
            columns = torch.arange(longest + 1, device=self.places.device)
            mask = (columns >= longest - self.places[:, None]).long()
        inputs = {
            "input_ids": self.last[:, None],
            "attention_mask": mask,
            "position_ids": (self.places + self.offsets)[:, None],
            "past_key_values": self.cache,
            "use_cache": True,
        }
        if self._parts is None:
            logits = self._model(**inputs).logits[:, -1]
        else:
            logits = self._parts.head(self._parts.decoder(**inputs).last_hidden_state[:, -1])
        self.lengths = [length + 1 for length in self.lengths]
        self.places = self.places + 1
        return logits

    def drop_done(self) -> None:
        """Takes out the rows that are complete, and the padding that only they needed."""
        kept = [index for index, row in enumerate(self.rows) if not row.done]
        if len(kept) == len(self.rows):
            return
        if not kept:
            self.clear()
            return
        width = max(self.lengths)
        self.rows = [self.rows[index] for index in kept]
        self.lengths = [self.lengths[index] for index in kept]
        padded = width - max(self.lengths)
        indices = torch.tensor(kept, device=self.places.device)
        self.last, self.places, self.offsets = self.last[indices], self.places[indices], self.offsets[indices]
        for layer in self.cache.layers:
            layer.keys = layer.keys[indices, :, padded:]
            layer.values = layer.values[indices, :, padded:]


def _widen(states: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values (rows, heads, length, size), padded on the left to ``width``."""
    return F.pad(states, (0, 0, width - states.shape[2], 0))


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
