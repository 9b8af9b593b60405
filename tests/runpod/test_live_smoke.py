"""`make live-smoke` led to a local Runpod: it asks before it spends, and ends its Pod whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.backends.runpod_api import RunpodApi
from scripts.cost import Settlement
from scripts.errors import InputError
from scripts.fake_runpod.host import Host, Mishap
from scripts.fake_runpod.processes import ProcessRunner
from scripts.fake_runpod.server import LocalRunpod, serve
from scripts.fake_runpod.store import serve_store
from scripts.live_smoke import MOST_USD, SWITCH
from scripts.runpod_questions import Seen, answers
from scripts.surprises import HEADING, Surprise, add_surprises
from tests.runpod.conftest import IMAGE, KEY, OPENAPI, REPOSITORY

PAGE = REPOSITORY / "docs" / "surprises.md"
LIMIT_SECONDS = 500.0
SECRETS = {"store_id": "CANARYACCESSKEY", "store_key": "CANARY-secret-access-key"}


@pytest.fixture
def runpod(tmp_path: Path) -> Iterator[LocalRunpod]:
    """A local Runpod whose Pods run the container itself."""
    with serve(KEY, OPENAPI, host=Host(tmp_path / "host", ProcessRunner())) as local:
        with RunpodApi(KEY, local.url) as api:
            for name, value in SECRETS.items():
                api.create("account/secrets", {"name": name, "value": value}, secret=True)
        yield local
        assert local.drift == []


@pytest.fixture
def environment(runpod: LocalRunpod, tmp_path: Path) -> Iterator[dict[str, str]]:
    """What a person sets, led to the local Runpod."""
    with serve_store("bucket") as url:
        yield {
            "PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY),
            "RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": runpod.url, "LORRY_IMAGE": IMAGE,
            "LORRY_STORE": "s3://bucket/jobs", "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1",
            "LORRY_POD_SECRETS": "AWS_ACCESS_KEY_ID=store_id,AWS_SECRET_ACCESS_KEY=store_key",
            "AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": "mine", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A copy of the page of surprises."""
    copy = tmp_path / "surprises.md"
    copy.write_text(PAGE.read_text())
    return copy


def smoke(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.live_smoke", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)


def pods(runpod: LocalRunpod) -> list[str]:
    with runpod.lock:
        return [str(pod["name"]) for pod in runpod.account.held["pods"].values()]


def creates(runpod: LocalRunpod) -> int:
    return sum(entry[:2] == ("POST", "/v2/pods") for entry in runpod.log)


def test_without_a_key_it_says_all_that_is_missing(tmp_path: Path) -> None:
    done = smoke({"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 2
    assert [name in done.stderr for name in ("RUNPOD_API_KEY", "LORRY_IMAGE", "LORRY_STORE")] == [True] * 3
    assert "Traceback" not in done.stderr


def test_without_a_yes_it_shows_the_quote_and_rents_nothing(environment: dict[str, str], runpod: LocalRunpod) -> None:
    for answer in ({}, {SWITCH: "no"}):
        done = smoke(environment | answer)
        assert done.returncode == 3, done.stderr
        assert "quote " in done.stdout
        assert f"{SWITCH}=yes" in done.stderr
    assert creates(runpod) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_trains_ends_its_pod_settles_the_bill_and_writes_down_what_it_saw(
    environment: dict[str, str], runpod: LocalRunpod, page: Path
) -> None:
    runpod.log.clear()
    done = smoke(environment | {SWITCH: "yes"}, "--page", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (creates(runpod), pods(runpod)) == (1, [])
    assert "by bill" in done.stdout
    rows = page.read_text().removeprefix(PAGE.read_text()).splitlines()
    assert any("May a Pod end itself" in row and "yes" in row for row in rows)
    assert all(row.count("|") == 5 and row.endswith("| a local Runpod |") for row in rows)
    said = done.stdout + done.stderr + page.read_text()
    assert not any(secret in said for secret in (KEY, *SECRETS.values()))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_ends_the_pod_first(environment: dict[str, str], runpod: LocalRunpod) -> None:
    command = [sys.executable, "-m", "scripts.live_smoke"]
    running = subprocess.Popen(command, env=environment | {SWITCH: "yes"}, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("pod "):
            break
    assert len(pods(runpod)) == 1
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=LIMIT_SECONDS)
    assert running.returncode == 130
    assert pods(runpod) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pod_that_cannot_be_used_is_ended_and_said(environment: dict[str, str], runpod: LocalRunpod) -> None:
    assert runpod.host is not None
    runpod.host.mishaps.append(Mishap("error"))
    done = smoke(environment | {SWITCH: "yes"}, "--bill-minutes", "0")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert pods(runpod) == []


def test_the_recipe_cannot_cost_more_than_its_cap(environment: dict[str, str]) -> None:
    said = smoke(environment).stdout
    cap = float(said.partition("ended at $")[2].split()[0])
    assert 0 < cap <= MOST_USD


def test_answers_are_what_was_seen() -> None:
    seen = Seen(False, {"NVIDIA L40S": (0.99, 0.79), "NVIDIA A40": (0.4, 0.3)}, False, "NVIDIA A40", 0.5, 100.0, 160.0)
    seen.last_words = ["ts container: this Pod could not end itself: status 403"]
    told = {one.asked: one.seen for one in answers(seen, None)}
    assert told["May a Pod end itself with the key it is given?"].startswith("no")
    assert "403" in told["May a Pod end itself with the key it is given?"]
    assert told["Does a Pod cost what the catalog says?"] == (
        "NVIDIA A40: $0.40 an hour in the catalog, $0.50 on the Pod"
    )
    assert told["What do GPUs cost whose price was not known?"] == "NVIDIA L40S Secure $0.99, Community $0.79"
    assert told["How long does a Pod take to start?"].startswith("60 s")
    bill = Settlement(
        job_id="job-1", quote_usd=0.5, cap_usd=0.6, usd=0.1, source="hours", submitted_at=0, ended_at=60,
        settled_at=660, is_final=False,
    )  # fmt: skip
    assert "not yet 10 min" in answers(seen, bill)[-1].seen


def test_rows_are_added_and_nothing_else_changes(page: Path, tmp_path: Path) -> None:
    before = page.read_text()
    add_surprises(page, [Surprise("what | is\n<b>this</b>?", "x")], "2026-12-01", "a test")
    add_surprises(page, [Surprise("and this?", "y")], "2026-12-02", "a test")
    added = page.read_text().removeprefix(before).splitlines()
    assert added == [
        "| 2026-12-01 | what / is (b>this(/b>? | x | a test |",
        "| 2026-12-02 | and this? | y | a test |",
    ]
    other = tmp_path / "other.md"
    other.write_text("# Another page\n")
    with pytest.raises(InputError, match=HEADING):
        add_surprises(other, [], "2026-12-01", "a test")
    assert other.read_text() == "# Another page\n"


def test_make_runs_this_script() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    assert "\nlive-smoke: " in makefile
    assert "\t$(BIN)/python -m scripts.live_smoke\n" in makefile
