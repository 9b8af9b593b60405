"""The files of an evaluation: what was measured of an adapter, what follows from it, and who went on without.

| file | written by | says |
|---|---|---|
| scores.json | trainer.evaluate, or the proof on the machine that trained | losses and answers, base against adapter |
| evaluation.json | scripts.evaluate | whether the adapter may go live, and why not |
| override.json | scripts.evaluate | who put it to work without a passing evaluation, and for what reason |
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from pathlib import Path
from typing import Literal

from recipes.errors import InputError, Problem
from recipes.job import Record
from recipes.recipe import Evaluation
from recipes.strict_yaml import read_yaml

GENERAL = Path(__file__).parent / "general.yaml"


class TextScore(Record):
    """One text with answers: summed negative log-likelihood (nats) over its `tokens` answer tokens."""

    name: str
    "The id of a held-out conversation, or the question of general.yaml."
    tokens: int
    base: float
    adapter: float

    @property
    def rise(self) -> float:
        """By how many nats per token the adapter's loss is above the base's; below zero it is better."""
        return (self.adapter - self.base) / self.tokens


class Answer(Record):
    """One question of the held-out conversations with the answer wanted and both models' own, greedy and cut short."""

    name: str
    question: str
    wanted: str
    base: str
    adapter: str


class Scores(Record):
    """scores.json: measured on one adapter over one base model."""

    format: Literal[1] = 1
    job_id: str
    adapter_sha256: dict[str, str]
    base_sha256: str
    general_sha256: str
    held_out: tuple[TextScore, ...]
    held_out_total: int
    "Held-out conversations there are; fewer are scored where there are many."
    general: tuple[TextScore, ...]
    answers: tuple[Answer, ...]
    answer_tokens: int
    "At most so many tokens per answer."
    seconds: float


class Judgement(Record):
    """What a judge preferred for one question, asked twice with the order of the answers swapped."""

    name: str
    preferred: Literal["adapter", "base", "neither"]
    consistent: bool
    "False when the judge followed the order of the answers; such a judgement counts as neither."


class Assessment(Record):
    """evaluation.json: the scores held against the recipe's limits. Losses are nats per answer token."""

    format: Literal[1] = 1
    job_id: str
    passed: bool
    reasons: tuple[str, ...]
    "Why it did not pass; empty when it did."
    limits: Evaluation
    adapter_sha256: dict[str, str]
    base_sha256: str
    held_out_base: float
    held_out_adapter: float
    general_base: float
    general_adapter: float
    judge: str | None = None
    judgements: tuple[Judgement, ...] = ()
    at: float

    @property
    def win_rate(self) -> float | None:
        """Share of judged questions won, a draw counting half; None without a judge."""
        if not self.judgements:
            return None
        worth = {"adapter": 1.0, "neither": 0.5, "base": 0.0}
        return sum(worth[j.preferred] for j in self.judgements) / len(self.judgements)


class Override(Record):
    """override.json: somebody put an adapter to work that did not pass."""

    format: Literal[1] = 1
    job_id: str
    by: str
    reason: str
    at: float
    adapter_sha256: dict[str, str]
    failed: tuple[str, ...]
    "What spoke against it."


def perplexity(loss: float) -> float:
    """e to the loss: among how many equally likely tokens the model hesitates; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@lru_cache(maxsize=1)
def general_questions() -> tuple[dict[str, str], str]:
    """(question -> answer of general.yaml, SHA-256 of the file). Raises InputError when the file is not such a list."""
    text = GENERAL.read_text(encoding="utf-8")
    value, _ = read_yaml(text, "recipes/general.yaml")
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise InputError(Problem("recipes/general.yaml", "not a list of questions", "question: answer, both text"))
    return {str(question): answer for question, answer in value.items()}, hashlib.sha256(text.encode()).hexdigest()
