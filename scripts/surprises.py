"""The table of what providers did against expectation, docs/surprises.md: rows are added, never changed.

add_surprises(page, [Surprise("May a Pod end itself?", "yes, 4 s after its job")], "2026-12-01", "make live-smoke")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.errors import InputError, Problem

HEADING = "## Asked of the real Runpod"
COLUMNS = "| date | asked | seen | by |\n|---|---|---|---|\n"


@dataclass(frozen=True)
class Surprise:
    """One question, and what was seen."""

    asked: str
    seen: str


def add_surprises(page: Path, found: Sequence[Surprise], date: str, by: str) -> None:
    """Adds a row for each to the last table of the page. Raises InputError for a page without that table."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if f"{HEADING}\n\n{COLUMNS}" not in text:
        raise InputError(Problem(str(page), f"no table below {HEADING!r}", "the page docs/surprises.md of Lorry"))
    rows = "".join(f"| {date} | {_cell(one.asked)} | {_cell(one.seen)} | {_cell(by)} |\n" for one in found)
    written = page.with_name(page.name + ".new")
    written.write_text(text.rstrip("\n") + "\n" + rows, encoding="utf-8")
    os.replace(written, page)


def _cell(text: str) -> str:
    """Text that breaks out of no table."""
    return " ".join(text.replace("|", "/").replace("<", "(").split())[:300]
