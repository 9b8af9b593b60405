"""Plan and reality of jobs that ran: seconds of a step, peak memory, minutes of loading, dollars.

for row in compare(store, "smoke-zero3-1"): print(row.what, row.planned, row.real)
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pydantic import ValidationError

from recipes.job import LaunchSpec, Metric
from recipes.preparation import OfferPlan, Plan
from scripts.cost import Settlement, read_settlement
from scripts.errors import NotFound, Problem
from scripts.job_folder import JobFiles, read_job, whole_metrics
from scripts.store import Store

MINUTE = 60.0


@dataclass(frozen=True)
class Compared:
    """One figure of a job as it was planned and as it came; None where it is not known."""

    what: str
    planned: float | None
    real: float | None

    @property
    def ratio(self) -> float | None:
        """Reality over plan."""
        return self.real / self.planned if self.planned and self.real is not None else None


def compare(store: Store, job_id: str) -> list[Compared]:
    """The figures of one job, also of one that failed, as far as it came. Raises NotFound for an unknown job."""
    files = read_job(store, job_id)
    if files.launch is None:
        raise NotFound(Problem(f"job {job_id}", f"no such job in {store.url}", "see `lorry jobs`"))
    offer = _offer(store, files.launch)
    metrics = whole_metrics(store.read(f"{job_id}/metrics.jsonl") or b"")
    settlement = read_settlement(store, job_id)
    return [
        Compared("seconds per step", files.launch.expected_step_seconds, _step_seconds(metrics)),
        Compared("peak GiB", files.launch.expected_peak_gib, files.result.peak_gib if files.result else None),
        Compared("minutes to first figure", _planned_start(offer, files.launch), _real_start(files, metrics)),
        Compared("dollars, likely", offer.usd.likely if offer and offer.usd else None, _usd(files, settlement)),
        Compared("dollars, quoted", files.launch.quote_usd, _usd(files, settlement)),
    ]


def table(jobs: dict[str, list[Compared]]) -> str:
    """All jobs for a person, and the median of each figure's ratio where there are several."""
    lines = [f"{'':<30}{'planned':>10}{'real':>10}{'real/plan':>11}"]
    for job_id, rows in jobs.items():
        lines.append(job_id)
        lines += [f"  {row.what:<28}{_shown(row.planned)}{_shown(row.real)}{_shown(row.ratio, 11)}" for row in rows]
    if len(jobs) > 1:
        lines.append("median of real/plan")
        for what, ratio in medians(jobs.values()).items():
            lines.append(f"  {what:<28}{'':>20}{_shown(ratio, 11)}")
    return "\n".join(lines)


def medians(jobs: Iterable[list[Compared]]) -> dict[str, float]:
    """The median ratio of each figure over the jobs that know it."""
    ratios: dict[str, list[float]] = {}
    for row in (row for rows in jobs for row in rows):
        if row.ratio is not None:
            ratios.setdefault(row.what, []).append(row.ratio)
    return {what: statistics.median(found) for what, found in ratios.items()}


def _offer(store: Store, spec: LaunchSpec) -> OfferPlan | None:
    """The plan of the offer that was taken."""
    try:
        plan = Plan.model_validate_json(store.read(f"{spec.job_id}/plan.json") or b"")
    except ValidationError:
        return None
    return next((offer for offer in plan.offers if offer.offer == spec.offer), None)


def _step_seconds(metrics: Sequence[Metric]) -> float | None:
    """The median time from one step to the next within an attempt: a checkpoint between two is an exception."""
    steps = [metric for metric in metrics if metric.kind == "train"]
    gaps = [b.at - a.at for a, b in pairwise(steps) if a.attempt == b.attempt and b.step == a.step + 1]
    return statistics.median(gaps) if gaps else None


def _planned_start(offer: OfferPlan | None, spec: LaunchSpec) -> float | None:
    """Loading, and the first of two evaluations or else the first step."""
    if offer is None or "load" not in offer.minutes:
        return None
    if spec.valid_examples:
        return offer.minutes["load"].likely + offer.minutes["evaluate"].likely / 2
    return offer.minutes["load"].likely + (spec.expected_step_seconds or 0.0) / MINUTE


def _real_start(files: JobFiles, metrics: Sequence[Metric]) -> float | None:
    """From the trainer's start to the first line of metrics.jsonl."""
    if not files.container or not files.container.attempts or not metrics:
        return None
    first = files.container.attempts[0]
    mine = [metric.at for metric in metrics if metric.attempt == first.number]
    return (mine[0] - first.started_at) / MINUTE if mine else None


def _usd(files: JobFiles, settlement: Settlement | None) -> float | None:
    """What it did cost: settled, or as the manifest has it."""
    if settlement is not None:
        return settlement.usd
    return files.manifest.cost_usd if files.manifest else None


def _shown(value: float | None, width: int = 10) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.2f}"
