"""What a model reaches: choices by their likelihood, answers word for word, and the perplexity of plain English.

A question's answers share its tokens (``data.laid_out``): each sees the question and itself, and has the positions that
it would have alone. That takes a quarter of the work, and gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from evidence.data import SHARED, Choices, Data, Rows
from fura_vlm.families.base import IGNORE, Family

TOKENS_AT_ONCE = 32_768  # of a batch
LOGITS_AT_ONCE = 4096  # positions whose logits are in memory at once: 0.8 GB of 49 thousand words
WINDOW = 1024  # tokens of plain English that are read at once
PADDING = -2  # the owner of tokens that none sees


class Scorer:
    """Asks a model.

    Args:
        model: as it is, or within PEFT.
        family: of the model.
        autocast: makes the context in which it computes.
    """

    def __init__(self, model: nn.Module, family: Family, autocast: Callable):
        self.plain = model.get_base_model() if isinstance(model, PeftModel) else model
        self.family, self.autocast = family, autocast
        self.parts = family.parts(model)
        self.device = next(model.parameters()).device

    def score(self, part: Rows | Choices, data: Data) -> list[bool]:
        """Of each question, whether the model answers it right."""
        if isinstance(part, Rows):
            return self.exact(part, data)
        values = self.likelihoods(part, data)
        return [max(range(len(each)), key=each.__getitem__) == right
                for each, right in zip(values, part.right, strict=True)]  # fmt: skip

    @torch.inference_mode()
    def likelihoods(self, choices: Choices, data: Data) -> list[list[float]]:
        """Of each question, of each answer the mean log-probability of a token, end token included."""
        found: list[list[float]] = [[] for _ in choices.laid]
        for batch in _batches([len(each.ids) for each in choices.laid]):
            rows = [choices.laid[number] for number in batch]
            ids, places, owners = (
                pad_sequence(tensors, batch_first=True, padding_value=value).to(self.device)
                for tensors, value in (
                    ([row.ids for row in rows], 0), ([row.places for row in rows], 0),
                    ([row.owners for row in rows], PADDING),
                )
            )  # fmt: skip
            before = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=self.device).tril()
            mask = before & ((owners[:, :, None] == owners[:, None, :]) | (owners == SHARED)[:, None, :])
            pictures = [choices.pictures[number] for number in batch]
            hidden = self._hidden(ids, pictures, data, attention_mask=mask[:, None], position_ids=places)
            of = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row.asked) for row in rows]))
            at, target, owner = torch.cat([row.asked for row in rows]).T
            chosen = self._log_probabilities(hidden, of, at, target)
            answers = [choices.answers[number] for number in batch]
            own, shared = owner != SHARED, torch.zeros(len(rows))
            sums = torch.zeros(len(rows), max(map(len, answers)))
            sums.index_put_((of[own], owner[own]), chosen[own], accumulate=True)
            shared.index_put_((of[~own],), chosen[~own], accumulate=True)
            for number, each, total in zip(batch, answers, (sums + shared[:, None]).tolist(), strict=True):
                found[number] = [value / len(tokens) for value, tokens in zip(total, each, strict=False)]
        return found

    @torch.inference_mode()
    def exact(self, rows: Rows, data: Data) -> list[bool]:
        """Of each row, whether the model, answering greedily, says what the labels say, end token included.

        While what it has said is right, what follows depends on that alone: so it is right if each label is the
        likeliest token after those before it, which one pass tells.
        """
        found = [False] * len(rows)
        for batch in _batches(rows.lengths):
            ids = pad_sequence([rows.ids[number] for number in batch], batch_first=True).to(self.device)
            labels = [rows.labels[number] for number in batch]
            # padding is on the right, where no real token sees it
            hidden = self._hidden(ids, [rows.pictures[number] for number in batch], data)
            places = [(each[1:] != IGNORE).nonzero()[:, 0] for each in labels]
            rows_of = torch.cat([torch.full((len(each),), place) for place, each in enumerate(places)])
            wanted = torch.cat([each[place + 1] for each, place in zip(labels, places, strict=True)])
            said = torch.cat([logits.argmax(-1) for logits in self._logits(hidden, rows_of, torch.cat(places))]).cpu()
            right = torch.ones(len(batch), dtype=torch.bool).index_put((rows_of[said != wanted],), torch.tensor(False))
            for number, value in zip(batch, right.tolist(), strict=True):
                found[number] = value
        return found

    @torch.inference_mode()
    def perplexity(self, plain: torch.Tensor) -> float:
        """Of a text (n,) int64, read in windows; the first token of each is not asked for."""
        total, number = 0.0, 0
        whole = [window for window in plain.split(WINDOW) if len(window) > 1]
        for start in range(0, len(whole), 16):
            rows = whole[start : start + 16]
            ids = pad_sequence(rows, batch_first=True).to(self.device)
            with self.autocast():
                hidden = self.parts.decoder(input_ids=ids, use_cache=False).last_hidden_state
            rows_of = torch.cat([torch.full((len(row) - 1,), place) for place, row in enumerate(rows)])
            places = torch.cat([torch.arange(len(row) - 1) for row in rows])
            chosen = self._log_probabilities(hidden, rows_of, places, torch.cat([row[1:] for row in rows]))
            total, number = total - float(chosen.double().sum()), number + len(chosen)
        # A model that has come apart may exceed what a float holds.
        return math.exp(min(total / number, 100)) if math.isfinite(total) else math.inf

    def _hidden(self, ids: torch.Tensor, pictures: Sequence[int], data: Data, **more: torch.Tensor) -> torch.Tensor:
        """The decoder's last states, of rows with or without a picture each."""
        numbers = [number for number in pictures if number >= 0]
        with self.autocast():
            inputs = {"input_ids": ids}
            if numbers:
                pictured = (ids == self.family.run_id).nonzero().T
                of_pictures = {"pixel_values": data.pixels(numbers, self.device)}
                inputs = {"inputs_embeds": self.family.embed(self.plain, ids, pictured, of_pictures)}
            return self.parts.decoder(**inputs, **more, use_cache=False).last_hidden_state

    def _logits(self, hidden: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> Iterator[torch.Tensor]:
        chosen = hidden[rows.to(self.device), places.to(self.device)]
        for part in chosen.split(LOGITS_AT_ONCE):
            with self.autocast():
                logits = self.parts.head(part)
            yield logits.float()

    def _log_probabilities(self, hidden, rows, places, targets) -> torch.Tensor:
        """Of targets (n,), each after the token at its row and place: (n,) float32 on the CPU."""
        found = []
        wanted = targets.to(self.device).split(LOGITS_AT_ONCE)
        for logits, each in zip(self._logits(hidden, rows, places), wanted, strict=True):
            found.append(logits.gather(1, each[:, None])[:, 0] - logits.logsumexp(-1))
        return torch.cat(found).cpu()


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of rows, the longest first, as many at a time as have room."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    while order:
        size = max(1, TOKENS_AT_ONCE // lengths[order[0]])
        yield order[:size]
        order = order[size:]
