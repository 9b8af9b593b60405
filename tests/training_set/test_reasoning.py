"""A model that thinks is not trained to stop thinking by accident."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.catalog import load_catalog
from recipes.errors import InputError
from recipes.load import load_recipe
from recipes.recipe import Recipe
from scripts.cli import main
from scripts.training_set.reasoning import require_reasoning

THINKING = "qwen3-next-80b-thinking/replica-int8"


def _set(folder: Path, answers: list[str]) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": answer}]}
        for n, answer in enumerate(answers)
    ]
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _wish(recipe: Recipe, reasoning: str) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"reasoning": reasoning})})


def test_thoughts_are_counted_per_example(run, tmp_path: Path) -> None:
    found = run(_set(tmp_path, ["<think>hm</think>\n\nyes", "no", "<think>\nwell\n</think>\n\nmaybe", "no </thin"]))
    assert found.report.thoughts == 2


@pytest.mark.parametrize("command", ["check", "plan"])
def test_set_without_a_thought_is_refused_for_a_thinking_model_in_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(_set(tmp_path, ["yes", "no", "maybe"]))
    words = {"check": ["check", path, "--recipe", THINKING], "plan": ["plan", THINKING, "--training-set", path]}
    assert main(words[command]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert "no answer holds a thought (<think>...</think>)" in said
    assert "data.reasoning: empty_think" in said


def test_one_thought_the_recipes_word_or_another_model_is_enough(run, tmp_path: Path) -> None:
    models, recipe = load_catalog().models, load_recipe(THINKING).recipe
    bare = run(_set(tmp_path, ["yes", "no"])).report
    thinking, plain = models[recipe.base.id], models["Qwen/Qwen3-8B"]
    with pytest.raises(InputError):
        require_reasoning(bare, recipe, thinking)
    require_reasoning(bare, _wish(recipe, "empty_think"), thinking)
    require_reasoning(bare, recipe, plain)
    require_reasoning(bare.model_copy(update={"thoughts": 1}), recipe, thinking)
