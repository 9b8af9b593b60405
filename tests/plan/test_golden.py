"""Every recipe's plan and renders, compared by whole value with tests/plan/golden/: the diff is the review.

LORRY_WRITE_GOLDEN=1 python -m pytest tests/plan/test_golden.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import get_args

import pytest

from recipes.catalog import load_catalog
from recipes.load import LoadedRecipe, load_recipe, recipe_names
from recipes.preparation import Plan, TrainingSetReport
from recipes.recipe import BackendName
from scripts.errors import Refused
from scripts.plan import explain_text, make_plan, plan_text
from scripts.render import render

GOLDEN = Path(__file__).parent / "golden"
REGENERATE = "if this is meant, run: LORRY_WRITE_GOLDEN=1 python -m pytest tests/plan/test_golden.py"
CATALOG = load_catalog()
WHOLE_PLANS = ("smoke/zero3", "qwen3-next-80b/zero3")
EXPLAINED = [name for name in recipe_names() if name.startswith(("smoke/", "qwen3-next-80b/", "qwen3-8b/"))]


def _same(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("LORRY_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{path.name} is missing; {REGENERATE}"
    assert text == path.read_text(), f"{name} differs; {REGENERATE}"


def _renders(loaded: LoadedRecipe, plan: Plan, report: TrainingSetReport) -> dict[str, object]:
    found: dict[str, object] = {}
    for backend in get_args(BackendName):
        store = "file:///jobs" if backend == "local" else "s3://a-bucket/jobs"
        try:
            spec = render(
                loaded, plan, report, CATALOG, job_id="golden-1", backend=backend, store=store, commit="c" * 40
            )
        except Refused as refusal:
            found[backend] = str(refusal).splitlines()
        else:
            found[backend] = spec.model_dump(mode="json")
    return found


@pytest.mark.parametrize("name", recipe_names())
def test_plan_in_words_is_the_committed_one(name: str, report: TrainingSetReport) -> None:
    text = plan_text(make_plan(load_recipe(name), report, CATALOG), CATALOG)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert text.isascii()
    _same(f"{name}.plan.txt", text)


@pytest.mark.parametrize("name", EXPLAINED)
def test_arithmetic_in_words_is_the_committed_one(name: str, report: TrainingSetReport) -> None:
    loaded = load_recipe(name)
    text = explain_text(make_plan(loaded, report, CATALOG), loaded, report, CATALOG)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert text.isascii()
    _same(f"{name}.explain.txt", text)


@pytest.mark.parametrize("name", WHOLE_PLANS)
def test_plan_as_data_is_the_committed_one(name: str, report: TrainingSetReport) -> None:
    plan = make_plan(load_recipe(name), report, CATALOG).model_dump(mode="json")
    offers = ",\n".join(json.dumps(offer) for offer in plan.pop("offers"))
    _same(f"{name}.plan.json", json.dumps(plan, indent=1)[:-2] + f',\n "offers": [\n{offers}\n]}}\n')


@pytest.mark.parametrize("name", recipe_names())
def test_renders_are_the_committed_ones(name: str, report: TrainingSetReport) -> None:
    loaded = load_recipe(name)
    renders = _renders(loaded, make_plan(loaded, report, CATALOG), report)
    _same(f"{name}.launch.json", json.dumps(renders, indent=1) + "\n")


def test_no_golden_is_left_of_a_recipe_that_is_gone() -> None:
    known = {
        f"{name}{end}" for name in recipe_names() for end in (".plan.txt", ".plan.json", ".explain.txt", ".launch.json")
    }
    assert {path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*.*") if path.is_file()} <= known
