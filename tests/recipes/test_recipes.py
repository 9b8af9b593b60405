"""Recipes: the schema, how values are read, and the files that ship."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from recipes.errors import InputError
from recipes.load import FOLDER, load_recipe, recipe_names
from recipes.recipe import Recipe
from recipes.strict_yaml import read_yaml


def _leaves(model: type[BaseModel]) -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        inner = [a for a in (field.annotation, *typing.get_args(field.annotation)) if isinstance(a, type)]
        sections = [a for a in inner if issubclass(a, BaseModel)]
        found += [f"{name}.{leaf}" for leaf in _leaves(sections[0])] if sections else [name]
    return found


def test_a_recipe_has_at_most_forty_fields() -> None:
    assert 20 < len(_leaves(Recipe)) <= 40


def test_every_field_is_explained() -> None:
    """A field is documented by the text literal under it, or its section by a docstring that names it."""
    source = (FOLDER / "recipe.py").read_text()
    for leaf in _leaves(Recipe):
        assert source.count(f"    {leaf.rpartition('.')[2]}: ") >= 1, leaf


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_loads(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.name == name
    assert len(loaded.sha256) == 64


@pytest.mark.parametrize("name", [n for n in recipe_names() if not n.startswith("smoke/")])
def test_shipped_recipe_says_what_was_checked_and_what_was_not(name: str) -> None:
    text = " ".join(line.lstrip("# ") for line in (FOLDER / f"{name}.yaml").read_text().splitlines())
    assert "Checked:" in text
    assert "Never trained by us on a GPU yet" in text


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2e-4", 2e-4),
        ("2E-4", 2e-4),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("3", 3),
        ("-3", -3),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("12:30", "12:30"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("0o17", "0o17"),
        ("2026-11-22", "2026-11-22"),
        ("~", None),
        ("'2e-4'", "2e-4"),
        (".inf", ".inf"),
    ],
)
def test_value_is_read_as_a_person_means_it(written: str, read: object) -> None:
    value, _ = read_yaml(f"a: {written}\n", "x.yaml")
    assert value == {"a": read}
    assert type(value["a"]) is type(read)


def test_values_know_their_lines() -> None:
    _, lines = read_yaml("a:\n  b: 1\n\n  c:\n    - x\n    - y\n", "x.yaml")
    assert lines["a", "b"] == 2
    assert lines["a", "c", 1] == 6


def test_two_keys_twice_are_both_reported() -> None:
    with pytest.raises(InputError) as caught:
        read_yaml("a: 1\nb: 2\na: 3\nb: 4\n", "x.yaml")
    assert [str(problem) for problem in caught.value.problems] == [
        "x.yaml:3: the key 'a' a second time (first on line 1); keep one of them",
        "x.yaml:4: the key 'b' a second time (first on line 2); keep one of them",
    ]


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("\ufeffbase:\r\n  id: Qwen/Qwen3-8B\r\n".encode())
    assert load_recipe(str(tmp_path / "a.yaml")).recipe.base.id == "Qwen/Qwen3-8B"


def test_equal_choices_hash_alike_however_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("base: {id: Qwen/Qwen3-8B}\n")
    (tmp_path / "long.yaml").write_text("# words\ntraining:\n  learning_rate: 0.0002\nbase:\n  id: 'Qwen/Qwen3-8B'\n")
    (tmp_path / "other.yaml").write_text("base: {id: Qwen/Qwen3-8B}\ntraining: {seed: 2}\n")
    short, long, other = (load_recipe(str(tmp_path / f"{n}.yaml")).sha256 for n in ("short", "long", "other"))
    assert short == long
    assert short != other


def test_a_recipe_cannot_be_changed_after_loading() -> None:
    recipe = load_recipe("smoke/zero3").recipe
    with pytest.raises(ValidationError, match="frozen"):
        recipe.base.id = "other"  # type: ignore[misc]


def test_schema_for_editors_refuses_unknown_keys() -> None:
    schema = Recipe.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Training"]["additionalProperties"] is False
