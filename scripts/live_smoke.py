"""Trains the toy model in one Pod of the real Runpod, ends it, settles the bill, writes down what was seen.

LORRY_LIVE_SMOKE=yes python -m scripts.live_smoke     # without the variable it shows the quote and rents nothing

It needs RUNPOD_API_KEY, LORRY_IMAGE, an s3:// LORRY_STORE and LORRY_POD_SECRETS. The cap is one dollar. Whatever
happens, Ctrl-C included, the Pod is ended before it returns; RUNPOD_API_BASE_URL may lead it to a local Runpod.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from recipes.job import Manifest
from scripts.backends.base import machine_name
from scripts.backends.runpod_api import BASE_URL, RunpodApi
from scripts.backends.runpod_pod import RunpodPodBackend
from scripts.cost import Settlement, pod_bill, settle
from scripts.errors import InputError, LorryError, Problem, ProviderError, Refused, TrainingFailed
from scripts.job_folder import read_job
from scripts.launch import launch
from scripts.machine import ROOT
from scripts.prepare_job import PreparedJob, prepare_job
from scripts.pull import pull
from scripts.runpod_questions import Seen, answers, prices
from scripts.settings import Settings, read_settings
from scripts.state import JobState
from scripts.store import Store, open_store
from scripts.surprises import add_surprises
from scripts.watch import watch

RECIPE, TRAINING_SET = "smoke/pod", ROOT / "examples" / "bicycle-care.jsonl"
PAGE = ROOT / "docs" / "surprises.md"
MOST_USD = 1.0
SWITCH = "LORRY_LIVE_SMOKE"
SELF_END_SECONDS = 180.0
"So long a Pod may take to end itself after its job; then it is ended from here."
END_SECONDS = 600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads argv and environment; returns the exit code: 0 when the adapter is home and the Pod is gone."""
    parser = argparse.ArgumentParser(description="Trains the toy model in one real Pod, for less than a dollar.")
    parser.add_argument("--page", type=Path, help="where answers are added (default: docs/surprises.md)")
    parser.add_argument("--bill-minutes", type=float, default=10.0, help="how long to wait for the bill")
    given = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="lorry-live-") as folder:
            go(os.environ, given.page, given.bill_minutes * 60, Path(folder))
    except KeyboardInterrupt:
        return 130
    except LorryError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def go(environment: Mapping[str, str], page: Path | None, bill_seconds: float, folder: Path) -> None:
    """The whole way. Raises InputError, Refused, ProviderError, TrainingFailed or VerificationFailed."""
    require(environment)
    settings = read_settings(environment, Path.cwd())
    base_url = environment.get("RUNPOD_API_BASE_URL") or BASE_URL
    backend = RunpodPodBackend(environment)
    job = prepared(settings, folder)
    backend.request(job.spec)  # says all that is missing, before anybody is asked for anything
    require_consent(job, environment)
    store = open_store(settings.store)
    with RunpodApi(environment["RUNPOD_API_KEY"], base_url) as api:
        seen = Seen(base_url == BASE_URL, prices(api), "pagination" in api.ask("GET", "/pods"))
        state = trained(store, job, backend, api, seen)
        settlement = settled(store, job.spec.job_id, state, api, bill_seconds)
    manifest = adapter_of(store, job.spec.job_id, state, folder)
    report(seen, settlement, page)
    say("adapter", f"verified, {len(manifest.files)} files, effect {manifest.effect:.3g}")


def require(environment: Mapping[str, str]) -> None:
    """Raises InputError with everything that a Pod needs and this environment lacks."""
    problems = []
    if not environment.get("RUNPOD_API_KEY"):
        problems.append(Problem("RUNPOD_API_KEY", "not set", "a Runpod key that may make and end Pods"))
    if not environment.get("LORRY_IMAGE"):
        want = "the trainer's image by digest: infra/image/README.md"
        problems.append(Problem("LORRY_IMAGE", "not set", want))
    if not environment.get("LORRY_STORE", "").startswith("s3://"):
        problems.append(Problem("LORRY_STORE", "no s3:// URL", "a bucket that the Pod can reach"))
    if problems:
        raise InputError(*problems)


def prepared(settings: Settings, folder: Path) -> PreparedJob:
    """The job, checked and priced. Raises Refused when it could cost more than MOST_USD."""
    job = prepare_job(
        RECIPE, TRAINING_SET, backend="runpod_pod", settings=settings, folder=folder / "data", job_id=None,
        now=time.time(), token=secrets.token_hex(2), commit=None, say=say,
    )  # fmt: skip
    say("quote", f"at most ${job.spec.quote_usd:.2f}; ended at ${job.spec.cap_usd:.2f} whatever happens")
    if job.spec.cap_usd > MOST_USD:
        raise Refused(Problem("cap", f"${job.spec.cap_usd:.2f}", f"at most ${MOST_USD:.2f}"))
    return job


def require_consent(job: PreparedJob, environment: Mapping[str, str]) -> None:
    """Raises Refused unless a person has said that this may cost money."""
    if environment.get(SWITCH) != "yes":
        want = f"{SWITCH}=yes, to rent one Pod for at most ${job.spec.cap_usd:.2f}"
        raise Refused(Problem(SWITCH, "not set to yes, so nothing was rented", want))


def trained(store: Store, job: PreparedJob, backend: RunpodPodBackend, api: RunpodApi, seen: Seen) -> JobState:
    """How the job ended. When this returns or raises, no Pod of it is left, or the error says which one may be."""
    job_id = job.spec.job_id
    try:
        handle = launch(store, job.spec, job.plan, job.data, backend, time.time()).handle
        say(
            "pod",
            f"{handle['pod']}: {handle['gpu']} in {handle['datacenter']} at ${handle['usd_per_hour']:.2f} an hour",
        )
        seen.pod_usd_per_hour, seen.gpu, seen.created_at = handle["usd_per_hour"], handle["gpu"], handle["created_at"]
        state = watch(store, job_id, backend, sys.stdout)
        container = read_job(store, job_id).container
        seen.began_at = container.started_at if container else None
        seen.ended_itself_after = gone_after(api, job_id, SELF_END_SECONDS)
        if seen.ended_itself_after is None:
            seen.last_words = [line for line in backend.logs(handle)][-20:]
        return state
    finally:
        end_all(api, job_id)
        say("pod", "none of this job is left")


def gone_after(api: RunpodApi, job_id: str, patience: float) -> float | None:
    """Seconds until no Pod of the job is left; None when one is still there after `patience`."""
    began = time.monotonic()
    while pods_of(api, job_id):
        if time.monotonic() - began > patience:
            return None
        time.sleep(2.0)
    return time.monotonic() - began


def end_all(api: RunpodApi, job_id: str) -> None:
    """Ends every Pod of the job, deaf to further signals. Raises ProviderError naming those that may be left."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    give_up, left = time.monotonic() + END_SECONDS, [f"any Pod named {machine_name(job_id)}"]
    while time.monotonic() < give_up:
        try:
            left = pods_of(api, job_id)
            for pod in left:
                api.delete("pods", pod)
            if not left:
                return
        except ProviderError as error:
            say("pod", f"it could not be ended, trying again: {error}")
        time.sleep(2.0)
    raise ProviderError(Problem("Runpod", f"may still charge for {', '.join(left)}", "end it in Runpod's console NOW"))


def pods_of(api: RunpodApi, job_id: str) -> list[str]:
    """The ids of the Pods of this job that may cost something."""
    return [p["id"] for p in api.listed("pods") if p["name"] == machine_name(job_id) and p["status"] != "TERMINATED"]


def settled(store: Store, job_id: str, state: JobState, api: RunpodApi, patience: float) -> Settlement | None:
    """What it did cost: by the bill if that comes in time, else by hours x price."""
    give_up = time.monotonic() + patience
    while True:
        found = settle(store, read_job(store, job_id), state, partial(pod_bill, api), time.time())
        if found is None or found.source == "bill" or time.monotonic() > give_up:
            break
        time.sleep(min(15.0, patience))
    if found is not None:
        say("bill", f"${found.usd:.4f} by {found.source}; the quote was ${found.quote_usd:.2f}")
    return found


def adapter_of(store: Store, job_id: str, state: JobState, folder: Path) -> Manifest:
    """The adapter, fetched and verified. Raises TrainingFailed when there is none."""
    if state.state != "completed":
        raise TrainingFailed(Problem(f"job {job_id}", f"{state.state}: {state.sentence}", "see its logs in the store"))
    return pull(store, job_id, folder / "adapter")


def report(seen: Seen, settlement: Settlement | None, page: Path | None) -> None:
    """Says what was seen; writes it down when it was the real Runpod, or when a page was named."""
    found = answers(seen, settlement)
    for one in found:
        say("seen", f"{one.asked} {one.seen}")
    where = page or (PAGE if seen.is_real else None)
    if where is not None:
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        add_surprises(where, found, date, "make live-smoke" if seen.is_real else "a local Runpod")
        say("page", str(where))


def say(stage: str, sentence: str) -> None:
    """One line of progress."""
    print(f"{stage:<10} {sentence}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
