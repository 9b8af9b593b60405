"""The client's own row: whole numbers on the way, one UPDATE at the end, and nothing ever after it."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import httpx
import pytest

from recipes.job import Stage
from scripts.ears import Ears, End, end_row
from scripts.errors import ProviderError
from scripts.job_folder import read_job
from scripts.store import Store
from scripts.supabase import ENDED, SupabaseRows, pack, progress_values
from tests.money.conftest import Place
from tests.money.jobs import HOUR, T0, Life
from tests.money.local_http import INTEGERS, Supabase, listening

REPOSITORY = Path(__file__).resolve().parents[2]
Project = tuple[Supabase, SupabaseRows]


@pytest.mark.parametrize(
    ("stage", "step", "status", "percent"),
    [
        ("fetching", 0, "initializing", 5),
        ("loading", 0, "initializing", 15),
        ("evaluating", 0, "running", 20),
        ("training", 0, "running", 25),
        ("training", 20, "running", 60),
        ("training", 40, "running", 95),
        ("saving", 40, "running", 95),
        ("storing", 40, "running", 97),
    ],
)
def test_progress_is_what_the_application_shows(
    store: Store, stage: Stage, step: int, status: str, percent: int
) -> None:
    Life(store, "job-1").submitted(T0).runs(T0 + 9, since=T0, stage=stage, step=step)
    values = progress_values(read_job(store, "job-1"))
    assert (values["status"], values["progress"]) == (status, percent)
    assert all(type(values[name]) is int for name in INTEGERS & set(values))
    assert values["started_at"] == "2026-09-21T14:13:20.000+00:00"


def test_a_job_without_a_word_from_its_machine_writes_nothing(place: Place, supabase: Project) -> None:
    project, rows = supabase
    project.add("job-1")
    place.launch()
    assert place.tick(Ears(rows=rows)).done == []
    assert project.updates == []


def test_the_same_progress_is_not_written_twice(place: Place, supabase: Project) -> None:
    project, rows = supabase
    project.add("job-1")
    life = place.launch().runs(T0 + 10, since=T0, step=10)
    place.rest(10)
    for _ in range(3):
        place.tick(Ears(rows=rows))
    assert len(project.updates) == 1
    life.runs(T0 + 20, since=T0, step=11)
    place.rest(10)
    place.tick(Ears(rows=rows))
    assert [u["current_step"] for u in project.updates] == [10, 11]


@pytest.mark.parametrize("status", ENDED)
def test_late_progress_wakes_no_row_that_has_ended(store: Store, supabase: Project, status: str) -> None:
    project, rows = supabase
    project.add("job-1", status)
    Life(store, "job-1").submitted(T0).runs(T0 + 9, since=T0)
    values = progress_values(read_job(store, "job-1"))
    assert rows.update("job-1", values, ENDED) is False
    assert project.updates == []


def test_a_cancel_between_the_look_and_the_update_wins(place: Place, supabase: Project) -> None:
    project, rows = supabase
    project.add("job-1")
    place.launch().runs(T0 + 9, since=T0)
    place.rest(9)

    class Between(SupabaseRows):
        def read(self, row_id: str) -> dict[str, object] | None:
            row = super().read(row_id)
            project.rows[row_id]["status"] = "cancelled"
            return row

    place.tick(Ears(rows=Between(rows.url, rows.key, rows.table, rows.http)))
    assert project.rows["job-1"]["status"] == "cancelled"
    assert project.updates == []


def test_the_end_is_one_update_after_the_adapter_is_in_storage(place: Place, supabase: Project) -> None:
    project, rows = supabase
    project.add("job-1")
    place.launch().completed(T0 + 1800, since=T0)
    place.rest(1800)
    place.vanish()
    place.tick(Ears(rows=rows))
    assert len(project.updates) == len(project.fired) == 1
    update = project.updates[0]
    assert update == {
        "status": "completed",
        "progress": 100,
        "adapter_file_path": "lora-models/adapters/job-1.tar.gz",
        "current_step": 40,
        "total_steps": 40,
        "final_loss": 1.25,
        "training_time_seconds": 1800,
        "actual_cost": 1.445,
        "completed_at": "2026-09-21T14:43:20.000+00:00",
        "updated_at": "2026-09-21T14:43:20.000+00:00",
    }
    assert list(project.objects) == [update["adapter_file_path"]]
    with tarfile.open(fileobj=io.BytesIO(project.objects[update["adapter_file_path"]])) as archive:
        names = [f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "manifest.json")]
        assert archive.getnames() == names


@pytest.mark.parametrize("good", [0, 1, 2], ids=["the look", "the upload", "the update"])
def test_a_request_that_failed_is_tried_again_and_the_row_is_updated_once(
    place: Place, supabase: Project, good: int
) -> None:
    project, rows = supabase
    project.add("job-1")
    place.launch().completed(T0, since=T0)
    place.vanish()
    project.fail_after(good)
    assert "try 1 failed: Supabase" in place.tick(Ears(rows=rows)).done[0]
    assert project.fired == []
    place.rest(HOUR)
    assert place.tick(Ears(rows=rows)).done == ["job-1: supabase-completed: told at try 2"]
    assert len(project.fired) == 1


def test_an_update_whose_answer_was_lost_is_not_made_twice(place: Place, supabase: Project) -> None:
    project, rows = supabase
    project.add("job-1")
    place.launch().completed(T0, since=T0)
    place.vanish()

    class Deaf(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            response = super().handle_request(request)
            if request.method == "PATCH":
                raise httpx.ReadTimeout("lost")
            return response

    deaf = SupabaseRows(rows.url, rows.key, rows.table, httpx.Client(transport=Deaf()))
    said = place.tick(Ears(rows=deaf)).done
    assert said == [
        "job-1: supabase-completed: try 1 failed: "
        "Supabase table pipeline_training_jobs: no answer (ReadTimeout); it is asked again later"
    ]
    place.rest(HOUR)
    assert place.tick(Ears(rows=rows)).done == ["job-1: supabase-completed: told at try 2"]
    assert len(project.fired) == 1


def test_a_process_that_was_overtaken_after_its_look_leaves_the_row_alone(place: Place, supabase: Project) -> None:
    project, rows = supabase
    project.add("job-1")
    place.launch().completed(T0, since=T0)
    end = End(read_job(place.store, "job-1"), "job-1", "completed", "", None)
    overtaking = [True]

    class Slow(SupabaseRows):
        def upload(self, path: Path, name: str) -> None:
            super().upload(path, name)
            if overtaking.pop():
                end_row(rows, place.store, end, T0)

    end_row(Slow(rows.url, rows.key, rows.table, rows.http), place.store, end, T0)
    assert overtaking == []
    assert len(project.updates) == len(project.fired) == 1


def test_a_failure_is_told_with_its_sentence(place: Place, supabase: Project) -> None:
    project, rows = supabase
    project.add("job-1", "running")
    place.launch().failed(T0 + 60, since=T0, sentence="a GPU ran out of memory; lower data.max_tokens")
    place.vanish()
    place.tick(Ears(rows=rows))
    row = project.rows["job-1"]
    assert (row["status"], row["error_message"]) == ("failed", "a GPU ran out of memory; lower data.max_tokens")
    assert project.fired == []


def test_a_cancel_at_our_door_reaches_a_row_that_still_waits(place: Place, supabase: Project) -> None:
    project, rows = supabase
    project.add("job-1", "running")
    place.launch().stopped(T0)
    place.vanish()
    place.tick(Ears(rows=rows))
    assert project.rows["job-1"]["status"] == "cancelled"
    assert project.rows["job-1"]["error_message"] is None


def test_a_retried_job_completes_the_row_that_its_failure_had_ended(place: Place, supabase: Project) -> None:
    project, rows = supabase
    project.add("job-1", "failed", error_message="the machine is gone")
    place.launch().completed(T0, since=T0)
    place.vanish()
    place.tick(Ears(rows=rows))
    assert project.rows["job-1"]["status"] == "completed"
    assert len(project.fired) == 1


def test_a_job_without_a_row_is_no_trouble(place: Place, supabase: Project) -> None:
    project, rows = supabase
    place.launch().completed(T0, since=T0)
    place.vanish()
    report = place.tick(Ears(rows=rows))
    assert report.done == ["job-1: supabase-completed: told at try 1"]
    assert (report.troubles, project.objects) == ([], {})


@pytest.mark.parametrize(
    ("url", "key", "table", "sentence"),
    [
        ("", "wrong", "pipeline_training_jobs", "status 401 'Invalid API key'; the service key of this project"),
        ("", "", "jobs", "status 404 'Could not find the table /rest/v1/jobs'"),
        ("http://127.0.0.1:9", "", "pipeline_training_jobs", r"no answer \(ConnectError\)"),
    ],
)
def test_what_is_wrong_is_one_sentence_without_the_key(
    supabase: Project, url: str, key: str, table: str, sentence: str
) -> None:
    _, good = supabase
    rows = SupabaseRows(url or good.url, key or good.key, table, good.http)
    with pytest.raises(ProviderError, match=sentence) as caught:
        rows.read("job-1")
    assert rows.key not in str(caught.value)
    assert rows.key not in repr(rows)


def test_the_same_adapter_is_packed_into_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "b.json").write_bytes(b"{}")
    (tmp_path / "adapter" / "a.json").write_bytes(b"[]")
    pack(tmp_path / "adapter", tmp_path / "one.tar.gz")
    (tmp_path / "adapter" / "a.json").touch()
    pack(tmp_path / "adapter", tmp_path / "other.tar.gz")
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "other.tar.gz").read_bytes()
    assert b"[]" in gzip.decompress((tmp_path / "one.tar.gz").read_bytes())


def test_racing_processes_send_the_completing_update_once(store: Store) -> None:
    project = Supabase()
    project.add("job-1", "running")
    Life(store, "job-1").submitted(T0).completed(T0 + 60, since=T0)
    # One try each: they race at the claim of a try, and where a claim was cut short, at the row itself.
    with listening(project.answer) as url:
        command = [sys.executable, "-m", "tests.money.ticking", store.url, url]
        racing = [
            subprocess.Popen([*command, str(now), "supabase"], cwd=REPOSITORY) for now in (T0 + 100, T0 + 1e4, T0 + 1e5)
        ]
        assert [process.wait(60) for process in racing] == [0] * 3
    assert len(project.fired) == 1
    assert len(project.updates) == 1
