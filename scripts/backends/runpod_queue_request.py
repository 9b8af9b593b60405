"""The body of /run for a job, and whether an endpoint may run it. Pure, and without a secret.

request = queue_request(spec, endpoint_id); body = numbered(request, 1); problems = unfit(endpoint, spec, gpus)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec
from scripts.backends.runpod_offers import CENT
from scripts.errors import Problem, Refused

Json = dict[str, Any]
QUEUE_SECONDS = 3600.0
"How long a job may wait for a worker. Waiting is free, but a worker that dies at its start makes a job wait for ever."
SPARE_SECONDS = 300
"What the platform's own time limit leaves the container beyond its deadline: to save, and to bring home what there is."
LONGEST_SECONDS = 7 * 86_400
"The most Runpod allows for one serverless job, for its run time and for its life."
VARIABLE = "RUNPOD_TRAINING_ENDPOINT_ID"


def queue_request(spec: LaunchSpec, endpoint_id: str) -> Json:
    """The body without the number of the request. Both clocks are always sent: unsent, a job ends after 10 minutes.

    Raises Refused with every reason why this job cannot run on the queue.
    """
    problems = _problems(spec, endpoint_id)
    if problems:
        raise Refused(*problems)
    run = spec.deadline_seconds + SPARE_SECONDS
    life = min(LONGEST_SECONDS, run + int(QUEUE_SECONDS))  # it counts from the request, and ends a running job too
    return {
        "input": {"job_id": spec.job_id, "store": spec.store},
        "policy": {"executionTimeout": run * 1000, "ttl": life * 1000},
    }


def numbered(request: Mapping[str, Any], number: int) -> Json:
    """The body of one request to the queue. number: its claim in the job folder, by which a worker knows it."""
    return {**request, "input": {**request["input"], "number": number}}


def unfit(endpoint: Mapping[str, Any] | None, spec: LaunchSpec, gpus: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """Every reason why this endpoint may not run the job at its quote.

    endpoint: as REST v2 shows it, None when there is none. gpus: the live catalogue. A worker may come from any of the
    endpoint's pools, so each of them has to do.
    """
    want = f"{VARIABLE}: the queue endpoint that infra/live/*/runpod made"
    if endpoint is None or endpoint.get("type") != "QUEUE":
        return [Problem("endpoint", "there is none of that id" if endpoint is None else "it is no queue", want)]
    gpu = endpoint.get("gpu") or {}
    if gpu.get("count") != spec.gpus:
        said = f"its workers have {gpu.get('count', 0)} GPUs, the job needs {spec.gpus}"
        return [Problem(f"endpoint {endpoint['name']}", said, want)]
    found = [_pool_problem(str(pool), gpu, spec, gpus) for pool in gpu.get("pools") or ()]
    return [problem for problem in found if problem is not None]


def _pool_problem(
    pool: str, gpu: Mapping[str, Any], spec: LaunchSpec, gpus: Sequence[Mapping[str, Any]]
) -> Problem | None:
    catalog = load_catalog()
    offer = catalog.offers[spec.offer or ""]
    rows = [row for row in gpus if row.get("pool") == pool and row["id"] not in (gpu.get("excludedTypes") or ())]
    rows = [row for row in rows if row["price"].get("serverless")]
    where, want = f"pool {pool}", "take it out of the endpoint's pools, or plan again with the price of today"
    if not rows:
        return Problem(where, "this account is offered none of it", want)
    needed, least = catalog.gpus[offer.gpu].memory_gib, min(float(row["memory"]) for row in rows)
    if least + 1 < needed:  # the catalogue rounds
        return Problem(where, f"a GPU of {least:g} GB, the plan is for {needed:g} GiB", want)
    usd = max(float(row["price"]["serverless"]) for row in rows) * spec.gpus
    if usd > offer.usd_per_hour + CENT:
        return Problem(where, f"${usd:.2f} an hour now, the quote was ${offer.usd_per_hour:.2f}", want)
    return None


def _problems(spec: LaunchSpec, endpoint_id: str) -> list[Problem]:
    found = []
    offer = load_catalog().offers.get(spec.offer or "")
    if offer is None or offer.backend != "runpod_queue":
        found.append(Problem("offer", f"{spec.offer} is no offer of runpod_queue", "plan the recipe for runpod_queue"))
    if spec.nodes != 1:
        found.append(
            Problem(
                "hardware.nodes",
                f"{spec.nodes} on runpod_queue",
                "1: a queue job is one worker; ec2 and sagemaker take several nodes",
            )
        )
    if not endpoint_id:
        found.append(Problem(VARIABLE, "not set", "the training endpoint: `lorry env infra/live/dev/runpod` names it"))
    if spec.deadline_seconds + SPARE_SECONDS > LONGEST_SECONDS:
        hours = (LONGEST_SECONDS - SPARE_SECONDS) / 3600
        found.append(Problem("limits.max_hours", f"{spec.deadline_seconds / 3600:g} h", f"at most {hours:.1f} here"))
    return found
