"""The part of report.html that says how an adapter compares with its base: losses, a table of conversations, answers.

html = evaluation_html(scores, assessment)
"""

from __future__ import annotations

from html import escape

from recipes.evaluation import Answer, Assessment, Scores, TextScore
from scripts.evaluate import summary

_MOST_ROWS = 64
_MOST_CHARACTERS = 1200


def evaluation_html(scores: Scores | None, assessment: Assessment | None) -> str:
    """The section; empty where nothing was measured."""
    if scores is None:
        return ""
    return _verdict(assessment) + _answers(scores) + _conversations(scores) + _forgotten(scores)


def _verdict(assessment: Assessment | None) -> str:
    if assessment is None:
        return (
            "<h2>Evaluation</h2><p>Measured, not yet held against the recipe's limits: <code>lorry evaluate</code>.</p>"
        )
    tone, word = ("good", "passed") if assessment.passed else ("bad", "not passed")
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in summary(assessment))
    return f"<h2>Evaluation <span class='{tone}'>{word}</span></h2><table class='facts'>{rows}</table>"


def _answers(scores: Scores) -> str:
    if not scores.answers:
        return ""
    note = f"Greedy, cut after {scores.answer_tokens} tokens. The question is the last of a held-out conversation."
    return f"<h2>Answers side by side</h2><p class='soft'>{note}</p>" + "".join(_answer(a) for a in scores.answers)


def _answer(answer: Answer) -> str:
    rows = (("wanted", answer.wanted), ("base", answer.base), ("adapter", answer.adapter))
    cells = "".join(f"<tr><th>{name}</th><td>{escape(text[:_MOST_CHARACTERS])}</td></tr>" for name, text in rows)
    return f"<p><b>{escape(answer.question[:_MOST_CHARACTERS])}</b></p><table class='facts'>{cells}</table>"


def _conversations(scores: Scores) -> str:
    if not scores.held_out:
        return ""
    of = f"{len(scores.held_out)} of {scores.held_out_total}" if scores.held_out_total > len(scores.held_out) else "all"
    return f"<h2>Held-out conversations ({of})</h2>" + _table(scores.held_out[:_MOST_ROWS])


def _forgotten(scores: Scores) -> str:
    worst = sorted(scores.general, key=lambda score: score.rise, reverse=True)[:5]
    return "<h2>General questions, the five that suffered most</h2>" + _table(tuple(worst)) if worst else ""


def _table(scores: tuple[TextScore, ...]) -> str:
    names = ("tokens", "base", "adapter")
    head = "<tr><th>text</th>" + "".join(f"<th class='number'>{name}</th>" for name in names) + "</tr>"
    rows = "".join(
        f"<tr><td>{escape(s.name[:120])}</td><td class='number'>{s.tokens}</td>"
        f"<td class='number'>{s.base / s.tokens:.3f}</td><td class='number'>{s.adapter / s.tokens:.3f}</td></tr>"
        for s in scores
    )
    return f"<table>{head}{rows}</table><p class='soft'>Loss per answer token, lower is better.</p>"
