"""Whether a base model that thinks before it answers may be trained on this set. Pure."""

from __future__ import annotations

from typing import Any

from recipes.catalog import BaseModelFacts
from recipes.errors import InputError, Problem
from recipes.preparation import TrainingSetReport
from recipes.recipe import Recipe

END_OF_THOUGHT = "</think>"


def holds_thought(message: dict[str, Any]) -> bool:
    """Whether a trained answer begins with a thought, <think>...</think>, as thinking models write it."""
    return bool(message.get("trained")) and END_OF_THOUGHT in message["content"]


def require_reasoning(report: TrainingSetReport, recipe: Recipe, model: BaseModelFacts) -> None:
    """Refuses a set without a single thought for a model that opens one before each answer, unless the recipe says how.

    Its template would write an empty thought before each answer, and the adapter would learn to think nothing.
    """
    if model.thinking and recipe.data.reasoning == "require" and not report.thoughts:
        raise InputError(
            Problem(
                report.source,
                f"no answer holds a thought (<think>...{END_OF_THOUGHT}); {recipe.base.id} thinks before it answers",
                "answers with thoughts, or the Instruct model, or data.reasoning: empty_think to train it not to think",
            )
        )
