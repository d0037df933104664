"""Scoring as in the LLaVA-1.5 paper, where lmms-eval's tasks differ. Used by the tasks in ``eval/paper``.

POPE: an answer is read as its first sentence and is no if that has "no" or "not" among its words, else yes (the
evaluation script of POPE, arXiv 2305.10355); lmms-eval wants the bare word. The score is the mean F1 of the random,
the popular and the adversarial questions, as LLaVA-1.5 (arXiv 2310.03744) reports it. The yes-ratio counts
predictions; lmms-eval's counts labels.

ScienceQA: besides a letter and a letter with a full stop, which lmms-eval reads, "The answer is X." counts where it
occurs once (LLaVA's evaluation script).
"""

from __future__ import annotations

import re
from statistics import mean

from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score
from lmms_eval.tasks.scienceqa.utils import sqa_process_results

CATEGORIES = ("random", "popular", "adversarial")


def read_yes_no(answer: str) -> str:
    """``"no"`` or ``"yes"``, by the words of the first sentence."""
    words = answer.split(".")[0].replace(",", "").lower().split()
    return "no" if {"no", "not"} & set(words) else "yes"


def pope_results(doc: dict, results: list[str]) -> dict:
    """The rows that the two aggregations below take, for one document."""
    prediction, truth = read_yes_no(results[0]), doc["answer"].strip().lower()
    row = {
        "question_id": doc["question_id"],
        "category": doc["category"],
        "prediction": prediction,
        "ground_truth": truth,
        "score": float(prediction == truth),
    }
    return {"pope_mean_f1": row, "pope_predicted_yes": row}


def pope_mean_f1(rows: list[dict]) -> float:
    """The mean over the categories that occur of lmms-eval's F1."""
    groups = [[row for row in rows if row["category"] == category] for category in CATEGORIES]
    return mean(pope_aggregate_f1_score(group) for group in groups if group)


def pope_predicted_yes(rows: list[dict]) -> float:
    """Share of the questions answered with yes."""
    return mean(row["prediction"] == "yes" for row in rows)


def scienceqa_results(doc: dict, results: list[str]) -> dict[str, float]:
    """lmms-eval's score for the letter that the answer names."""
    answer = results[0].strip()
    letters = re.findall(r"The answer is ([A-Z]).", answer)  # LLaVA's pattern: any character may end it
    begins_with_letter = answer[1:2] in ("", ".")
    return sqa_process_results(doc, [letters[0] if len(letters) == 1 and not begins_with_letter else answer])
