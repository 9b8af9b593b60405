"""How much there is to learn from: examples, tokens and steps, from a training-set report or a nominal set."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipes.preparation import TrainingSetReport
from recipes.recipe import Recipe
from recipes.schedule import steps_in

NOMINAL_CONVERSATIONS = 72
NOMINAL_TOKENS = 1500
SUPERVISED_SHARE = 0.6
"Share of a conversation's tokens that carry loss, where no report says better: answers outweigh questions."


@dataclass(frozen=True)
class Workload:
    """Examples and tokens of one run; `longest` sizes the memory, `mean` the time."""

    examples: int
    valid_examples: int
    train_tokens: int
    valid_tokens: int
    longest: int
    supervised: float
    "Share of the longest example's tokens whose logits are computed."
    exact: bool
    nominal: bool
    steps: int
    steps_per_epoch: int

    @property
    def mean(self) -> float:
        """Tokens of an average example of the train split."""
        return self.train_tokens / self.examples


def workload_of(recipe: Recipe, report: TrainingSetReport | None) -> Workload:
    """What the recipe does with the reported set; without a report, with 72 conversations of 1,500 tokens.

    The longest example of a nominal set is data.max_tokens, so that its plan holds for any set the recipe takes.
    """
    train, limit = recipe.training, recipe.data.max_tokens
    if report is None:
        valid = held_out(NOMINAL_CONVERSATIONS, recipe.data.validation_fraction)
        examples, tokens = NOMINAL_CONVERSATIONS - valid, min(NOMINAL_TOKENS, limit)
        train_tokens, valid_tokens = examples * tokens, valid * tokens
        longest, share = limit, SUPERVISED_SHARE
    else:
        examples, valid = report.train_examples, report.valid_examples
        train_tokens, valid_tokens = report.tokens.train, report.tokens.valid
        longest = min(limit, max(report.tokens.longest, 1))
        # The average says little about the longest example, so a low share is not believed.
        share = min(1.0, max(SUPERVISED_SHARE, report.tokens.trained / max(1, train_tokens)))
    return Workload(
        examples=examples,
        valid_examples=valid,
        train_tokens=train_tokens,
        valid_tokens=valid_tokens,
        longest=longest,
        supervised=share,
        exact=bool(report and report.tokens.exact),
        nominal=report is None,
        steps=steps_in(examples, train.epochs, train.global_batch, train.max_steps),
        steps_per_epoch=math.ceil(examples / train.global_batch),
    )


def held_out(conversations: int, fraction: float) -> int:
    """Conversations of the validation split: at least one when anything is held out."""
    return max(1, round(conversations * fraction)) if fraction > 0 else 0
