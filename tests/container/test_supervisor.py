"""Children: none is left behind, none outlives us, and one that stands still is told from one that is slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.job import Stage, Status
from scripts.container.supervisor import MARK, Patience, Timing, end_leftovers, start_child, tail, watch_child
from scripts.container.verdict import End

QUICK = Timing(poll=0.02, grace=0.3)
SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


def start(code: str, folder: Path) -> subprocess.Popen[bytes]:
    return start_child([sys.executable, "-c", code], dict(os.environ), folder / "child.log", folder)


def until_up(folder: Path) -> None:
    give_up = time.monotonic() + 60
    while "up" not in tail(folder / "child.log"):
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_a_child_that_ends_by_itself_gives_its_code_and_its_log(tmp_path: Path) -> None:
    child = start("print('hello'); raise SystemExit(7)", tmp_path)
    assert watch_child(child, lambda: None, QUICK, tmp_path) == End(7, None)
    assert tail(tmp_path / "child.log") == "hello\n"


def test_a_grandchild_in_a_session_of_its_own_is_ended_too(tmp_path: Path) -> None:
    child = start(f"import subprocess; subprocess.Popen({SLEEPER!r}, start_new_session=True)", tmp_path)
    assert child.wait(timeout=60) == 0
    until_up(tmp_path)
    assert end_leftovers(tmp_path) == 1
    assert end_leftovers(tmp_path) == 0


def test_a_process_of_another_job_is_left_alone(tmp_path: Path) -> None:
    environment = {**os.environ, MARK: f"{tmp_path}-2"}
    other = subprocess.Popen(SLEEPER, env=environment, stdout=subprocess.PIPE)
    assert end_leftovers(tmp_path) == 0
    assert other.poll() is None
    other.kill()
    other.communicate()


def test_a_halt_asks_first_and_kills_after_the_grace(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
    child = start(deaf, tmp_path)
    until_up(tmp_path)
    began = time.monotonic()
    assert watch_child(child, lambda: "stop", QUICK, tmp_path) == End(-signal.SIGKILL, "stop")
    assert time.monotonic() - began >= QUICK.grace


def test_a_look_around_that_fails_leaves_no_child(tmp_path: Path) -> None:
    child = start("import time; time.sleep(60)", tmp_path)
    with pytest.raises(ZeroDivisionError):
        watch_child(child, lambda: 1 // 0, QUICK, tmp_path)  # type: ignore[arg-type,return-value]
    assert child.poll() == -signal.SIGKILL


def test_a_child_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from scripts.container.supervisor import start_child\n"
        f"child = start_child({SLEEPER!r}, dict(os.environ), Path('{tmp_path}/child.log'), Path('{tmp_path}'))\n"
        "print(child.pid, flush=True); sys.stdin.read()"
    )
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    give_up = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").exists() and ") Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_a_log_that_cannot_be_opened_does_not_keep_the_child_from_running(tmp_path: Path) -> None:
    child = start_child([sys.executable, "-c", "print(1)"], dict(os.environ), tmp_path / "no" / "log", tmp_path)
    assert watch_child(child, lambda: None, QUICK, tmp_path) == End(0, None)


def status(stage: Stage, step: int, attempt: int = 1) -> Status:
    return Status(job_id="job", stage=stage, attempt=attempt, updated_at=0.0, step=step)


def test_a_slow_trainer_is_given_ten_times_its_slowest_step() -> None:
    patience = Patience(1, floor=10.0, loading=0.0, now=0.0)
    for step, now in ((0, 0.0), (1, 5.0), (2, 8.0), (3, 11.0)):
        assert not patience.exhausted(status("training", step), now)
    assert not patience.exhausted(status("training", 3), 11.0 + 30.0)
    assert patience.exhausted(status("training", 3), 11.0 + 30.1)


def test_a_heartbeat_without_a_step_is_standing_still() -> None:
    patience = Patience(1, floor=10.0, loading=0.0, now=0.0)
    beats = [status("training", 0).model_copy(update={"updated_at": now}) for now in (0.0, 5.0, 10.1)]
    assert [patience.exhausted(beat, beat.updated_at) for beat in beats] == [False, False, True]


def test_loading_a_large_model_may_take_longer_than_a_step() -> None:
    patience = Patience(1, floor=10.0, loading=100.0, now=0.0)
    assert not patience.exhausted(status("loading", 0), 109.0)
    assert patience.exhausted(status("loading", 0), 219.1)


def test_the_status_of_an_earlier_attempt_is_no_movement() -> None:
    patience = Patience(2, floor=10.0, loading=0.0, now=0.0)
    assert not patience.exhausted(status("training", 40, attempt=1), 9.0)
    assert patience.exhausted(status("training", 41, attempt=1), 10.1)
