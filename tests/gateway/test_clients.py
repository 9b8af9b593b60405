"""Who may come in, what each sees, what it may spend, and what is in the file of clients."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from starlette.routing import Route

from recipes.errors import InputError
from scripts.errors import Refused
from scripts.gateway.app import create_app
from scripts.gateway.budget import reserve
from scripts.gateway.clients import load_clients
from scripts.gateway.door import Door
from scripts.gateway.settings import GatewaySettings
from tests.gateway.conftest import KEYS, SECRET, Front, a_client

RUN = "/v2/lorry/run"
JOB = "5f0c1d7e-58a5-4a3b-9d5e-0c9a54f1e001"
HASH = "ab" * 32

BY_JOB = [
    ("GET", "/v2/lorry/status/{}"),
    ("GET", "/v2/lorry/status-sync/{}"),
    ("GET", "/v2/lorry/stream/{}"),
    ("GET", "/v2/lorry/events/{}"),
    ("POST", "/v2/lorry/cancel/{}"),
    ("POST", "/v2/lorry/retry/{}"),
    ("GET", "/training/status/{}"),
    ("POST", "/training/cancel/{}"),
    ("GET", "/training/artifacts/{}"),
    ("GET", "/v2/lorry/training/status/{}"),
    ("GET", "/v2/lorry/training/artifacts/{}"),
    ("POST", "/v2/lorry/training/cancel/{}"),
    ("GET", "/v1/fine_tuning/jobs/{}"),
    ("POST", "/v1/fine_tuning/jobs/{}/cancel"),
    ("GET", "/v1/fine_tuning/jobs/{}/events"),
    ("GET", "/v1/fine_tuning/jobs/{}/checkpoints"),
    ("POST", "/adapters/{}/promote"),
    ("POST", "/v2/lorry/adapters/{}/promote"),
]


def test_nothing_of_one_client_is_there_for_another(front: Front) -> None:
    front.run()
    done = front.finish(JOB)
    before = {path.name: path.stat().st_mtime_ns for path in front.folder(JOB).iterdir()}
    for method, path in BY_JOB:
        answer = front.call(method, path.format(JOB), key=KEYS["brick"])
        assert answer.status_code == 404, (method, path, answer.text)
        assert "no such job" in answer.text
    for listing in ("/v1/fine_tuning/jobs", "/v1/files"):
        assert front.get(listing, KEYS["brick"]).json()["data"] == []
    assert front.get("/v2/lorry/health", KEYS["brick"]).json()["jobs"]["completed"] == 0
    assert front.post("/v2/lorry/purge-queue", key=KEYS["brick"]).json()["removed"] == 0
    link = done["output"]["model_files"]["manifest.json"]
    assert httpx.get(link.replace("/files/acme/", "/files/brick/")).status_code == 404
    assert {path.name: path.stat().st_mtime_ns for path in front.folder(JOB).iterdir()} == before
    mine = front.post(RUN, {"input": front.input()}, key=KEYS["brick"])  # the same id is another job here
    assert mine.json()["status"] == "IN_QUEUE"
    assert front.folder(JOB, "brick").is_dir()


def test_every_path_to_one_job_is_in_the_list_above(front: Front) -> None:
    """So that a new route cannot be forgotten; machines and links have their own tests."""
    app = create_app(GatewaySettings(front.root.as_uri(), (), SECRET), {"acme": a_client("acme")}, **front.hands)
    routes = {
        (method, route.path.replace("{id}", "{}"))
        for route in app.routes
        if isinstance(route, Route) and "{" in route.path and not route.path.startswith(("/machines/", "/files/"))
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert routes - {("GET", "/v1/files/{}")} == set(BY_JOB)


def test_an_uploaded_file_of_another_client_cannot_be_trained_on(front: Front) -> None:
    upload = front.http.post(
        f"{front.url}/v1/files",
        headers={"Authorization": f"Bearer {KEYS['acme']}"},
        files={"file": ("set.jsonl", b"{}\n")},
        data={"purpose": "fine-tune"},
    ).json()
    body = {"model": "lorry/smoke", "training_file": upload["id"]}
    assert front.get(f"/v1/files/{upload['id']}", KEYS["brick"]).status_code == 404
    assert front.post("/v1/fine_tuning/jobs", body, key=KEYS["brick"]).status_code == 404


def test_a_link_opens_only_what_it_was_signed_for(front: Front) -> None:
    front.run()
    link = front.finish(JOB)["output"]["model_files"]["manifest.json"]
    assert httpx.get(link).status_code == 200
    address, _, query = link.partition("?")
    signed = dict(part.split("=") for part in query.split("&"))
    for change in ({"expires": "9999999999"}, {"signature": "0" * 64}, {"signature": "caf%C3%A9"}, {"expires": "x"}):
        query = "&".join(f"{name}={value}" for name, value in (signed | change).items())
        assert httpx.get(f"{address}?{query}").status_code == 404, change
    assert httpx.get(address).status_code == 404
    assert httpx.get(link.replace("manifest.json", "..%2Flaunch.json")).status_code == 404
    assert httpx.get(link.replace("adapter/manifest.json", "launch.json")).status_code == 404


@pytest.mark.parametrize("path", ["/v2/lorry/health", "/v1/fine_tuning/jobs", "/v1/files", f"/training/status/{JOB}"])
def test_no_key_or_a_wrong_one_is_401(front: Front, path: str) -> None:
    for key in (
        None,
        b"Bearer",
        b"Bearer wrong",
        b"Basic YTpi",
        b"Bearer x" + KEYS["acme"].encode(),
        b"Bearer caf\xe9",
    ):
        answer = front.http.get(front.url + path, headers=[(b"Authorization", key)] if key else [])
        assert answer.status_code == 401, key
        assert answer.json()["code"] == "unauthorized"


def test_the_key_may_come_in_its_own_header(front: Front) -> None:
    platform = {"Authorization": "Bearer a-platforms-own-key", "X-Lorry-Key": KEYS["acme"]}
    assert front.http.get(f"{front.url}/v2/lorry/health", headers=platform).status_code == 200


def test_a_month_takes_what_fits_and_refuses_the_rest(tmp_path: Path) -> None:
    door = Door(GatewaySettings(tmp_path.as_uri(), (), SECRET), {})
    room = door.room(a_client("acme", max_usd_per_month=10.0))
    november = 1_795_000_000.0
    reserve(room, "job-1", 4.0, november)
    reserve(room, "job-1", 4.0, november)
    reserve(room, "job-2", 5.999, november + 1)
    with pytest.raises(
        Refused, match=r"\$10.00 of \$10.00 is spent or booked in 2026-11, and this job may cost \$0.50"
    ):
        reserve(room, "job-3", 0.5, november + 2)
    room.jobs.write("job-1/settlement.json", b'{"usd": 1.25, "is_final": false}')  # more may yet be billed
    with pytest.raises(Refused):
        reserve(room, "job-3", 0.5, november + 2)
    room.jobs.write("job-1/settlement.json", b'{"usd": 1.25, "is_final": true}')  # the bill was lower
    reserve(room, "job-4", 2.0, november + 3)
    reserve(room, "job-5", 9.0, november + 40 * 86_400)


def test_of_two_at_once_exactly_the_later_is_refused(tmp_path: Path) -> None:
    door = Door(GatewaySettings(tmp_path.as_uri(), (), SECRET), {})
    room = door.room(a_client("acme", max_usd_per_month=10.0))
    now = 1_795_000_000.0
    room.notes.create(f"2026-11/{round(now * 1000) + 5:015d}-600-later", b"")
    reserve(room, "earlier", 6.0, now)
    with pytest.raises(Refused):
        reserve(room, "later", 6.0, now + 0.005)


def test_the_clients_file_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "clients.yaml"
    path.write_text(
        f"acme:\n  key_sha256: [{HASH}]\n  recipe: smoke/zero3\n"
        "  models: {Mistral/Old: qwen3-8b/zero3}\n"
        "  webhook: {url: https://app.example/hook, secret_env: ACME_HOOK_SECRET}\n"
        "  supabase: {url: https://db.example, key_env: ACME_DB_KEY}\n"
    )
    acme = load_clients(path)["acme"]
    assert (acme.name, acme.max_usd_per_month, acme.supabase.table if acme.supabase else "") == (
        "acme", 250.0, "pipeline_training_jobs",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Acme:\n  recipe: smoke/zero3\n", "not a client's name"),
        ("acme:\n  recipe: smoke/zero3\n", "key_sha256: missing"),
        (f"acme:\n  key_sha256: [{HASH}]\n  recipe: smoke/zero33\n", "did you mean 'smoke/zero3'"),
        ("acme:\n  key_sha256: [secret]\n  recipe: smoke/zero3\n", "text of the form"),
        (f"acme:\n  key_sha256: [{HASH}]\n  recipe: smoke/zero3\n  key: x\n", "unknown key"),
        (f"acme:\n  key_sha256: [{HASH}]\n  recipe: smoke/zero3\n  webhook: {{url: http://a, secret_env: A_B}}\n",
         "webhook.url"),
        (f"a1:\n  key_sha256: [{HASH}]\n  recipe: smoke/zero3\nb1:\n  key_sha256: [{HASH}]\n  recipe: smoke/zero3\n",
         "the same key as a1"),
        ("[]\n", "not a mapping"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_clients_file_is_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "clients.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_clients(path)
    assert sentence in str(caught.value)
