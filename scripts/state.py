"""What a job is doing, from its files, what the provider says and the clock. Pure: any process sees the same.

state = job_state(files, observation, now=time.time()); state.state, state.sentence, state.is_final
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec, Stage
from recipes.recipe import BackendName
from scripts.backends.base import Observation, Phase
from scripts.job_folder import JobFiles

State = Literal["queued", "starting", "running", "stopping", "completed", "failed", "cancelled", "lost"]
Limit = Literal["deadline", "cap"]

SILENT_SECONDS = 120.0
"A container writes every 2 s and reaches a bucket every 5 s; after this long without a word it counts as silent."
LENIENCY = 1.02
"The container's own stop comes first; who watches from outside waits 2 % longer."
START_FACTOR = 5
"""So many times the offer's start_minutes (image pull and boot) may pass before a machine's first word. On Runpod that
is 30 minutes: 20 until the Pod must run, and 10 for which its container asks a silent store again."""

WAITING_IS_FREE: frozenset[BackendName] = frozenset({"runpod_queue", "sagemaker"})
"Here a job costs nothing, and its limits do not run, before a machine has taken it."

PAUSES_FREE: frozenset[BackendName] = frozenset({"sagemaker"})
"Here the platform itself finds the next machine for a job whose own it took back, and what it waits costs nothing."
NEXT_MACHINE_SECONDS = 5.0 * 3600
"For its next machine a job waits no longer; SageMaker's own limit (MaxWaitTimeInSeconds) allows four hours in all."

DOING: dict[Stage, str] = {
    "fetching": "fetching the training set and the base model",
    "loading": "loading the base model",
    "evaluating": "measuring the loss on held-out conversations",
    "training": "training",
    "saving": "saving the adapter",
    "proving": "proving the adapter in a fresh process",
    "storing": "storing the adapter",
    "done": "done",
}


@dataclass(frozen=True)
class JobState:
    """One job at one moment. progress: percent of the steps. A final state changes no more by itself; a lost job goes
    on from its newest checkpoint when it is launched again."""

    state: State
    sentence: str
    progress: int
    eta_seconds: float | None
    spent_usd: float | None
    is_final: bool


def job_state(files: JobFiles, observation: Observation | None, now: float) -> JobState:
    """The state of a job.

    observation: what the provider said, asked before `files` were read (a machine that ends in between has written
    how by then); None when it was not asked or did not answer. `now` is seconds since 1970.
    """
    state, sentence, is_final = _state(files, observation, now)
    return JobState(
        state,
        sentence,
        100 if state == "completed" else files.status.progress if files.status else 0,
        _eta_seconds(files, now) if state == "running" else None,
        _spent_usd(files, observation, now),
        is_final,
    )


def overdue(files: JobFiles, observation: Observation | None, now: float) -> tuple[Limit, str] | None:
    """The limit for which somebody outside must stop this job now, and a sentence. None while it may run."""
    spec, start = files.launch, _started_at(files)
    if spec is None or start is None:
        return None
    asked_at = files.submission.handle.get("created_at") if files.submission else None
    if asked_at is not None and (mute := mute_start(files, float(asked_at), now)):
        return "deadline", mute
    if _waits_for_the_next(files, observation) and files.container is not None:
        waited = now - files.container.updated_at
        if waited > NEXT_MACHINE_SECONDS:
            limit = f"{NEXT_MACHINE_SECONDS / 3600:.0f} h"
            return "deadline", f"it waited {waited / 3600:.2f} h for its next machine; the limit is {limit}"
    ran = without_waits(files, observation.phase if observation else None, now) - start
    if ran > spec.deadline_seconds * LENIENCY:
        return "deadline", f"it ran for {ran / 3600:.2f} h; the limit is {spec.deadline_seconds / 3600:.2f} h"
    spent = _spent_usd(files, observation, now)
    if spent is not None and spent > spec.cap_usd * LENIENCY:
        return "cap", f"it cost ${spent:.2f}; the cap is ${spec.cap_usd:.2f}"
    return None


def without_waits(files: JobFiles, phase: Phase | None, now: float) -> float:
    """What the clock of the job's limits shows at `now`: it stands while the job has no machine and that is free. Pure.

    phase: what the provider says; None when it was not asked. Closed waits are the container's own record.
    """
    container, spec = files.container, files.launch
    if container is None or spec is None or spec.backend not in PAUSES_FREE:
        return now
    stands = phase == "waiting" and container.ended is None
    return (min(now, container.updated_at) if stands else now) - container.waited_seconds


def was_taken(files: JobFiles, state: JobState, observation: Observation | None) -> bool:
    """Whether the job was lost because its provider took the machine back: it may go on elsewhere. Pure.

    By the provider's own word, or by the notice that the container heard: one that heeds it saves and ends its machine
    itself, and the provider then calls that the machine's own end. A notice to an earlier machine is not one to this.
    """
    if state.state != "lost" or observation is None or observation.phase != "gone":
        return False
    told_at = files.container.taken_at if files.container else None
    asked_at = float(files.submission.handle.get("created_at", 0.0)) if files.submission else 0.0
    return observation.was_taken or (told_at is not None and told_at >= asked_at)


def mute_start(files: JobFiles, asked_at: float, now: float) -> str | None:
    """A sentence when a machine that was asked for at `asked_at` should have said its first word by now. Pure.

    An image that cannot be started, or a start that hangs, has no container that could stop it.
    """
    offer = load_catalog().offers.get(files.launch.offer or "") if files.launch else None
    container = files.container
    has_spoken = container is not None and container.updated_at >= asked_at
    if offer is None or has_spoken or now - asked_at <= START_FACTOR * offer.start_minutes * 60:
        return None
    limit = f"{START_FACTOR * offer.start_minutes:.0f} minutes, {START_FACTOR} times what starting takes"
    return f"its machine said nothing for {(now - asked_at) / 60:.0f} minutes; the limit is {limit}"


def hourly_usd(spec: LaunchSpec) -> float | None:
    """The price of all its nodes for an hour, from the catalog; None when its offer is not in it."""
    offer = load_catalog().offers.get(spec.offer or "")
    return offer.usd_per_hour * spec.nodes if offer else None


def _state(files: JobFiles, observation: Observation | None, now: float) -> tuple[State, str, bool]:
    container, gone = files.container, observation is not None and observation.phase == "gone"
    silent = container is not None and now - container.updated_at > SILENT_SECONDS
    if files.manifest is not None:
        return "completed", "the adapter is proved and stored", True
    if container is not None and container.ended is not None:
        if container.ended == "completed":  # its manifest was written before, so a second look finds it
            return ("failed", "adapter/manifest.json is missing; train again", True) if silent else _running(files)
        return container.ended, container.sentence, True
    if files.stop is not None:
        return _stopped(files, gone or (observation is None and silent))
    if files.submission is None or not (files.submission.handle or container):
        return "queued", "no machine has been asked for; launch it", False
    said = f" ({observation.detail})" if observation is not None and observation.detail else ""
    if gone:
        sentence = f"the machine is gone{_at_step(files)}{said}; launch the job again and it goes on from there"
        return "lost", sentence, True
    if container is None:
        return "starting", f"waiting for the machine's first word{said}", False
    if _waits_for_the_next(files, observation):
        return "starting", f"its machine was taken back{_at_step(files)}; waiting for the next one{said}", False
    if silent:
        minutes = (now - container.updated_at) / 60
        return "lost", f"no word from the machine for {minutes:.0f} minutes{_at_step(files)}{said}", False
    return _running(files)


def _waits_for_the_next(files: JobFiles, observation: Observation | None) -> bool:
    waits = observation is not None and observation.phase == "waiting" and files.container is not None
    return waits and files.launch is not None and files.launch.backend in PAUSES_FREE


def _stopped(files: JobFiles, machine_is_gone: bool) -> tuple[State, str, bool]:
    stop, submission = files.stop, files.submission
    assert stop is not None
    never_asked = files.container is None and not (submission and submission.handle)
    if not (machine_is_gone or never_asked):
        return "stopping", f"asked to stop ({stop.by}): {stop.reason}", False
    if stop.by == "user":
        return "cancelled", f"it was stopped on request: {stop.reason}", True
    return "failed", f"it was stopped ({stop.by}): {stop.reason}", True


def _running(files: JobFiles) -> tuple[State, str, bool]:
    assert files.container is not None
    stage, status = files.container.stage, files.status
    sentence = DOING[stage]
    if stage == "training" and status is not None:
        sentence += f", step {status.step} of {status.total_steps}"
        sentence += f", loss {status.training_loss:.3f}" if status.training_loss is not None else ""
    return "running", sentence, False


def _at_step(files: JobFiles) -> str:
    return f" at step {files.status.step} of {files.status.total_steps}" if files.status else ""


def _eta_seconds(files: JobFiles, now: float) -> float | None:
    """Seconds to the last step at the pace the trainer measures; until it has one, at that of the whole attempt."""
    status, container = files.status, files.container
    if status is None or container is None or not container.attempts or status.stage == "done":
        return None
    attempt = container.attempts[-1]
    resumed = int((attempt.resumed_from or "step-0").rpartition("-")[2])
    done = status.step - resumed
    if attempt.number != status.attempt or done <= 0:
        return None
    if status.step_seconds is not None:
        return status.step_seconds * (status.total_steps - status.step)
    pace = (status.updated_at - attempt.started_at) / done
    return max(0.0, pace * (status.total_steps - status.step) - (now - status.updated_at))


def _started_at(files: JobFiles) -> float | None:
    """When the machine's time began: its own first word, or until then the request for it; None before both."""
    if files.container is not None:
        return files.container.started_at
    if files.submission is not None and files.submission.backend in WAITING_IS_FREE:
        return None
    asked = files.submission is not None and files.submission.handle
    return files.submission.submitted_at if asked and files.submission else None


def _spent_usd(files: JobFiles, observation: Observation | None, now: float) -> float | None:
    """What the provider says, else hours x price, from the request to the last word of a machine that is gone."""
    if observation is not None and observation.usd is not None:
        return observation.usd
    price = hourly_usd(files.launch) if files.launch else None
    if price is None or files.submission is None or not (files.submission.handle or files.container):
        return None
    container = files.container
    if files.submission.backend in WAITING_IS_FREE:
        if container is None:
            return 0.0
        asked = container.started_at
    else:
        asked = files.submission.submitted_at
    over = container is not None and (container.ended or (observation is not None and observation.phase == "gone"))
    start = min(asked, container.started_at) if container else asked
    phase = observation.phase if observation else None
    end = without_waits(files, phase, container.updated_at if container and over else now)
    return max(0.0, end - start) / 3600 * price
