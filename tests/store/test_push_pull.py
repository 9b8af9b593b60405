"""An adapter on its way into a store and home again: whole or not at all, whoever dies in between."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.adapter import verify_adapter
from scripts.errors import Conflict, InputError, NotFound, VerificationFailed
from scripts.pull import pull
from scripts.push import push
from scripts.store import FileStore, Store, open_store


def _overwrite(store: Store, request: pytest.FixtureRequest, key: str, data: bytes) -> None:
    """Changes what is stored, behind the store's back."""
    if isinstance(store, FileStore):
        (store.root / key).write_bytes(data)
    else:
        bucket = store.url.split("/")[2]
        request.getfixturevalue("s3").put_object(Bucket=bucket, Key=f"jobs/{key}", Body=data)


def test_an_adapter_comes_home_as_it_left(store: Store, job: Any, tmp_path: Path) -> None:
    written = job.vouch()
    assert push(job.adapter, store, "job-1") == written
    assert pull(store, "job-1", tmp_path / "home") == written
    names = ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    assert sorted(p.name for p in (tmp_path / "home").iterdir()) == names
    for name in names:
        assert (tmp_path / "home" / name).read_bytes() == (job.adapter / name).read_bytes()
        assert stat.S_IMODE((tmp_path / "home" / name).stat().st_mode) & 0o600 == 0o600


@pytest.mark.parametrize(
    ("kind", "rows", "at_least"),
    [
        pytest.param("file", 8, 30, id="file"),
        pytest.param("s3", 8, 20, id="s3"),
        pytest.param("s3", 9 * 1024, 30, id="s3 in two parts", marks=pytest.mark.slow),
    ],
)
def test_a_push_killed_at_any_step_is_never_seen_as_done_and_can_be_repeated(
    kind: str,
    rows: int,
    at_least: int,
    make_job: Callable[..., Any],
    run_python: Callable[..., Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """kill -9 before every single step to disk or network. The slow one sends a file of 9 MiB in two parts."""
    job = make_job(rows=rows)
    job.vouch()
    url = request.getfixturevalue("s3_url") if kind == "s3" else (tmp_path / "store").as_uri()
    kills = int(run_python("tests/store/push_killed.py", str(job.adapter), url, "job-1").stdout)
    assert kills >= at_least
    unseen = 0
    for number in range(kills):
        store, home = open_store(f"{url}/{number}"), tmp_path / f"home-{number}"
        if store.read("job-1/adapter/manifest.json") is None:
            with pytest.raises(NotFound, match="no finished adapter"):
                pull(store, "job-1", home)
            unseen += 1
        else:
            pull(store, "job-1", home)
            shutil.rmtree(home)
        push(job.adapter, store, "job-1")
        assert pull(store, "job-1", home) == verify_adapter(job.adapter)
        shutil.rmtree(home)
    assert unseen >= at_least - 5


def test_pushing_twice_does_no_harm_and_mends_damage(
    store: Store, job: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job.vouch()
    first = push(job.adapter, store, "job-1")
    _overwrite(store, request, "job-1/adapter/adapter_config.json", b"[]")
    with pytest.raises(VerificationFailed, match=r"adapter_config\.json: SHA-256"):
        pull(store, "job-1", tmp_path / "home")
    assert push(job.adapter, store, "job-1") == first
    assert pull(store, "job-1", tmp_path / "home") == first


def test_the_first_manifest_of_the_same_adapter_stays(store: Store, job: Any, tmp_path: Path) -> None:
    first = job.vouch()
    push(job.adapter, store, "job-1")
    (job.adapter / "manifest.json").unlink()
    slower = job.result.model_copy(update={"wall_seconds": 99.0})
    assert job.vouch(result=slower) != first
    assert push(job.adapter, store, "job-1") == first


def test_another_adapter_under_the_same_job_is_a_conflict(
    store: Store, make_job: Callable[..., Any], tmp_path: Path
) -> None:
    one, other = make_job(text="{}"), make_job(text='{"r": 8}')
    first = one.vouch()
    other.vouch()
    push(one.adapter, store, "job-1")
    with pytest.raises(Conflict, match=r"another adapter of this job already; different: adapter_config\.json"):
        push(other.adapter, store, "job-1")
    assert pull(store, "job-1", tmp_path / "home") == first


def test_a_folder_is_pushed_only_under_its_own_job(store: Store, job: Any) -> None:
    job.vouch()
    with pytest.raises(Conflict, match="the adapter of job job-1, not job-2; push it as job-1"):
        push(job.adapter, store, "job-2")
    with pytest.raises(InputError, match="a-z, 0-9 and single hyphens"):
        push(job.adapter, store, "../job-2")
    assert store.keys() == []


def test_a_damaged_folder_is_not_pushed(store: Store, job: Any) -> None:
    with pytest.raises(NotFound, match="without it there is no adapter"):
        push(job.adapter, store, "job-1")
    job.vouch()
    (job.adapter / "adapter_config.json").write_text("{ }")
    with pytest.raises(VerificationFailed):
        push(job.adapter, store, "job-1")
    assert store.keys() == []


def test_a_pull_goes_on_and_never_replaces_what_is_there(store: Store, job: Any, tmp_path: Path) -> None:
    job.vouch()
    push(job.adapter, store, "job-1")
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(job.adapter / "adapter_config.json", home)
    pull(store, "job-1", home)
    pull(store, "job-1", home)
    (home / "notes.txt").write_text("mine")
    with pytest.raises(Conflict, match=r"already holds something else \(notes\.txt\); pull into a new folder"):
        pull(store, "job-1", home)
    (home / "notes.txt").unlink()
    (home / "adapter_config.json").write_text("mine")
    with pytest.raises(Conflict, match=r"adapter_config\.json"):
        pull(store, "job-1", home)
    assert (home / "adapter_config.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"files": {"../../outside": "0" * 64}}, r"names the file '\.\./\.\./outside'; do not use this adapter"),
        ({"files": {"/etc/outside": "0" * 64}}, "names the file '/etc/outside'"),
        ({"job_id": "job-9"}, "the manifest of job job-9"),
    ],
)
def test_a_hostile_manifest_writes_nothing(
    store: Store, job: Any, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    record = json.loads(job.vouch().model_dump_json()) | change
    store.write("job-1/adapter/manifest.json", json.dumps(record).encode())
    home = tmp_path / "home"
    with pytest.raises(VerificationFailed, match=sentence):
        pull(store, "job-1", home)
    assert not home.exists()


def test_a_broken_manifest_in_the_store_is_named(store: Store, tmp_path: Path) -> None:
    store.write("job-1/adapter/manifest.json", b"{")
    with pytest.raises(VerificationFailed, match=r"job-1/adapter/manifest\.json: not a manifest"):
        pull(store, "job-1", tmp_path / "home")
