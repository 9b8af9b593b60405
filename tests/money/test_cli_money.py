"""The commands tick, reap and cost, and whose jobs they see."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.cli.money import COMMANDS
from scripts.errors import InputError, NotFound, ProviderError
from scripts.fake_runpod.clock import Clock
from scripts.fake_runpod.server import Fault
from scripts.gateway.clients import load_clients
from scripts.rooms import client_store, is_within, open_rooms, tick_of_door
from scripts.settings import Settings
from scripts.store import open_store
from tests.money.conftest import Place
from tests.money.jobs import HOUR

CLIENTS = """
acme:
  key_sha256: [{key}]
  recipe: smoke/zero3
  webhook: {{url: "https://acme.example/hook", secret_env: ACME_WEBHOOK_SECRET}}
  supabase: {{url: "https://acme.supabase.example", key_env: ACME_SUPABASE_KEY}}
quiet:
  key_sha256: [{other}]
  recipe: smoke/zero3
"""


@pytest.fixture
def clock() -> Clock:
    """The commands read the clock of this machine."""
    return Clock(frozen_at=time.time())


@pytest.fixture
def run(place: Place, monkeypatch: pytest.MonkeyPatch) -> Any:
    """run("reap", "--yes"): the command in this process, on the place's account and store."""
    monkeypatch.delenv("LORRY_CLIENTS", raising=False)
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)

    def command(name: str, *words: str) -> int:
        known = next(command for command in COMMANDS if command.name == name)
        parser = argparse.ArgumentParser()
        known.arguments(parser)
        return known.run(parser.parse_args(words), Settings(place.store.url, Path(), ()))

    return command


def overdue_by_minutes(place: Place) -> None:
    """A job in a Pod whose deadline is past by this machine's clock."""
    place.rest(-1.2 * HOUR)
    place.launch()
    place.rest(1.2 * HOUR)


def test_reap_ends_nothing_unless_it_is_told_to(place: Place, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    overdue_by_minutes(place)
    assert run("reap") == 0
    said = capsys.readouterr().out
    assert said.startswith("would end  lorry-job-1: its deadline passed 12 minutes ago; $2,109.70 a month\n")
    assert said.endswith("nothing was ended; `lorry reap --yes` ends it\n")
    assert place.pods() == ["lorry-job-1"]
    assert run("reap", "--yes") == 0
    assert capsys.readouterr().out.startswith("ended      lorry-job-1: its deadline passed")
    assert place.pods() == []
    assert json.loads(place.store.read("job-1/stop.json") or b"{}")["by"] == "reaper"


def test_reap_fails_when_a_machine_could_not_be_ended(
    place: Place, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    overdue_by_minutes(place)
    place.local.faults.append(Fault("DELETE", "/pods/", 422, times=2))
    with pytest.raises(ProviderError, match="lorry-job-1: Runpod: DELETE"):
        run("reap", "--yes", "--json")
    said = json.loads(capsys.readouterr().out)
    assert said["acted"] is True
    assert list(said["troubles"]) == ["lorry-job-1"]


def test_a_report_that_fails_keeps_no_machine_alive(place: Place, run: Any) -> None:
    overdue_by_minutes(place)
    place.local.faults.append(Fault("GET", "/network-volumes", 403))
    with pytest.raises(ProviderError, match="runpod_pod report: Runpod: GET"):
        run("reap", "--yes")
    assert place.pods() == []


def test_reap_leaves_another_lorrys_pods_alone(place: Place, run: Any, tmp_path: Path) -> None:
    overdue_by_minutes(place)
    place.store.url = f"{place.store.url}-other"
    assert run("reap", "--yes") == 0
    assert place.pods() == ["lorry-job-1"]


def test_tick_stops_what_is_overdue_and_says_so(place: Place, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    overdue_by_minutes(place)
    assert run("tick") == 0
    said = capsys.readouterr().out
    assert "job-1: stopped (deadline)" in said
    assert said.endswith("looked at 1 open jobs\n")
    assert place.pods() == []


def test_cost_shows_the_quote_against_the_bill(place: Place, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    place.rest(-10 * HOUR)
    began = place.clock.now()
    life = place.launch()
    place.rest(HOUR / 2)
    life.completed(place.clock.now(), since=began)
    place.vanish()
    place.rest(9.5 * HOUR)
    assert run("cost", "job-1") == 0
    assert capsys.readouterr().out.split("\n")[:3] == [
        "quoted         at most $1.50",
        "cap            $2.89",
        "billed         $1.45",
    ]
    assert run("cost", "job-1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["settlement"]["is_final"] is True
    assert run("cost", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {place.store.url: pytest.approx(1.445)}


def test_cost_of_a_job_that_goes_on_is_what_it_cost_so_far(
    place: Place, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    place.rest(-HOUR / 2)
    place.launch()
    place.rest(HOUR / 2)
    assert run("cost", "job-1") == 0
    assert "so far         $1.45" in capsys.readouterr().out
    assert place.store.read("job-1/settlement.json") is None
    with pytest.raises(NotFound, match="job job-9: no such job"):
        run("cost", "job-9")


@pytest.fixture
def clients(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "clients.yaml"
    keys = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("key", "other")}
    path.write_text(CLIENTS.format(**keys))
    return {"LORRY_CLIENTS": str(path), "ACME_WEBHOOK_SECRET": "s1-secret", "ACME_SUPABASE_KEY": "k1-secret"}


def test_there_is_a_room_for_the_terminal_and_one_per_client(clients: dict[str, str], tmp_path: Path) -> None:
    root = (tmp_path / "store").as_uri()
    terminal, acme, quiet = open_rooms(clients, root)
    assert terminal.store.url == root
    assert acme.store.url == f"{root}/clients/acme/jobs"
    assert acme.ears.webhook is not None
    assert acme.ears.rows is not None
    assert acme.ears.rows.table == "pipeline_training_jobs"
    assert (quiet.ears.webhook, quiet.ears.rows) == (None, None)
    assert "secret" not in repr(acme)


def test_the_front_door_ticks_one_job_of_one_client(
    place: Place, run: Any, clients: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    overdue_by_minutes(place)
    root = place.store.url
    place.store = open_store(client_store(root, "quiet"))
    place.rest(-2 * HOUR)
    place.launch("job-2")
    place.rest(2 * HOUR)
    known = load_clients(Path(clients["LORRY_CLIENTS"]))
    tick_one = tick_of_door({**place.environment, **clients}, root)
    tick_one(known["acme"], "job-2")
    assert place.pods() == ["lorry-job-1", "lorry-job-2"]
    tick_one(known["quiet"], "job-2")
    assert place.pods() == ["lorry-job-1"]
    assert caplog.messages == []
    place.local.faults.append(Fault("GET", "/v2/", 422, times=9))
    tick_one(known["quiet"], "job-2")
    assert caplog.messages[0].startswith("job-2: Runpod: GET /pods/")


def test_a_secret_that_is_not_set_is_named(clients: dict[str, str], tmp_path: Path) -> None:
    del clients["ACME_WEBHOOK_SECRET"]
    with pytest.raises(InputError, match="ACME_WEBHOOK_SECRET: not set, but client acme needs it"):
        open_rooms(clients, tmp_path.as_uri())


@pytest.mark.parametrize(
    ("store", "ours"),
    [
        ("s3://b/p", True),
        ("s3://b/p/clients/acme/jobs", True),
        ("s3://b/p/clients/acme/files", False),
        ("s3://b/p/clients/acme/jobs/more", False),
        ("s3://b/p/clients/../jobs", False),
        ("s3://b/p2", False),
        ("s3://b/pXclients/acme/jobs", False),
        ("", False),
    ],
)
def test_only_the_root_and_its_clients_are_ours(store: str, ours: bool) -> None:
    assert is_within("s3://b/p", store) is ours
    assert is_within("s3://b/p/", store) is ours
    assert client_store("s3://b/p/", "acme") == "s3://b/p/clients/acme/jobs"
