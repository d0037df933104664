"""What an evaluation needs of a suite of tasks. A file beside this one holds each suite."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

from fura_vlm.errors import FuraVLMError
from fura_vlm.evaluation.config import EvalConfig
from fura_vlm.evaluation.scores import Sample, TaskScore
from fura_vlm.evaluation.source import Source


class SuiteError(FuraVLMError):
    """Settings that cannot be combined, or a folder that holds something else."""


class Suite(ABC):
    """Tasks, and how a model is asked them.

    Args:
        config: the evaluation.
        source: its model.

    Attributes:
        folder: the name of the results' folder.
        settings: the fields of ``EvalConfig`` that this suite reads and others do not.
        packages: those whose versions the results name, beside the usual ones.
        source: the model as the suite asks it.
        protocol, data, max_new_tokens: as the results say them; known once ``load`` was called.
    """

    folder: str
    settings: frozenset[str] = frozenset()
    packages: tuple[str, ...] = ()
    protocol: str
    data: str
    max_new_tokens: int | None = None

    def __init__(self, config: EvalConfig, source: Source):
        self.config, self.source = config, source

    @abstractmethod
    def load(self) -> None:
        """Reads the tasks and their data.

        Raises:
            FuraVLMError: with one sentence, for everything that the user can fix.
        """

    @abstractmethod
    def run(self, source: Source, folder: Path) -> tuple[dict[str, TaskScore], list[Sample]] | None:
        """Scores by task, and samples, of one model; ``None`` on all processes but the main one.

        Args:
            source: ``self.source``, or its base.
            folder: the results' folder; answers are kept in ``answers`` in it.
        """

    def published(self, scores: dict[str, TaskScore]) -> dict[str, dict]:
        """Published results to stand beside ours, by method: ``scores`` by task in percent, their ``average`` if it is
        of the same tasks, and the ``source``.

        Args:
            scores: what a model reached, which says how many documents there are.
        """
        return {}

    def notes(self, scores: dict[str, dict[str, TaskScore]], published: bool) -> list[str]:
        """How the figures were computed, a sentence or two each.

        Args:
            scores: by model and task.
            published: whether published results stand beside them.
        """
        return []

    def pictures(self, task: str, document: int) -> list:
        """Those of a document."""
        return []


def is_main() -> bool:
    """Whether this is the main process of an evaluation."""
    return int(os.environ.get("RANK", 0)) == 0
