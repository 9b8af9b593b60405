"""Five training jobs that train for real while something goes wrong: a verified adapter, and all of it billed."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.cost import settle
from scripts.errors import ProviderError
from scripts.pull import pull
from scripts.state import JobState
from scripts.store import open_store
from scripts.watch import watch
from tests.runpod.test_real_trainer import smoke_spec
from tests.runpod.test_real_worlds import model  # noqa: F401
from tests.sagemaker.conftest import SETTINGS, Room
from tests.sagemaker.fake_sagemaker import ENDED, SPOT_SHARE, Fault, Job, Mishap, SageMaker

LAUNCHES = 10
PRICE = 7.912
BLOWS = {
    "the answer to a create is lost": [Fault("CreateTrainingJob", 0, carried_out=True)],
    "requests are throttled": [
        Fault("CreateTrainingJob", 400, "ThrottlingException", 7),
        Fault("DescribeTrainingJob", 400, "ThrottlingException", 7),
    ],
    "there is no capacity": [],
    "spot wants the machine back": [],
    "the machine is lost": [],
}
MISHAPS = {"spot wants the machine back": "interrupt", "the machine is lost": "internal"}


def live(room: Room, blow: str) -> JobState:
    """From the first launch to the end, launched again whenever its training job was lost."""

    def wait_and_strike(seconds: float) -> None:
        time.sleep(seconds)
        alive = [job for job in room.account.jobs.values() if job.status not in ENDED]
        assert len(alive) <= 1
        if pending and alive and is_training(room.account, alive[0]):
            alive[0].mishap = Mishap(pending.pop())

    pending = [MISHAPS[blow]] if blow in MISHAPS else []
    for _ in range(LAUNCHES):
        try:
            room.launch()
        except ProviderError:
            time.sleep(1.0)
            continue
        state = watch(
            room.store, room.spec.job_id, room.backend, io.StringIO(), poll_seconds=0.2, sleep=wait_and_strike
        )
        if state.state != "lost":
            assert not pending, "the blow never fell"
            return state
    raise AssertionError(f"launched {LAUNCHES} times\n{room.said()}")


def is_training(account: SageMaker, job: Job) -> bool:
    """By the files on the machine's own disk: the bucket hears of it later."""
    states = account.folder.joinpath(job.name).glob("*/lorry-*/status.json")
    return any('"training"' in path.read_text() for path in states)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("blow", BLOWS)
def test_a_training_job_that_really_trains_comes_to_its_adapter_although(
    blow: str,
    make_account: Callable[..., SageMaker],
    model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    account, is_spot = make_account(), "spot" in blow
    account.variables |= {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "LORRY_MODELS": str(model.parent)}
    account.faults += [Fault(**vars(fault)) for fault in BLOWS[blow]]
    account.mishaps += [Mishap("no_capacity")] if "capacity" in blow else []
    spec = smoke_spec(tmp_path / "data", "real-1", "sagemaker", 9.0)
    settings = SETTINGS | {"LORRY_SAGEMAKER_SPOT": "yes" if is_spot else "no"}
    room = Room(account, open_store(spec.store), tmp_path / "data", spec, settings)
    state = live(room, blow)
    assert state.state == "completed", f"{state}\n{room.said()}"
    files = room.finish()
    manifest = pull(room.store, "real-1", tmp_path / "adapter")
    assert manifest.effect > 0
    assert len(account.jobs) == (2 if blow in ("there is no capacity", "the machine is lost") else 1)
    assert sum(job.starts for job in account.jobs.values()) == (2 if blow in MISHAPS else 1)
    assert not any(fault.times for fault in account.faults)
    share = SPOT_SHARE if is_spot else 1.0
    bill = sum(int(job.on_seconds * share) for job in account.jobs.values()) / 3600 * PRICE
    settlement = settle(room.store, files, state, room.backend.charges, time.time())
    assert settlement is not None
    assert settlement.is_final
    assert settlement.usd == pytest.approx(bill, abs=1e-5)
