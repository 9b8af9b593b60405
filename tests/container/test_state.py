"""The state of a job as a table: files, observation and clock in, state out."""

from __future__ import annotations

from typing import Any

import pytest

from recipes.job import Attempt, ContainerState, Manifest, Status, Stop, Submission
from scripts.backends.base import Observation
from scripts.job_folder import JobFiles
from scripts.state import LENIENCY, SILENT_SECONDS, hourly_usd, job_state, overdue
from tests.container.conftest import spec_of

NOW = 10_000.0
SPEC = spec_of("job-1", "file:///jobs", 3600, 100)
ASKED = Submission(job_id="job-1", backend="local", request_sha256="", submitted_at=NOW - 100, handle={"pid": 1})
RECORDED = ASKED.model_copy(update={"handle": {}})
RUNNING, GONE, WAITING = Observation("running"), Observation("gone"), Observation("waiting")
STUCK = Observation("waiting", "Pod p: PROVISIONING")
DIED = Observation("gone", "Pod p: it is ERROR; it was terminated")
MANIFEST = Manifest(
    job_id="job-1", created_at=NOW, files={}, base_model="m", base_revision=None, base_sha256="", recipe_name="r",
    recipe_sha256="", training_set_sha256="", train_sha256="", valid_sha256="", versions={}, commit=None, image=None,
    initial_validation_loss=None, final_validation_loss=None, effect=1.0, reproduction_error=0.0,
    trainable_parameters=1, wall_seconds=1.0, cost_usd=None,
)  # fmt: skip


def container(**changes: Any) -> ContainerState:
    values: dict[str, Any] = {
        "job_id": "job-1", "stage": "training", "updated_at": NOW - 1, "started_at": NOW - 90, "pid": 1,
        "attempts": (Attempt(number=1, started_at=NOW - 81),),
    }  # fmt: skip
    return ContainerState(**(values | changes))


def stop(by: str = "user") -> Stop:
    return Stop.model_validate({"by": by, "reason": "enough", "at": NOW})


STATUS = Status(
    job_id="job-1", stage="training", attempt=1, updated_at=NOW - 1, step=40, total_steps=100, progress=40,
    training_loss=2.5, learning_rate=0.001,
)  # fmt: skip
ENDED = {"stage": "done", "sentence": "because", "updated_at": NOW - 1}


@pytest.mark.parametrize(
    ("files", "observation", "state", "sentence", "final"),
    [
        ({}, None, "queued", "no machine has been asked for", False),
        ({"submission": RECORDED}, None, "queued", "no machine has been asked for", False),
        ({"submission": ASKED}, WAITING, "starting", "first word", False),
        ({"submission": ASKED}, None, "starting", "first word", False),
        ({"submission": ASKED}, STUCK, "starting", "first word (Pod p: PROVISIONING)", False),
        ({"submission": ASKED}, DIED, "lost", "gone (Pod p: it is ERROR; it was terminated); launch", True),
        ({"submission": ASKED}, GONE, "lost", "launch the job again", True),
        ({"submission": ASKED, "container": container()}, RUNNING, "running", "training", False),
        ({"submission": RECORDED, "container": container()}, None, "running", "training", False),
        (
            {"submission": ASKED, "container": container(), "status": STATUS},
            RUNNING,
            "running",
            "training, step 40 of 100, loss 2.500",
            False,
        ),
        ({"submission": ASKED, "container": container(stage="proving")}, RUNNING, "running", "proving", False),
        (
            {"submission": ASKED, "container": container(), "status": STATUS},
            GONE,
            "lost",
            "the machine is gone at step 40 of 100",
            True,
        ),
        (
            {"submission": ASKED, "container": container(updated_at=NOW - SILENT_SECONDS - 1)},
            RUNNING,
            "lost",
            "no word from the machine for 2 minutes",
            False,
        ),
        ({"submission": ASKED, "container": container(), "stop": stop()}, RUNNING, "stopping", "enough", False),
        ({"submission": ASKED, "container": container(), "stop": stop()}, GONE, "cancelled", "enough", True),
        ({"submission": ASKED, "container": container(), "stop": stop("cap")}, GONE, "failed", "(cap): enough", True),
        ({"submission": ASKED, "stop": stop()}, WAITING, "stopping", "enough", False),
        ({"submission": RECORDED, "stop": stop()}, None, "cancelled", "enough", True),
        ({"stop": stop("operator")}, None, "failed", "(operator): enough", True),
        (
            {"submission": ASKED, "container": container(ended="failed", cause="nan_loss", **ENDED)},
            GONE,
            "failed",
            "because",
            True,
        ),
        (
            {"submission": ASKED, "container": container(ended="cancelled", **ENDED), "stop": stop()},
            RUNNING,
            "cancelled",
            "because",
            True,
        ),
        ({"container": container(ended="completed", **ENDED), "manifest": MANIFEST}, None, "completed", "proved", True),
        ({"container": container(), "manifest": MANIFEST, "stop": stop()}, GONE, "completed", "proved", True),
        ({"submission": ASKED, "container": container(ended="completed", **ENDED)}, GONE, "running", "done", False),
        (
            {"submission": ASKED, "container": container(ended="completed", updated_at=NOW - 999, stage="done")},
            GONE,
            "failed",
            "manifest.json is missing",
            True,
        ),
    ],
)
def test_state_is_a_function_of_files_observation_and_clock(
    files: dict[str, Any], observation: Observation | None, state: str, sentence: str, final: bool
) -> None:
    got = job_state(JobFiles("job-1", launch=SPEC, **files), observation, NOW)
    assert (got.state, got.is_final) == (state, final)
    assert sentence in got.sentence


def test_progress_and_time_left_come_from_the_steps_of_this_attempt() -> None:
    files = JobFiles("job-1", launch=SPEC, submission=ASKED, container=container(), status=STATUS)
    state = job_state(files, RUNNING, NOW)
    assert state.progress == 40
    assert state.eta_seconds == pytest.approx(80 / 40 * 60 - 1)  # 40 steps in 80 s, 60 to go, looked at 1 s later
    resumed = container(attempts=(Attempt(number=1, started_at=NOW - 81, resumed_from="step-000030"),))
    files = JobFiles("job-1", launch=SPEC, submission=ASKED, container=resumed, status=STATUS)
    assert job_state(files, RUNNING, NOW).eta_seconds == pytest.approx(80 / 10 * 60 - 1)


def test_a_measured_pace_corrects_the_time_left() -> None:
    measured = STATUS.model_copy(update={"step_seconds": 7.5})
    files = JobFiles("job-1", launch=SPEC, submission=ASKED, container=container(), status=measured)
    assert job_state(files, RUNNING, NOW).eta_seconds == 60 * 7.5


def test_money_is_hours_times_price_until_the_machine_is_gone() -> None:
    rented = SPEC.model_copy(update={"offer": "runpod-h200-4", "cap_usd": 5.0})
    price = hourly_usd(rented)
    assert price is not None
    assert price > 0
    asked = ASKED.model_copy(update={"submitted_at": NOW - 3600})
    files = JobFiles("job-1", launch=rented, submission=asked, container=container())
    assert job_state(files, RUNNING, NOW).spent_usd == pytest.approx(price)
    assert job_state(files, GONE, NOW + 9999).spent_usd == pytest.approx(price * 3599 / 3600)
    assert job_state(files, Observation("running", usd=1.25), NOW).spent_usd == 1.25
    assert job_state(JobFiles("job-1", launch=rented), None, NOW).spent_usd is None


SPOT = {"backend": "sagemaker", "offer": "sagemaker-p5-4xlarge-1", "deadline_seconds": 3600, "cap_usd": 8.0}
INTERRUPTED = Observation("waiting", "training job t: InProgress, Interrupted")


@pytest.mark.parametrize(
    ("said_ago", "waited", "observation", "limit", "spent"),
    [
        (1800, 0, INTERRUPTED, None, 1800),  # it ran for half an hour, and waits
        (4 * 3600, 0, INTERRUPTED, None, 1800),
        (5 * 3600 + 9, 0, INTERRUPTED, "deadline", 1800),  # the outer bound
        (1, 0, RUNNING, None, 1801),
        (1, 7200, RUNNING, None, 1801),  # it ran half an hour after two hours of waiting
        (1, 7200 - 1900, RUNNING, "deadline", 3701),
        (3 * 3600, 0, None, "deadline", 1800 + 3 * 3600),  # nobody could be asked: the clock goes on
    ],
)
def test_on_a_platform_that_waits_for_free_neither_limit_runs_without_a_machine(
    said_ago: float, waited: float, observation: Observation | None, limit: str | None, spent: float
) -> None:
    began = NOW - said_ago - 1800 - (waited if observation is RUNNING and waited == 7200 else 7200 if waited else 0)
    asked = ASKED.model_copy(update={"backend": "sagemaker", "submitted_at": began - 60})
    at = container(started_at=began, updated_at=NOW - said_ago, waited_seconds=waited)
    files = JobFiles("job-1", launch=SPEC.model_copy(update=SPOT), submission=asked, container=at)
    due = overdue(files, observation, NOW)
    assert (due[0] if due else None) == limit
    state = job_state(files, observation, NOW)
    assert state.spent_usd == pytest.approx(spent / 3600 * 7.912)
    if observation is INTERRUPTED:
        assert (state.state, state.is_final) == ("starting", False)
        assert "its machine was taken back; waiting for the next one (training job t" in state.sentence


def test_a_job_past_its_deadline_or_cap_is_overdue() -> None:
    files = JobFiles("job-1", launch=SPEC, submission=ASKED, container=container(started_at=NOW - 3600))
    assert overdue(files, None, NOW) is None
    late = overdue(files, None, NOW + 3600 * (LENIENCY - 1) + 1)
    assert late is not None
    assert late[0] == "deadline"
    dear = JobFiles("job-1", launch=SPEC.model_copy(update={"cap_usd": 2.0}), submission=ASKED, container=container())
    assert overdue(dear, Observation("running", usd=2.0), NOW) is None
    assert (overdue(dear, Observation("running", usd=2.1), NOW) or ("", ""))[0] == "cap"
    assert overdue(JobFiles("job-1", launch=SPEC, submission=RECORDED), None, NOW * 99) is None


@pytest.mark.parametrize(
    ("changes", "minutes", "is_mute"),
    [
        ({}, 29, False),
        ({}, 31, True),
        ({"container": container(updated_at=NOW - 3600)}, 31, True),  # of a machine before this one
        ({"container": container(updated_at=NOW - 31 * 60 + 5)}, 31, False),
        ({"launch": SPEC.model_copy(update={"offer": None})}, 99, False),  # no offer, no figure
    ],
)
def test_a_machine_that_never_says_a_word_is_overdue_after_five_times_its_start(
    changes: dict[str, Any], minutes: int, is_mute: bool
) -> None:
    rented = SPEC.model_copy(update={"offer": "runpod-h200-4", "cap_usd": 500.0, "deadline_seconds": 99999})
    asked = ASKED.model_copy(update={"handle": {"pod": "p", "created_at": NOW - 60 * minutes}})
    due = overdue(JobFiles("job-1", **({"launch": rented, "submission": asked} | changes)), None, NOW)
    said = "its machine said nothing for 31 minutes; the limit is 30 minutes, 5 times what starting takes"
    assert due == (("deadline", said) if is_mute else None)
