"""Sentences for a person: what is worth knowing about a training set before money is spent on it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.job import TrainingSetReport
from recipes.recipe import Data
from scripts.training_set import convert
from scripts.training_set.findings import Findings

SMALL_SET = 20  # examples; below it a run mostly learns to repeat them
SENTENCES = {
    convert.DOUBLED: "The history already held the current question {count} times; it is used once.",
    convert.ROLELESS: "{count} histories do not say who spoke ({lines}); only question and answer of these are used.",
    convert.EMPTY_ANSWER: "{count} answers are empty ({lines}); they stay as context and are not trained.",
    convert.CUT: "{count} conversations go on after their last answer; what follows it is left out.",
    convert.OPENING: "{count} conversations open with an answer before any question; it is not trained.",
}


def notes(
    report: TrainingSetReport, findings: Findings, data: Data, header: Sequence[int], one_system_prompt: bool
) -> tuple[str, ...]:
    """The sentences of the report, most important first."""
    said = []
    if report.train_examples < SMALL_SET:
        said.append(
            f"A very small set: {report.train_examples} examples to learn from. Expect it to be repeated, not learned."
        )
    if data.validation_fraction > 0 and report.valid_examples == 0:
        said.append(
            "No conversation is held out: there is only one, or all contain each other. Overfitting will not show."
        )
    elif report.valid_examples == 1:
        said.append("Only one example is held out: take the validation loss with a grain of salt.")
    for total in header:
        if total not in (report.rows, report.usable_rows):
            said.append(f"The header announces {total} pairs, the file holds {report.rows}: was it cut?")
    for kind, sentence in SENTENCES.items():
        count, lines = findings.noted(kind)
        if count:
            said.append(sentence.format(count=count, lines=named_lines(lines, count)))
    if report.per_pair:
        said.append(
            f"{report.per_pair} conversations are trained as one example per answer, each with its history: one for "
            "all would change the text that an answer follows."
        )
    if one_system_prompt:
        said.append("Every example has the same system prompt: use it word for word when you call the adapter.")
    if not report.tokens.exact:
        said.append("Tokens are estimated, since the model's tokenizer is not on this machine.")
    return tuple(said)


def named_lines(lines: Sequence[int], count: int) -> str:
    """`line 3`, or `lines 3, 5, 8 and 12 more`; at most five are named."""
    shown = ", ".join(str(line) for line in lines[:5])
    more = f" and {count - 5} more" if count > 5 else ""
    return f"line{'s' if count > 1 else ''} {shown}{more}"
