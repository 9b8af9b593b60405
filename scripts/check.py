"""`lorry check`: what a training set holds, what of it is used, and what the model will be trained on.

print(check(Path("examples/bicycle-care.jsonl"), Data(), seed=1, tokenizer=None, preview=True))
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from recipes.catalog import load_catalog
from recipes.chat import marked, tokenise
from recipes.preparation import TrainingSetReport
from recipes.recipe import Data, Recipe
from scripts.tokenizer import ChatTokenizer
from scripts.training_set import prepare
from scripts.training_set.notes import counted, named_lines
from scripts.training_set.reasoning import require_reasoning

Pieces = list[tuple[str, bool]]
"The conversation as (text, is trained)."

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


def check(
    source: Path,
    data: Data,
    seed: int,
    tokenizer: ChatTokenizer | None,
    *,
    recipe: Recipe | None = None,
    out: Path | None = None,
    preview: bool = False,
    as_json: bool = False,
    colour: bool = False,
) -> str:
    """The report on `source` as text for a person, or as JSON.

    The canonical files go to `out`, or nowhere when it is None. `preview` adds one example with the trained part
    marked, [[so]], or in green with `colour`. Raises InputError when the set cannot be used, or not for this `recipe`.
    """
    with nullcontext(out) if out else tempfile.TemporaryDirectory(prefix="lorry-check-") as folder:
        report = prepare(source, Path(folder), data, seed, tokenizer)
        if recipe:
            require_reasoning(report, recipe, load_catalog().models[recipe.base.id])
        pieces = _preview(Path(folder) / "train.jsonl", tokenizer) if preview else []
    if as_json:
        shown = [{"text": text, "trained": trained} for text, trained in pieces]
        return json.dumps(report.model_dump(mode="json") | ({"preview": shown} if preview else {}), indent=2)
    return report_text(report) + (preview_text(pieces, tokenizer is not None, colour) if preview else "")


def report_text(report: TrainingSetReport) -> str:
    """The report in plain words. Pure."""
    tokens = report.tokens
    about = "" if tokens.exact else "about "
    lines = [("rows", f"{report.rows} read, {report.usable_rows} used")]
    lines += [("left out", f"{s.count}: {s.reason} ({named_lines(s.lines, s.count)})") for s in report.skipped]
    merged = f", {report.merged} of them merged without loss" if report.merged else ""
    split = f", {report.per_pair} kept as one example per answer" if report.per_pair else ""
    lines += [
        ("conversations", f"{report.conversations}{merged}{split}"),
        ("duplicates", str(report.duplicates or "none")),
        (
            "learned from",
            f"{counted(report.train_examples, 'example')}, {about}{tokens.train} tokens ({tokens.trained} trained)",
        ),
        ("held out", f"{counted(report.valid_examples, 'example')}, {about}{tokens.valid} tokens, to measure with"),
        ("longest", f"{about}{tokens.longest} tokens ({tokens.longest_id}); nothing is cut short"),
        ("counted by", f"the tokenizer of {tokens.tokenizer}" if tokens.exact else tokens.tokenizer),
    ]
    text = f"{report.source}: {report.form} ({_size(report.source_bytes)})\n\n"
    text += "".join(f"  {name:<14}{value}\n" for name, value in lines)
    if report.notes:
        text += "\nWorth knowing\n" + "".join(f"  - {note}\n" for note in report.notes)
    return printable(text)


def preview_text(pieces: Pieces, exact: bool, colour: bool) -> str:
    """One example with the trained part marked. Pure."""
    begin, end = (_GREEN, _PLAIN) if colour else ("[[", "]]")
    title = "One example as the model reads it" if exact else "One example, in outline (without the model's tokenizer)"
    marks = "in green" if colour else "in [[double brackets]]"
    text = "".join(f"{begin}{printable(t)}{end}" if trained else printable(t) for t, trained in pieces)
    return f"\n{title}; it learns what stands {marks}\n\n{text.rstrip()}\n"


def printable(text: str) -> str:
    """The text without control characters, so that a training set cannot drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\u{ord(c):04x}" for c in text)


def _preview(train: Path, tokenizer: ChatTokenizer | None) -> Pieces:
    with train.open(encoding="utf-8") as file:
        example = json.loads(file.readline())
    messages: list[dict[str, Any]] = example["messages"]
    if tokenizer is None:
        return _outline(messages)

    def render(part: Sequence[dict[str, Any]], generation: bool) -> str:
        return tokenizer.render(part, generation, example.get("tools"))

    return marked(tokenise(messages, render, tokenizer.encode, tokenizer.end_ids), tokenizer.decode)


def _outline(messages: Sequence[dict[str, Any]]) -> Pieces:
    pieces: Pieces = []
    for message in messages:
        calls = "".join(f"\n{json.dumps(call['function'])}" for call in message.get("tool_calls", ()))
        trained = bool(message.get("trained"))
        pieces += [(f"{message['role']}: ", False), ((message["content"] + calls).strip(), trained), ("\n", False)]
    return pieces


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
