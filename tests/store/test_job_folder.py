"""Job folders as a whole: records read leniently and side by side, folders carried with their marks last."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from recipes.job import Status, Stop
from scripts.errors import InputError, NotFound
from scripts.job_folder import download_folder, job_ids, read_job, read_jobs, upload_folder
from scripts.push import push
from scripts.store import FileStore, Store

STATUS = Status(job_id="job-1", stage="training", attempt=1, updated_at=1.0, step=3)
STOP = Stop(by="user", reason="enough", at=2.0)


def test_all_records_of_a_job_are_read(store: Store, job: Any) -> None:
    manifest = job.vouch()
    push(job.adapter, store, "job-1")
    for name, record in {"status": STATUS, "stop": STOP, "launch": job.spec, "result": job.result}.items():
        store.write(f"job-1/{name}.json", record.model_dump_json().encode())
    files = read_job(store, "job-1")
    assert (files.status, files.stop, files.launch, files.result) == (STATUS, STOP, job.spec, job.result)
    assert (files.manifest, files.proof, files.submission, files.container) == (manifest, None, None, None)
    assert files.broken == ()


def test_a_broken_file_does_not_break_the_table(store: Store) -> None:
    store.write("job-1/status.json", b'{"job_id": "job-1", "stage"')
    store.write("job-1/result.json", b"\xff\xfe\x00")
    store.write("job-1/proof.json", b'{"job_id": "job-1"}')
    store.write("job-1/stop.json", STOP.model_dump_json().encode())
    files = read_job(store, "job-1")
    assert (files.status, files.result, files.proof, files.stop) == (None, None, None, STOP)
    names = ["job-1/status.json: not a Status file", "job-1/result.json: not a Result", "job-1/proof.json: not a Proof"]
    assert [any(line.startswith(name) for line in files.broken) for name in names] == [True] * 3


def test_records_of_a_newer_version_are_read(store: Store) -> None:
    store.write("job-1/stop.json", STOP.model_dump_json().encode()[:-1] + b', "mood": "calm"}')
    assert read_job(store, "job-1").stop == STOP


def test_an_unknown_job_has_no_records_and_an_impossible_one_is_refused(store: Store) -> None:
    assert read_job(store, "job-9").launch is None
    for job_id in ("../job-1", "Job-1", "", "a--b"):
        with pytest.raises(InputError, match="a-z, 0-9 and single hyphens"):
            read_job(store, job_id)


def test_only_folders_that_can_be_jobs_are_jobs(store: Store) -> None:
    for folder in ("job-1", "job-2", "models_cache", "X"):
        store.write(f"{folder}/launch.json", b"{}")
    assert job_ids(store) == ["job-1", "job-2"]


def test_many_jobs_are_read_side_by_side(s3_store: Store, wire: Any) -> None:
    """40 jobs are 320 requests, and no request is answered before 16 of them are under way."""
    for number in range(40):
        s3_store.write(f"job-{number}/stop.json", STOP.model_dump_json().encode())
    ids = job_ids(s3_store)
    together = threading.Barrier(16)
    wire.hold = lambda request: together.wait(timeout=120)
    jobs = read_jobs(s3_store, ids)
    assert len(jobs) == 40
    assert all(job.stop == STOP and job.status is None for job in jobs)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A job folder with one checkpoint, a log, and files that are still being written."""
    folder = tmp_path / "work"
    for name in (
        "checkpoints/step-000040/COMPLETE",
        "checkpoints/step-000040/lora.safetensors",
        "checkpoints/step-000040/state.json",
        "logs/trainer-1.log",
        ".status.json.77.tmp",
        "checkpoints/.step-000080/lora.safetensors",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def test_marks_go_last_in_both_directions(store: Store, work: Path, tmp_path: Path) -> None:
    sent = upload_folder(store, work, "job-1", {})
    names = [key.removeprefix("job-1/") for key in sent]
    assert names == [
        "checkpoints/step-000040/lora.safetensors",
        "checkpoints/step-000040/state.json",
        "logs/trainer-1.log",
        "checkpoints/step-000040/COMPLETE",
    ]
    fetched = download_folder(store, "job-1", tmp_path / "again")
    assert [path.relative_to(tmp_path / "again").as_posix() for path in fetched] == names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (work / name).read_bytes()


def test_only_what_changed_is_carried_again(store: Store, work: Path, tmp_path: Path) -> None:
    sent: dict[str, tuple[int, int]] = {}
    assert len(upload_folder(store, work, "job-1", sent)) == 4
    assert upload_folder(store, work, "job-1", sent) == []
    with (work / "logs" / "trainer-1.log").open("a") as log:
        log.write("more")
    assert upload_folder(store, work, "job-1", sent) == ["job-1/logs/trainer-1.log"]
    assert store.read("job-1/logs/trainer-1.log") == b"logs/trainer-1.logmore"
    assert len(download_folder(store, "job-1", tmp_path / "again")) == 4
    (tmp_path / "again" / "logs" / "trainer-1.log").write_text("damaged")
    assert download_folder(store, "job-1", tmp_path / "again") == [tmp_path / "again" / "logs" / "trainer-1.log"]


def test_a_folder_that_is_the_store_itself_is_left_alone(tmp_path: Path, work: Path) -> None:
    before = {path: path.stat() for path in work.rglob("*")}
    store = FileStore(tmp_path)
    upload_folder(store, work, "work", {})
    assert download_folder(store, "work", work) == []
    assert {path: path.stat() for path in work.rglob("*")} == before


def test_a_missing_folder_is_empty_and_a_missing_file_is_named(store: Store, tmp_path: Path) -> None:
    assert upload_folder(store, tmp_path / "nothing", "job-1", {}) == []
    assert download_folder(store, "job-1", tmp_path / "nothing") == []
    with pytest.raises(NotFound):
        store.put_file(tmp_path / "nothing", "job-1/nothing")


@pytest.mark.parametrize("name", ["clients", "machines", "models"])
def test_the_other_folders_of_a_store_are_no_jobs(store: Store, name: str) -> None:
    store.write(f"{name}/demo/launch.json", b"{}")
    assert job_ids(store) == []
    with pytest.raises(InputError):
        read_job(store, name)
