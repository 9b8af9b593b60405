"""How vLLM reads LoRA adapters of each modelling class: served.yaml as a frozen table, each row dated.

served_families()["qwen3_next"].experts      # "one_by_one": a small matrix per expert and projection, never fused
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from recipes.catalog import Fact, Names
from recipes.recipe import Strict
from recipes.strict_yaml import read_yaml
from recipes.validate import validated

_FILE = Path(__file__).parent / "served.yaml"


class ServedFamily(Fact):
    """One modelling class of vLLM."""

    modules: Names
    "Last names of modules that may carry LoRA, outside the routed experts."
    ignored: Names = ()
    "Last names of modules whose LoRA it loads and never applies."
    experts: Literal["none", "one_by_one", "fused"]
    "How adapters of routed experts lie in the file."


class _Table(Strict):
    families: dict[str, ServedFamily]


@lru_cache(maxsize=1)
def served_families() -> dict[str, ServedFamily]:
    """By config.json's model_type. Raises InputError when the table is wrong: every test run reads it."""
    value, _ = read_yaml(_FILE.read_text(encoding="utf-8"), "recipes/served.yaml")
    return validated(_Table, {"families": value}, "recipes/served.yaml").families
