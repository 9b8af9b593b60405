"""The end of a client: every version everywhere, nobody else's, with a certificate; and nothing by accident."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.job import Submission
from recipes.serving import Place
from scripts import audit
from scripts.backends.runpod_api import RunpodApi
from scripts.delete_client import Certificate, delete_client, survey
from scripts.errors import InputError, NotFound, Refused, VerificationFailed
from scripts.fake_runpod.server import serve as serve_runpod
from scripts.forget import SETS
from scripts.push import push
from scripts.serving.client import Vllm
from scripts.serving.history import following, served_name
from scripts.serving.local_server import LocalServer
from scripts.serving.runpod_endpoint import modules_of, read_endpoint
from scripts.serving.runpod_endpoint import record as record_list
from scripts.state import JobState
from scripts.store import open_store
from scripts.store.erase import erase, still_there
from tests.serving.fake_vllm import served
from tests.serving.test_runpod_endpoint import ENDPOINT

ENDED = JobState("completed", "done", 100, None, None, True)
RUNNING = JobState("running", "training", 50, None, None, False)
ROOT = Path(__file__).resolve().parents[2]


def _settle(url: str, client: str, job: Any) -> None:
    """What a client has after one job: an adapter, an uploaded set, notes, and its own audit."""
    store = open_store(f"{url}/clients/{client}/jobs")
    push(job.adapter, store, "job-1")
    store.write("job-1/launch.json", job.spec.model_dump_json().encode())
    store.write("job-1/status.json", b"{}")
    store.write("job-1/status.json", b'{"again": 1}')
    open_store(f"{url}/clients/{client}/files").write("file-1/file.json", b"{}")
    notes = open_store(f"{url}/clients/{client}/notes")
    notes.write("keys/1.json", b"{}")
    audit.record(notes, "launch", "job-1", who=f"client {client}", now=1.0)


@pytest.fixture
def two_clients(store_url: str, job: Any, request: pytest.FixtureRequest) -> str:
    """A store with acme and acme-2 in it, versioned where it is a bucket."""
    if store_url.startswith("s3://"):
        s3 = request.getfixturevalue("s3")
        bucket = store_url.split("/")[2]
        s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    job.vouch()
    for client in ("acme", "acme-2"):
        _settle(store_url, client, job)
    return store_url


def nobody(place: Place) -> Vllm:
    """No server is asked where nothing was published."""
    raise AssertionError(place.url)


def _survey(url: str, client: str = "acme", *places: str, **changes: Any) -> Any:
    return survey(url, client, places, **({"known": False, "state": lambda files: ENDED} | changes))


def test_everything_of_one_client_goes_and_nothing_of_another(two_clients: str) -> None:
    other = still_there(f"{two_clients}/clients/acme-2")
    certificate = delete_client(_survey(two_clients), nobody, who="ann", now=1_700_000_000.0)
    assert still_there(f"{two_clients}/clients/acme") == []
    assert still_there(f"{two_clients}/clients/acme-2") == other
    assert certificate.jobs == ("job-1",)
    assert certificate.places[0].removed >= 8
    stored = open_store(two_clients).read("_certificates/acme-1700000000.json")
    assert stored is not None
    assert Certificate.model_validate_json(stored) == certificate
    chain = audit.verify(open_store(two_clients))
    assert [(entry.what, entry.subject) for entry in chain.entries] == [("delete", "acme")] * 2
    with pytest.raises(NotFound, match="nothing of it"):
        _survey(two_clients)


def test_the_certificate_names_no_file_and_its_hash_is_of_what_was_there(two_clients: str) -> None:
    listed = still_there(f"{two_clients}/clients/acme")
    certificate = delete_client(_survey(two_clients), nobody, who="ann", now=1.0)
    text = "".join(json.dumps(item.model_dump(), sort_keys=True) + "\n" for item in listed)
    assert certificate.places[0].sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert "adapter_model" not in certificate.model_dump_json()


@pytest.fixture
def bucket(s3: Any, s3_url: str, job: Any) -> tuple[str, str]:
    """(URL, bucket): versioned, with one client."""
    name = s3_url.split("/")[2]
    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    job.vouch()
    _settle(s3_url, "acme", job)
    return s3_url, name


def test_old_versions_delete_markers_and_unfinished_uploads_go_too(bucket: tuple[str, str], s3: Any) -> None:
    url, name = bucket
    s3.delete_object(Bucket=name, Key="jobs/clients/acme/notes/keys/1.json")
    s3.create_multipart_upload(Bucket=name, Key="jobs/clients/acme/jobs/job-1/checkpoints/big")
    kinds = {item.kind for item in still_there(f"{url}/clients/acme")}
    assert kinds == {"object", "delete marker", "unfinished upload"}
    delete_client(_survey(url), nobody, who="ann", now=1.0)
    left = s3.list_object_versions(Bucket=name, Prefix="jobs/clients/acme/")
    assert left.get("Versions", []) == left.get("DeleteMarkers", []) == []
    assert s3.list_multipart_uploads(Bucket=name).get("Uploads", []) == []


def test_two_files_alone_are_erased_with_every_version_of_them(bucket: tuple[str, str], s3: Any) -> None:
    url, name = bucket
    data = open_store(f"{url}/job-9/data")
    for file in ("train.jsonl", "train.jsonl", "valid.jsonl", "report.json"):
        data.write(file, file.encode())
    s3.delete_object(Bucket=name, Key="jobs/job-9/data/valid.jsonl")
    s3.create_multipart_upload(Bucket=name, Key="jobs/job-9/data/train.jsonl")
    removed = erase(f"{url}/job-9/data", SETS)
    kinds = ["delete marker", "object", "object", "object", "unfinished upload"]
    assert sorted(item.kind for item in removed) == kinds, "two versions of one, and a hidden one of the other"
    assert still_there(f"{url}/job-9/data", SETS) == []
    assert [item.key for item in still_there(f"{url}/job-9/data")] == ["report.json"]


def test_a_second_store_such_as_a_volume_is_emptied_too(two_clients: str, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "clients" / "acme" / "bicycle").mkdir(parents=True)
    (volume / "clients" / "acme" / "bicycle" / ".half").write_text("hidden")
    certificate = delete_client(_survey(two_clients, "acme", volume.as_uri()), nobody, who="ann", now=1.0)
    assert not (volume / "clients" / "acme").exists()
    assert [place.removed for place in certificate.places][1] == 1


def test_what_cannot_be_removed_makes_no_certificate(bucket: tuple[str, str], wire: Any) -> None:
    """A bucket that keeps its versions answers a delete with 'done' and shows them still."""
    url, _ = bucket
    asked = _survey(url)
    wire.app, app = _deaf_to_deletes(wire.app), wire.app
    try:
        with pytest.raises(VerificationFailed, match="objects are still there"):
            delete_client(asked, nobody, who="ann", now=1.0)
    finally:
        wire.app = app
    assert open_store(url).keys("_certificates") == []


def _deaf_to_deletes(app: Any) -> Any:
    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "DELETE":
            start_response("204 No Content", [])
            return [b""]
        return app(environ, start_response)

    return answer


class _Loads:
    """Loads and unloads, and has no model."""

    def ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"ok": True}


def test_servers_and_the_folders_they_read_know_nothing_of_the_client_afterwards(
    two_clients: str, tmp_path: Path
) -> None:
    """Two clients on one server, each with an adapter of the same job id; the other one stays."""
    with served(LocalServer(_Loads(), "lorry/smoke")) as url:
        folder = tmp_path / "adapters"
        place = Place(url=url, base="lorry/smoke", adapters=folder.as_uri(), mounted=str(folder))
        for client in ("acme", "acme-2"):
            jobs = open_store(f"{two_clients}/clients/{client}/jobs")
            name = served_name(jobs, "job-1")
            assert name == f"clients/{client}/job-1"
            open_store(place.adapters).write(f"{name}/adapter_config.json", b"{}")
            Vllm(url).load(name, str(folder / name))
            following(jobs, "main", None, place=place, live="job-1", deed="publish", job_id="job-1", by="ann",
                      at=1.0, outcome="done")  # fmt: skip
        certificate = delete_client(_survey(two_clients), lambda place: Vllm(place.url), who="ann", now=1.0)
        assert [(left.url, left.unloaded) for left in certificate.servers] == [(url, 1)]
        assert sorted(Vllm(url).models()) == ["clients/acme-2/job-1", "lorry/smoke"]
        assert [path.name for path in (folder / "clients").iterdir()] == ["acme-2"]
        assert [place.url for place in certificate.places][1] == f"{folder.as_uri()}/clients/acme"
    asked = _survey(two_clients, "acme-2")
    silent = delete_client(asked, lambda place: Vllm(place.url), who="ann", now=2.0)
    assert "did not answer; where it still runs, start it anew" in silent.servers[0].sentence


@pytest.mark.slow
def test_a_person_deletes_a_client_of_a_runpod_endpoint_to_the_last_version(
    bucket: tuple[str, str], s3: Any, tmp_path: Path
) -> None:
    """Store with versions, volume, the endpoint's list and its recorded states, the front door's clients.yaml."""
    url, name = bucket
    openapi = Path(os.environ["RUNPOD_OPENAPI"]) if "RUNPOD_OPENAPI" in os.environ else None
    volume = f"{url}-volume/adapters"
    clients = tmp_path / "clients.yaml"
    clients.write_text(f"acme: {{key_sha256: [{'a' * 64}], recipe: smoke/zero3}}\n")
    with serve_runpod("rpa_key", openapi) as local:
        runpod = RunpodApi("rpa_key", local.url, sleep=lambda seconds: None)
        listed = [{"name": f"clients/{who}/job-1", "path": f"/a/{who}"} for who in ("acme", "brick")]
        endpoint = str(runpod.create("serverless", ENDPOINT | {"env": {"LORA_MODULES": json.dumps(listed)}})["id"])
        root = open_store(url)
        record_list(root, read_endpoint(runpod, endpoint), lambda modules: modules, "ann", 1.0)
        place = Place(url="http://127.0.0.1:9", base="lorry/smoke", adapters=volume, mounted="/a", endpoint=endpoint)
        following(open_store(f"{url}/clients/acme/jobs"), "main", None, place=place, live="job-1", deed="publish",
                  job_id="job-1", by="ann", at=1.0, outcome="done")  # fmt: skip
        open_store(f"{url}/clients/acme/jobs").write(f"_outcomes/main/job-1/5966667/{'p' * 8}.json", b"{}")
        for who in ("acme", "brick"):
            open_store(volume).write(f"clients/{who}/job-1/adapter_model.safetensors", b"1")
            open_store(volume).write(f"clients/{who}/job-1/adapter_model.safetensors", b"22")
        aws = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
        given = aws | {"RUNPOD_API_KEY": "rpa_key", "RUNPOD_API_BASE_URL": local.url, "LORRY_CLIENTS": str(clients)}
        refused = _lorry(url, "delete-client", "acme", "--yes", **given)
        assert (refused.returncode, "remove it, so that nothing new arrives" in refused.stderr) == (3, True)
        assert len(modules_of(read_endpoint(runpod, endpoint))) == 2
        clients.write_text(f"brick: {{key_sha256: [{'a' * 64}], recipe: smoke/zero3}}\n")
        was = {place: still_there(f"{place}/clients/acme") for place in (url, volume)}
        done = _lorry(url, "delete-client", "acme", "--yes", "--json", **given)
        assert done.returncode == 0, done.stderr
        shown = read_endpoint(runpod, endpoint)
        assert modules_of(shown) == {"clients/brick/job-1": "/a/brick"}
        assert shown["workers"]["max"] == 2  # not left at zero
        assert local.drift == []
    certificate = Certificate.model_validate_json(done.stdout)
    assert [left.unloaded for left in certificate.servers] == [1]
    for emptied, (place_url, there) in zip(certificate.places, was.items(), strict=True):
        lines = "".join(json.dumps(item.model_dump(), sort_keys=True) + "\n" for item in there)
        assert (emptied.url, emptied.removed) == (f"{place_url}/clients/acme", len(there))
        assert emptied.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    left = s3.list_object_versions(Bucket=name)
    keys = {row["Key"] for kind in ("Versions", "DeleteMarkers") for row in left.get(kind, [])}
    assert not [key for key in keys if "clients/acme" in key]
    assert len([key for key in keys if "clients/brick" in key]) == 1
    stated = [root.read(key) for key in root.keys("_endpoints")]
    assert (len(stated), b"acme" in b"".join(map(bytes, stated))) == (1, False)
    assert _lorry(url, "audit", "verify", **given).returncode == 0
    entries = audit.verify(root).entries
    assert [(entry.what, entry.subject) for entry in entries] == [("delete", "acme")] * 2
    stored = root.read(f"_certificates/acme-{int(certificate.at)}.json")
    assert stored is not None
    assert hashlib.sha256(stored).hexdigest() in entries[-1].note


def test_a_client_with_a_running_job_or_an_open_door_is_not_deleted(two_clients: str) -> None:
    open_store(f"{two_clients}/clients/acme/jobs").write(
        "job-1/submission.json",
        Submission(job_id="job-1", backend="local", request_sha256="0", submitted_at=1.0).model_dump_json().encode(),
    )
    with pytest.raises(Refused, match="it has not ended"):
        _survey(two_clients, state=lambda files: RUNNING)
    with pytest.raises(Refused, match="still holds acme; remove it"):
        _survey(two_clients, known=True)
    for name in ("../acme-2", "acme/../acme-2", "", "a", "ACME"):
        with pytest.raises(InputError, match="a-z, 0-9 and hyphens"):
            _survey(two_clients, name)
    assert still_there(f"{two_clients}/clients/acme")


def _lorry(store: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LORRY_STORE": store, "LORRY_ACTOR": "ann"}
    environment |= more
    return subprocess.run(
        [sys.executable, "-m", "scripts.cli", *words],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_without_yes_nothing_is_deleted_and_with_it_the_audit_says_who(tmp_path: Path, job: Any) -> None:
    url = (tmp_path / "store").as_uri()
    job.vouch()
    _settle(url, "acme", job)
    before = still_there(f"{url}/clients/acme")
    dry = _lorry(url, "delete-client", "acme")
    assert dry.returncode == 0, dry.stderr
    assert "nothing was deleted" in dry.stdout
    assert still_there(f"{url}/clients/acme") == before
    done = _lorry(url, "delete-client", "acme", "--yes")
    assert done.returncode == 0, done.stderr
    assert "certificate" in done.stdout
    assert still_there(f"{url}/clients/acme") == []
    shown = _lorry(url, "audit")
    assert "ann" in shown.stdout
    assert "the chain is whole" in shown.stdout
    entry = tmp_path / "store" / "_audit" / "00000001.json"
    entry.write_text(entry.read_text().replace("ann", "bob"))
    broken = _lorry(url, "audit", "verify")
    assert broken.returncode == 7
    assert "changed or replaced" in broken.stderr
