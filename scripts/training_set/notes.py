"""Sentences for a person: what is worth knowing about a training set before money is spent on it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.preparation import TrainingSetReport
from recipes.recipe import Data
from scripts.training_set import convert
from scripts.training_set.findings import Findings

SMALL_SET = 20  # examples; below it a run mostly learns to repeat them
SENTENCES = {
    convert.DOUBLED: "Where the history ended with the current question again, it is used once ({places}).",
    convert.ROLELESS: "Where the history does not say who spoke, only question and answer are used ({places}).",
    convert.EMPTY_ANSWER: "Empty answers stay as context and are not trained ({places}).",
    convert.CUT: "What follows the last answer of a conversation is left out ({places}).",
    convert.CONTROL: "Messages contain the model's own control tokens, which end or open turns ({places}).",
    convert.OPENING: "An answer before any question is not trained ({places}).",
}


def notes(
    report: TrainingSetReport,
    findings: Findings,
    data: Data,
    header: Sequence[int],
    held_out: int,
    one_system_prompt: bool,
) -> tuple[str, ...]:
    """The sentences of the report, most important first. `held_out` counts conversations."""
    said = []
    if report.train_examples < SMALL_SET:
        said.append(f"A very small set: {counted(report.train_examples, 'example')} to learn from. Expect little.")
    if data.validation_fraction > 0 and report.valid_examples == 0:
        said.append(
            "Nothing is held out: there is one conversation, or all contain each other. Overfitting stays unseen."
        )
    elif held_out == 1:
        said.append("Only one conversation is held out: its loss says little about new questions.")
    for total in header:
        if total not in (report.rows, report.usable_rows):
            said.append(f"The header announces {total} pairs, the file holds {report.rows}: was it cut?")
    for kind, sentence in SENTENCES.items():
        count, lines = findings.noted(kind)
        if count:
            said.append(sentence.format(places=named_lines(lines, count)))
    if report.per_pair:
        said.append(
            f"Trained as one example per answer, each with its history: {counted(report.per_pair, 'conversation')}. "
            "As one example, an answer would follow another text."
        )
    if one_system_prompt:
        said.append("Every example has the same system prompt: use it word for word when you call the adapter.")
    if not report.tokens.exact:
        said.append("Tokens are estimated, since the model's tokenizer is not on this machine.")
    return tuple(said)


def counted(count: int, noun: str) -> str:
    """`1 example`, `2 examples`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def named_lines(lines: Sequence[int], count: int) -> str:
    """`line 3`, or `lines 3, 5, 8 and 12 more`; at most five are named."""
    shown = ", ".join(str(line) for line in lines[:5])
    more = f" and {count - 5} more" if count > 5 else ""
    return f"line{'s' if count > 1 else ''} {shown}{more}"
