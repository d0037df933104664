"""How likely a model finds given answers to questions. Small models can be asked this before they can write answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from fura_vlm.evaluation.generation import Answerer, EvaluationError
from fura_vlm.families.base import IGNORE, EncodingError
from fura_vlm.families.messages import Message, Text


def likelihoods(
    answerer: Answerer, questions: Sequence[tuple[str, str, Sequence[str]]], progress: bool = True
) -> Iterator[dict[int, list[float]]]:
    """Yields, for a part of the questions at a time, by the number of the question the mean log-likelihood of a token
    of each of its answers, end token included: what training on the answer would make the loss, with the sign changed.

    Args:
        questions: of each its name in an error, its words, and the answers.

    Raises:
        EvaluationError: if an answer cannot be judged; the message names the question.
    """
    family, rows = answerer.family, []
    for number, (name, text, answers) in enumerate(questions):
        talks = [(Message("user", (Text(text),)), Message("assistant", (Text(answer),))) for answer in answers]
        for encoded in family.encode([(talk, ()) for talk in talks]):
            if isinstance(encoded, EncodingError):
                raise EvaluationError(f"{name}: {encoded}")
            ids, labels = family.spread(encoded)
            rows.append((number, torch.from_numpy(ids), torch.from_numpy(labels)))
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row][1]))  # what does not fit in memory shows at once
    missing = [len(answers) for _, _, answers in questions]
    first = [0, *torch.tensor(missing).cumsum(0).tolist()]
    found: dict[int, float] = {}
    compute = partial(_means, answerer)
    with tqdm(total=len(rows), desc="likelihoods", disable=not progress or not rows, mininterval=1) as bar:
        while order:
            batch, order = order[: answerer.batch_size], order[answerer.batch_size :]
            try:
                means = answerer.in_parts([rows[row][1:] for row in batch], compute)
            except Exception as error:
                name = questions[rows[batch[0]][0]][0]
                raise EvaluationError(f"{name}, or another of its batch: {error}") from error
            found |= dict(zip(batch, means, strict=True))
            done = {}
            for number in {rows[row][0] for row in batch}:
                if all(row in found for row in range(first[number], first[number + 1])):
                    done[number] = [found[row] for row in range(first[number], first[number + 1])]
            yield done
            bar.update(len(batch))


@torch.inference_mode()
def _means(answerer: Answerer, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Of each row, ids (n,) and labels (n,), the mean log-probability of its labels."""
    padding = {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence([ids for ids, _ in rows], padding_value=answerer.family.tokenizer.pad_token_id, **padding)
    mask = pad_sequence([torch.ones_like(ids) for ids, _ in rows], **padding)
    labels = pad_sequence([labels for _, labels in rows], padding_value=IGNORE, **padding).to(answerer.device)
    # The answers end their rows: of the words before them no logits are needed.
    kept = 1 + max(int((labels != IGNORE).flip(1).float().cumsum(1).argmax(1).max()) + 1, 1)
    logits = answerer.model(
        input_ids=ids.to(answerer.device),
        attention_mask=mask.to(answerer.device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(answerer.device),
        use_cache=False,
        logits_to_keep=kept,
    ).logits.float()
    wanted = labels[:, -(kept - 1) :]
    chosen = torch.log_softmax(logits[:, -kept:-1], -1).gather(2, wanted.clamp(min=0)[..., None])[..., 0]
    judged = wanted != IGNORE
    return ((chosen * judged).sum(1) / judged.sum(1)).tolist()
