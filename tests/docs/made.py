"""The computed tables of the documents: each stands below the `lorry plan` command that gives its numbers.

python -m tests.docs.made          # computes them anew and writes them into the documents

A table is computed where a paragraph ends with "Computed by `lorry plan ...`:". What stands between the command and the
colon changes the table: ", times four, plus 500 GB of volume" makes a month of it, and ", the cheapest offer of AWS for
each of A, B and C" a row for each recipe.
"""

from __future__ import annotations

import io
import json
import os
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from scripts.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted((ROOT / "docs").glob("04f-*.md"))
SHOWN_OFFERS = 3
VOLUME_USD_PER_GB_MONTH = 0.07
"Runpod network volume, first TB (facts of 2026-08-20)."
_COMPUTED = re.compile(r"(Computed by `lorry (plan [^`]+)`([^\n]*):\n\n)(@@|\|[^\n]*(?:\n\|[^\n]*)*)")
_MONTH = re.compile(r", times four, plus (\d+) GB of volume$")
_EACH = re.compile(r", the cheapest offer of AWS for each of ([^\n]+)$")
_AWS = ("ec2", "sagemaker")


def with_made_tables(text: str) -> str:
    """The document with every computed table as the commands give it today."""
    return _COMPUTED.sub(lambda found: found[1] + _table(found[2], found[3]), text)


def _table(command: str, change: str) -> str:
    if each := _EACH.search(change):
        return _recipes_table(command, re.split(r", | and ", each[1]))
    usable = _usable(_plan(command))
    month = _MONTH.search(change)
    return _month_table(usable[0], int(month[1])) if month else _offers_table(usable[:SHOWN_OFFERS])


def _usable(plan: Any) -> list[Any]:
    """The offers that fit, the cheapest first."""
    usable = sorted((o for o in plan["offers"] if o["fits"]), key=lambda o: o["usd"]["likely"])
    assert usable, f"{plan['recipe']}: no offer fits"
    return usable


def _plan(command: str) -> Any:
    """What the command gives on a machine without any tokenizer, so that every machine counts alike."""
    out = io.StringIO()
    nowhere = {"LORRY_MODELS": "/nonexistent", "HF_HOME": "/nonexistent"}
    with redirect_stdout(out), patch.dict(os.environ, nowhere):
        assert main([*command.split(), "--json"]) == 0, command
    return json.loads(out.getvalue())


def _offers_table(offers: list[Any]) -> str:
    rows = [
        "| offer | GiB per GPU | minutes to load | hours, likely | USD low, likely, high |",
        "|---|---|---|---|---|",
    ]
    for offer in offers:
        gib = f"{offer['total_gib']:.0f} of {offer['capacity_gib']:.0f}"
        usd = ", ".join(f"{offer['usd'][name]:.2f}" for name in ("low", "likely", "high"))
        load, hours = offer["minutes"]["load"]["likely"], offer["hours"]["likely"]
        rows.append(f"| {offer['offer']} | {gib} | {load:.0f} | {hours:.2f} | {usd} |")
    return "\n".join(rows)


def _recipes_table(command: str, recipes: list[str]) -> str:
    rows = ["| recipe | machines | GiB per GPU | hours, likely | USD low, likely, high |", "|---|---|---|---|---|"]
    for recipe in recipes:
        plan = _plan(command.replace("RECIPE", recipe))
        offer = next(o for o in _usable(plan) if o["backend"] in _AWS)
        machines = f"{plan['nodes']} x {offer['offer']}"
        gib = f"{offer['total_gib']:.0f} of {offer['capacity_gib']:.0f}"
        usd = ", ".join(f"{offer['usd'][name]:.0f}" for name in ("low", "likely", "high"))
        rows.append(f"| {recipe} | {machines} | {gib} | {offer['hours']['likely']:.2f} | {usd} |")
    return "\n".join(rows)


def _month_table(offer: Any, volume_gb: int) -> str:
    volume = volume_gb * VOLUME_USD_PER_GB_MONTH
    rows = ["| part | USD low | USD likely | USD high |", "|---|---|---|---|"]
    runs = [4 * offer["usd"][name] for name in ("low", "likely", "high")]
    for part, values in (
        (f"four runs on {offer['offer']}", runs),
        (f"{volume_gb} GB of volume", [volume] * 3),
        ("the month", [run + volume for run in runs]),
    ):
        rows.append(f"| {part} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(with_made_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
