"""A launch that gets no machine: its job is kept and said so, gone on with and never doubled, or ended where that is
all that can be done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.cli import main
from scripts.errors import Conflict, ProviderError
from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.server import Fault
from scripts.job_folder import job_ids, read_job
from scripts.launch import UNASKED_SECONDS
from scripts.state import job_state
from tests.money.conftest import Place
from tests.money.jobs import Life

ROOM = "s3://bucket/clients/acme/jobs"
DOOR = {"LORRY_PUBLIC_URL": "https://lorry.example", "LORRY_TOKEN_SECRET": "a-token-secret-of-a-test"}
SET = Path(__file__).parents[2] / "examples" / "bicycle-care.jsonl"


@pytest.fixture
def clock() -> Clock:
    """The commands read the clock of this machine."""
    return Clock(frozen_at=time.time())


@pytest.fixture
def launch(place: Place, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """launch("--json"): the command in this process, on the place's account and store."""
    for module in ("scripts.store", "scripts.run", "scripts.backends.runpod_pod"):
        monkeypatch.setattr(f"{module}.open_store", lambda url: place.store)  # a Pod would not see this disk
    for name, value in {**place.environment, "LORRY_STORE": ROOM, **DOOR}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LORRY_CLIENTS", raising=False)
    return lambda *words: main(["launch", "smoke/pod", "--training-set", str(SET), "--backend", "runpod_pod", *words])


def test_a_launch_without_a_machine_says_what_becomes_of_it_and_the_next_one_goes_on_with_it(
    place: Place, launch: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    stock = {gpu: dict(places) for gpu, places in place.local.account.catalog.stock.items()}
    for places in place.local.account.catalog.stock.values():
        places.clear()
    assert launch("--json") == ProviderError.exit_code
    (job_id,) = job_ids(place.store)
    submission = read_job(place.store, job_id).submission
    assert submission is not None
    until = time.strftime("%H:%M", time.gmtime(submission.submitted_at + UNASKED_SECONDS))
    said = json.loads(capsys.readouterr().err.splitlines()[-1])["problems"][-1]
    assert said == {
        "where": f"job {job_id}",
        "got": f"it is kept; `lorry tick` asks again until {until} (UTC)",
        "want": f"`lorry stop {job_id}` ends that",
    }
    place.local.account.catalog.stock.update(stock)
    assert launch() == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"launched  {job_id}\n")
    assert f"goes on with {job_id}, the same run" in err
    place.rest(400)
    assert place.tick().done == []
    assert place.pods() == [f"lorry-{job_id}"]
    assert launch() == 0
    assert len(place.pods()) == 2, "the first one waits no more, so this is another"


def test_a_launch_without_the_right_ends_its_job_with_the_sentence(
    place: Place, launch: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    place.local.faults.append(Fault("POST", "/pods", 401, times=9))
    assert launch() == ProviderError.exit_code
    (job_id,) = job_ids(place.store)
    assert f"job {job_id}: ended: asking again would change nothing; mend that" in capsys.readouterr().err
    place.local.faults.clear()
    place.rest(400)
    place.tick()
    assert place.pods() == []
    assert launch("--job", job_id) == Conflict.exit_code
    assert f"job {job_id}: it was stopped (operator): Runpod: POST" in capsys.readouterr().err
    assert launch() == 0
    assert len(job_ids(place.store)) == 2


def test_the_tick_asks_no_more_where_that_changes_nothing(place: Place) -> None:
    Life(place.store, "job-1").submitted(place.clock.now())
    place.local.faults.append(Fault("POST", "/pods", 401, times=1))
    place.rest(400)
    (said,) = place.tick().done
    assert said.startswith("job-1: ended, since asking again changes nothing: Runpod: POST")
    place.rest(400)
    assert place.tick().done == ["job-1: settled at $0.00 (hours)"]
    assert place.pods() == []
    state = job_state(read_job(place.store, "job-1"), None, place.clock.now())
    assert (state.state, state.is_final) == ("failed", True)
    assert "status 401" in state.sentence


def test_a_job_that_has_trained_is_not_ended_by_a_right_that_is_missing_now(place: Place) -> None:
    life = Life(place.store, "job-1").submitted(place.clock.now()).runs(place.clock.now())
    place.local.faults.append(Fault("POST", "/pods", 401, times=1))
    place.rest(400)
    assert "status 401" in place.tick().troubles[0]
    assert life.record("stop.json") is None
    assert place.tick().done == ["job-1: launched again"]
