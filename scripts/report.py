"""report.html: what a person looks at when a job has ended. Pure: the files of a job in, one self-contained page out.

html = report_html(launch=spec, plan=plan, training_set=report, result=result, proof=proof, metrics=metrics, ...)
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from recipes.evaluation import Assessment, Scores
from recipes.job import LaunchSpec, Manifest, Metric, Proof, Result
from recipes.preparation import Plan, TrainingSetReport
from scripts.loss_chart import loss_chart
from scripts.report_evaluation import evaluation_html

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6775; --line: #d8dee6; --paper: #ffffff; --card: #f5f7fa;
        --train: #9db4d0; --trend: #2458a6; --valid: #c2571a; --good: #1d7a46; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ecf1; --soft: #9aa6b4; --line: #36404c; --paper: #14181d;
        --card: #1d232b; --train: #47607f; --trend: #8ab4f8; --valid: #f0a070; --good: #6fcf97; --bad: #f28b82; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 52rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .7rem 1rem; flex: 1 1 7rem; }
.card b { display: block; font-size: 1.15rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; }
table.facts th { width: 11rem; }
pre { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
"""


@dataclass(frozen=True)
class ReportInput:
    """What is known of a job; everything after `training_set` may be missing when it failed early."""

    launch: LaunchSpec
    plan: Plan
    training_set: TrainingSetReport
    result: Result | None
    proof: Proof | None
    manifest: Manifest | None
    metrics: Sequence[Metric]
    outcome: str
    "completed, failed or cancelled."
    sentence: str
    cost_usd: float | None
    scores: Scores | None = None
    assessment: Assessment | None = None


def report_html(job: ReportInput) -> str:
    """The page, with every value escaped and nothing loaded from elsewhere."""
    body = "".join(
        (
            _head(job),
            _cards(job),
            f"<h2>How the loss went</h2>{loss_chart(job.metrics)}",
            _before_after(job),
            evaluation_html(job.scores, job.assessment),
            _training_set(job.training_set),
            _trained(job.result),
            _machine(job),
            _how_to_load(job),
        )
    )
    title = escape(f"{job.launch.job_id}: {job.outcome}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )


def _head(job: ReportInput) -> str:
    tone = "good" if job.outcome == "completed" else "bad"
    line = f"{job.launch.recipe_name} on {job.launch.recipe.base.id}"
    cause = f"<p class='bad'>{escape(job.sentence)}</p>" if job.outcome != "completed" else ""
    title = f"<h1>{escape(job.launch.job_id)} <span class='{tone}'>{job.outcome}</span></h1>"
    return f"{title}<p class='soft'>{escape(line)}</p>{cause}"


def _cards(job: ReportInput) -> str:
    result, proof = job.result, job.proof
    cards = []
    if result and result.final_validation_loss is not None and result.initial_validation_loss is not None:
        before, after = result.initial_validation_loss, result.final_validation_loss
        cards.append(("held-out loss", f"{before:.3f} to {after:.3f}"))
    if proof:
        cards.append(("the adapter acts", "yes, proven" if proof.passed else "no"))
    if job.manifest:
        cards.append(("files", "verified"))
    cards.append(("cost", "unknown" if job.cost_usd is None else f"${job.cost_usd:.2f}"))
    cards.append(("quoted at most", f"${job.launch.quote_usd:.2f}"))
    return (
        "<div class='cards'>" + "".join(f"<div class='card'>{k}<b>{escape(v)}</b></div>" for k, v in cards) + "</div>"
    )


def _before_after(job: ReportInput) -> str:
    result = job.result
    if result is None or result.initial_validation_loss is None:
        return ""
    rows: list[tuple[str, float | None, float | None]] = [
        ("held-out conversations", result.initial_validation_loss, result.final_validation_loss)
    ]
    rows.append(("training examples, first and last step", result.first_training_loss, result.final_training_loss))
    cells = "".join(
        f"<tr><td>{name}</td><td class='number'>{_loss(a)}</td><td class='number'>{_loss(b)}</td></tr>"
        for name, a, b in rows
    )
    note = (
        "The loss says how surprised the model is by the right answer, per token; lower is better. "
        "The held-out conversations were never trained on."
    )
    return (
        "<h2>Before and after</h2><table>"
        "<tr><th>loss on</th><th class='number'>before</th><th class='number'>after</th></tr>"
        f"{cells}</table><p class='soft'>{note}</p>"
    )


def _training_set(report: TrainingSetReport) -> str:
    kind = "tokens" if report.tokens.exact else "tokens (estimated)"
    answers = f"{report.tokens.trained:,} of them answers"
    rows = [
        ("file", f"{report.source} ({report.form})"),
        ("conversations", f"{report.conversations}"),
        (
            "trained on",
            f"{report.train_examples} examples, {report.tokens.train:,} {kind}, {answers}",
        ),
        ("held out", f"{report.valid_examples} examples, {report.tokens.valid:,} {kind}"),
        ("longest example", f"{report.tokens.longest:,} {kind} ({report.tokens.longest_id})"),
    ]
    rows += [("left out", f"{s.count}: {s.reason}") for s in report.skipped]
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f"<h2>What it was trained on</h2>{_table(rows)}" + (f"<ul class='soft'>{notes}</ul>" if notes else "")


def _trained(result: Result | None) -> str:
    if result is None or not result.trained:
        return ""
    rows = [(g.group, f"{g.matrices} matrices, {g.parameters:,} parameters") for g in result.trained]
    rows.append(("together", f"{result.trainable_parameters:,} parameters"))
    return f"<h2>What was trained</h2>{_table(rows)}"


def _machine(job: ReportInput) -> str:
    result, spec = job.result, job.launch
    unit = "processes" if spec.backend == "local" else "GPUs"
    rows = [
        (
            "machine",
            f"{spec.offer or spec.backend}: {spec.gpus * spec.nodes} {unit}",
        )
    ]
    if result:
        rows.append(("time in the trainer", str(datetime.timedelta(seconds=round(result.wall_seconds)))))
        rows.append(("steps", f"{result.step} of {result.total_steps}"))
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in sorted(result.versions.items()))))
    rows.append(("recipe", f"{spec.recipe_name}, sha256 {spec.recipe_sha256[:12]}"))
    return f"<h2>Where and how</h2>{_table(rows)}"


def _how_to_load(job: ReportInput) -> str:
    if job.manifest is None:
        return ""
    code = (
        "from transformers import AutoModelForCausalLM\nfrom peft import PeftModel\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{job.launch.recipe.base.id}")\n'
        f'model = PeftModel.from_pretrained(base, "{job.launch.job_id}/adapter")\n'
    )
    fetch = f"lorry pull {job.launch.job_id} adapter/\nlorry verify adapter/"
    return (
        "<h2>How to load the adapter</h2>"
        f"<p>Fetch it, and check that every bit arrived:</p><pre>{escape(fetch)}</pre>"
        f"<p>Then, where the base model is at hand:</p><pre>{escape(code)}</pre>"
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return (
        "<table class='facts'>"
        + "".join(f"<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
        + "</table>"
    )


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
