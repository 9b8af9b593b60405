"""Gathers the files of a job and writes its report.html.

url = write_report(store, "smoke-1", state)
"""

from __future__ import annotations

from recipes.job import File
from recipes.preparation import Plan, TrainingSetReport
from scripts.errors import NotFound, Problem
from scripts.evaluate import read_assessment, read_scores
from scripts.job_folder import read_job, whole_metrics
from scripts.report import ReportInput, report_html
from scripts.state import JobState
from scripts.store import Store


def write_report(store: Store, job_id: str, state: JobState) -> str:
    """Writes <job>/report.html from what the store holds now; returns its URL. Raises NotFound for an unknown job."""
    files = read_job(store, job_id)
    plan = _read(store, f"{job_id}/plan.json", Plan)
    training_set = _read(store, f"{job_id}/data/report.json", TrainingSetReport)
    if files.launch is None or plan is None or training_set is None:
        raise NotFound(Problem(f"job {job_id}", "its launch, plan or data is missing", "see `lorry jobs`"))
    page = report_html(
        ReportInput(
            launch=files.launch,
            plan=plan,
            training_set=training_set,
            result=files.result,
            proof=files.proof,
            manifest=files.manifest,
            metrics=whole_metrics(store.read(f"{job_id}/metrics.jsonl") or b""),
            outcome=state.state,
            sentence=state.sentence,
            cost_usd=files.manifest.cost_usd if files.manifest else state.spent_usd,
            scores=read_scores(store, job_id),
            assessment=read_assessment(store, job_id),
        )
    )
    store.write(f"{job_id}/report.html", page.encode())
    return f"{store.url}/{job_id}/report.html"


def _read(store: Store, key: str, model: type[File]) -> File | None:
    data = store.read(key)
    return None if data is None else model.model_validate_json(data)
