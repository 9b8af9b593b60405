"""What is due for a job, from its launch to its bill, on a local Runpod whose clock stands still."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.load import load_recipe
from scripts.backends.base import Backend
from scripts.ears import Ears
from scripts.errors import ProviderError
from scripts.fake_runpod.server import Fault
from scripts.gateway.records import Request, Understood
from scripts.job_folder import open_jobs
from scripts.launch import UNASKED_SECONDS
from scripts.supabase import SupabaseRows
from scripts.tick import LOST_SECONDS, RELAUNCH_SECONDS, Hands, Room, tick
from scripts.webhook import Webhook
from tests.money.conftest import Place
from tests.money.jobs import HOUR, T0, Life, spec_of
from tests.money.local_http import Receiver, Supabase


def test_a_completed_job_is_told_settled_and_never_looked_at_again(
    place: Place, receiver: tuple[Receiver, Webhook], supabase: tuple[Supabase, SupabaseRows]
) -> None:
    (taken, webhook), (project, rows) = receiver, supabase
    project.add("job-1")
    ears = Ears(webhook, rows)
    life = place.launch()
    place.rest(600)
    life.runs(T0 + 600, since=T0)
    assert place.tick(ears).done == ["job-1: told the row its progress"]
    place.rest(1200)
    life.completed(T0 + 1800, since=T0)
    place.vanish()
    assert place.tick(ears).done == [
        "job-1: webhook-completed: told at try 1",
        "job-1: supabase-completed: told at try 1",
    ]
    assert place.tick(ears).done == []
    place.rest(3 * HOUR)
    assert place.tick(ears).done == ["job-1: settled at $1.45 (bill)"]
    assert open_jobs(place.store) == []
    assert place.tick(ears).looked_at == 0
    assert len(taken.got) == 1
    assert len(project.fired) == 1


def test_a_job_past_its_deadline_is_stopped_and_its_pod_is_gone(place: Place) -> None:
    life = place.launch()
    life.runs(T0, since=T0)
    place.rest(3600)
    life.runs(T0 + 3600, since=T0)
    assert place.tick().done == []
    place.rest(100)
    life.runs(T0 + 3700, since=T0)
    assert place.tick().done == ["job-1: stopped (deadline): it ran for 1.03 h; the limit is 1.00 h"]
    assert place.pods() == []


def test_a_job_over_its_cap_is_stopped_though_its_machine_never_said_a_word(place: Place) -> None:
    place.launch(cap_usd=0.5)
    place.rest(700)
    done = place.tick().done
    assert done[0].startswith("job-1: stopped (cap): it cost $0.56; the cap is $0.50")
    assert place.pods() == []


def test_a_cancel_that_only_the_database_knows_ends_the_pod(
    place: Place, supabase: tuple[Supabase, SupabaseRows]
) -> None:
    project, rows = supabase
    project.add("job-1", "running")
    life = place.launch().runs(T0 + 60, since=T0)
    place.rest(60)
    project.rows["job-1"]["status"] = "cancelled"
    assert place.tick(Ears(rows=rows)).done == ["job-1: stopped (user): the client's database says cancelled"]
    assert place.pods() == []
    place.rest(600)
    place.tick(Ears(rows=rows))
    assert project.rows["job-1"]["status"] == "cancelled"
    assert project.updates == []
    assert life.record("stop.json") is not None


def test_a_dead_database_keeps_no_machine_alive(place: Place, supabase: tuple[Supabase, SupabaseRows]) -> None:
    project, rows = supabase
    place.launch(cap_usd=0.5)
    place.rest(700)
    project.fail_after(0)
    assert "stopped (cap)" in place.tick(Ears(rows=rows)).done[0]
    assert place.pods() == []


def test_a_stop_that_did_not_reach_its_machine_is_carried_out_later(place: Place) -> None:
    life = place.launch().runs(T0 + 10, since=T0)
    place.rest(10)
    place.local.faults.append(Fault("DELETE", "/pods/", 500, times=5))
    life.stopped(T0 + 10)
    place.rest(200)
    assert place.tick().troubles[0].startswith("job-1: Runpod: DELETE")
    assert place.pods() == ["lorry-job-1"]
    done = place.tick().done
    assert done[0].startswith("job-1: ended its machine: its job was stopped")
    assert place.pods() == []


def test_a_machine_that_could_not_end_itself_is_ended(place: Place) -> None:
    life = place.launch()
    life.failed(T0 + 300, since=T0)
    place.rest(590)
    place.tick()
    assert place.pods() == ["lorry-job-1"]  # it may still bring its logs home
    place.rest(30)
    said = "job-1: ended its machine: its job ended, and its machine has said nothing for 5 minutes"
    assert said in place.tick().done
    assert place.pods() == []


def test_a_machine_that_is_started_again_and_again_after_its_job_is_ended(place: Place) -> None:
    life = place.launch()
    for seconds in range(300, 1800, 200):
        place.rest(200)
        life.failed(T0 + 300, since=T0, said_at=T0 + seconds)
        place.tick()
    assert place.pods() == []


def test_a_lost_machine_is_the_end_only_after_a_while(place: Place, receiver: tuple[Receiver, Webhook]) -> None:
    taken, webhook = receiver
    place.launch().runs(T0 + 60, since=T0)
    place.rest(60)
    place.vanish()
    place.rest(LOST_SECONDS - 1)
    assert place.tick(Ears(webhook)).done == []
    place.rest(2)
    assert place.tick(Ears(webhook)).done == ["job-1: webhook-failed: told at try 1"]
    assert json.loads(taken.got[0][1])["error"].startswith("the machine is gone at step 10 of 40")


def test_a_lost_job_that_is_launched_again_is_watched_and_completes(
    place: Place, receiver: tuple[Receiver, Webhook]
) -> None:
    taken, webhook = receiver
    life = place.launch().runs(T0 + 60, since=T0)
    place.vanish()
    place.rest(3 * HOUR)
    place.tick(Ears(webhook))
    place.launch()
    now = place.clock.now()
    life.completed(now, since=T0)
    place.vanish()
    place.tick(Ears(webhook))
    assert [json.loads(body)["status"] for _, body in taken.got] == ["FAILED", "COMPLETED"]


def test_a_job_without_a_machine_is_launched_again_and_given_up_in_the_end(place: Place) -> None:
    for stock in place.local.account.catalog.stock.values():
        stock.clear()
    life = Life(place.store, "job-1").submitted(T0)
    place.rest(RELAUNCH_SECONDS - 1)
    assert place.tick().troubles == []
    place.rest(2)
    troubles = place.tick().troubles
    assert len(troubles) == 1
    assert "no stock" in troubles[0]
    place.rest(UNASKED_SECONDS)
    assert "job-1: stopped (operator): no machine could be had for 2.1 hours" in place.tick().done
    assert place.tick().done == ["job-1: settled at $0.00 (hours)"]
    assert life.record("stop.json") is not None


def test_a_launch_that_was_cut_short_gets_its_one_pod(place: Place) -> None:
    Life(place.store, "job-1").submitted(T0)
    place.rest(RELAUNCH_SECONDS + 1)
    assert place.tick().done == ["job-1: launched again"]
    assert place.pods() == ["lorry-job-1"]
    place.rest(60)
    place.tick()
    assert place.pods() == ["lorry-job-1"]


def test_the_row_and_the_message_are_under_the_clients_own_id(
    place: Place, receiver: tuple[Receiver, Webhook], supabase: tuple[Supabase, SupabaseRows]
) -> None:
    (taken, webhook), (project, rows) = receiver, supabase
    project.add("Job_7")
    understood = Understood(
        recipe="smoke/zero3", base_model="lorry/smoke", epochs=1, learning_rate=1e-4, batch_size=4, rank=16, alpha=32
    )
    request = Request(
        client="acme", job_id="job-1", client_job_id="Job_7", body_sha256="", received_at=T0, understood=understood
    )
    place.store.write("job-1/request.json", request.model_dump_json().encode())
    place.launch().completed(T0 + 60, since=T0)
    place.vanish()
    place.tick(Ears(webhook, rows))
    assert json.loads(taken.got[0][1])["id"] == "Job_7"
    assert project.rows["Job_7"]["adapter_file_path"] == "lora-models/adapters/Job_7.tar.gz"


def test_one_job_in_trouble_keeps_no_other_from_its_due(place: Place) -> None:
    place.launch("job-1", cap_usd=0.5)
    place.launch("job-2", cap_usd=0.5)
    place.store.write("job-1/submission.json", b"{")
    place.rest(700)
    report = place.tick()
    assert [line for line in report.done if line.startswith("job-2: stopped (cap)")]
    assert report.looked_at == 2


def test_a_provider_that_does_not_answer_keeps_no_job_of_another_from_its_due(place: Place) -> None:
    for name in ("job-1", "job-2", "job-3"):
        place.launch(name, cap_usd=0.5)
    for name in ("job-1", "job-3"):
        spec = spec_of(name, place.store, cap_usd=0.5, backend="ec2")
        place.store.write(f"{name}/launch.json", spec.model_dump_json().encode())
    place.rest(700)

    def backend(name: str) -> Backend:
        if name == "ec2":
            raise ProviderError("AWS EC2: no answer")
        return place.backend

    report = tick([Room(place.store)], Hands(backend, place.hands.bill, place.clock.now))
    assert [line[:20] for line in report.done] == ["job-2: stopped (cap)"]
    assert {line.partition(":")[0] for line in report.troubles} == {"job-1", "job-3"}


def test_one_call_looks_at_no_more_than_it_may_and_the_next_ones_at_the_rest(place: Place) -> None:
    for number in range(7):
        Life(place.store, f"job-{number}").submitted(T0).stopped(T0)
    settled = set()
    for _ in range(30):
        before = len(open_jobs(place.store))
        report = tick([Room(place.store)], place.hands, most=3)
        assert report.looked_at == min(3, before)
        settled |= {line.partition(":")[0] for line in report.done}
        place.rest(300)
    assert settled == {f"job-{number}" for number in range(7)}


def test_a_folder_that_is_no_job_is_passed_over(place: Place) -> None:
    place.store.write("clients/acme/jobs/job-1/launch.json", b"{}")
    assert place.tick().looked_at == 0


@pytest.mark.parametrize("missing", ["launch.json", "submission.json"])
def test_half_a_job_folder_is_no_trouble(place: Place, missing: str) -> None:
    spec = spec_of("job-1", place.store)
    if missing != "launch.json":
        place.store.write("job-1/launch.json", spec.model_dump_json().encode())
    report = place.tick()
    assert report.troubles == []


def test_a_training_set_that_shall_not_be_kept_is_erased_when_the_adapter_is_whole_and_the_machine_gone(
    place: Place,
) -> None:
    smoke = load_recipe("smoke/zero3").recipe
    data = smoke.data.model_copy(update={"after_training": "delete"})
    recipe, hashes = smoke.model_copy(update={"data": data}), {"train_sha256": "a" * 64, "valid_sha256": "b" * 64}
    life = place.launch(recipe=recipe, **hashes)
    place.rest(1200)
    life.completed(T0 + 1200, since=T0)
    assert place.tick().done == []
    place.vanish()
    adapter = place.store.read("job-1/adapter/adapter_model.safetensors")
    assert adapter
    (Path(place.store.url.removeprefix("file://")) / "job-1/adapter/adapter_model.safetensors").unlink()
    place.rest(3 * HOUR)
    report = place.tick()
    assert "adapter_model.safetensors: it is not in the store; the training set is kept until it is" in str(report)
    assert place.store.read("job-1/data/train.jsonl")
    assert open_jobs(place.store) == ["job-1"], "it is not settled before that"
    place.store.write("job-1/adapter/adapter_model.safetensors", adapter)
    assert place.tick().done == ["job-1: erased its training set, 2 objects", "job-1: settled at $0.96 (bill)"]
    assert place.store.keys("job-1/data") == ["job-1/data/report.json"]
    erased = life.record("data_erased.json") or {}
    assert {name: erased[name] for name in hashes} == hashes
    assert open_jobs(place.store) == []
