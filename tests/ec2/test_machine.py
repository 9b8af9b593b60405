"""What a job needs of its machine on EC2: the base model brought to its disk, the notice of an interruption heard."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.load import load_recipe
from scripts.container.fetch_model import fetch_model
from scripts.container.interruption import is_noticed, watch_interruption
from scripts.errors import NotFound, VerificationFailed
from scripts.model_manifest import MANIFEST, ModelManifest, StagedFile
from scripts.store import FileStore, open_store
from scripts.store.base import sha256_of

RECIPE = load_recipe("qwen3-8b/zero3").recipe
FOLDER = "Qwen--Qwen3-8B"


@pytest.fixture
def staged(tmp_path: Path) -> FileStore:
    """A models folder in a store, with two files of a base model."""
    store = open_store((tmp_path / "bucket").as_uri())
    assert isinstance(store, FileStore)
    files = {}
    for name, data in (("config.json", b"{}"), ("model.safetensors", b"x" * 1000)):
        (tmp_path / name).write_bytes(data)
        store.put_file(tmp_path / name, f"{FOLDER}/{name}")
        files[name] = StagedFile(bytes=len(data), sha256=sha256_of(tmp_path / name))
    manifest = ModelManifest(model="Qwen/Qwen3-8B", revision=None, source="folder", staged_at=1.0, files=files)
    store.write(f"{FOLDER}/{MANIFEST}", manifest.model_dump_json().encode())
    return store


def test_a_model_is_fetched_whole_and_what_is_there_is_kept(staged: FileStore, tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / FOLDER).mkdir(parents=True)
    (models / FOLDER / "config.json").write_bytes(b"[]")  # as long as it should be, so not fetched again
    fetch_model(staged.url, models, RECIPE)
    assert (models / FOLDER / "model.safetensors").read_bytes() == b"x" * 1000
    assert (models / FOLDER / "config.json").read_bytes() == b"[]"
    assert (models / FOLDER / MANIFEST).is_file()


def test_a_damaged_file_of_a_model_is_not_taken(staged: FileStore, tmp_path: Path) -> None:
    (staged.root / FOLDER / "model.safetensors").write_bytes(b"y" * 1000)
    with pytest.raises(VerificationFailed):
        fetch_model(staged.url, tmp_path / "models", RECIPE)
    assert not (tmp_path / "models" / FOLDER / MANIFEST).exists()


def test_a_model_that_is_not_staged_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"not staged there; `lorry stage Qwen/Qwen3-8B --to file:"):
        fetch_model((tmp_path / "empty").as_uri(), tmp_path / "models", RECIPE)


@pytest.mark.parametrize("source", ["", "s3://nowhere/models"])
def test_nothing_is_fetched_where_nothing_is_staged(source: str, tmp_path: Path) -> None:
    fetch_model(source, tmp_path / "models", RECIPE if not source else load_recipe("smoke/zero3").recipe)
    assert not (tmp_path / "models").exists()


@pytest.fixture
def metadata() -> Iterator[tuple[str, list[int]]]:
    """The metadata service of an instance: its URL, and the status with which it answers for a notice."""
    status = [404]

    class Service(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.reply(200, b"token")

        def do_GET(self) -> None:
            known = self.headers["X-aws-ec2-metadata-token"] == "token"
            self.reply(status[0] if known and self.path.endswith("/spot/instance-action") else 401, b"{}")

        def reply(self, code: int, data: bytes) -> None:
            self.send_response(code)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", status
        server.shutdown()


def test_a_notice_of_interruption_is_told_once(metadata: tuple[str, list[int]]) -> None:
    url, status = metadata
    told = threading.Event()
    environment = {"LORRY_MACHINE": "ec2", "AWS_EC2_METADATA_SERVICE_ENDPOINT": url}
    watch_interruption(environment, told.set, every_seconds=0.02)
    assert not is_noticed(url)
    assert not told.wait(0.2)
    status[0] = 200
    assert told.wait(60)


def test_elsewhere_nobody_asks_for_notices() -> None:
    told: list[str] = []
    watch_interruption({}, lambda: told.append("told"), every_seconds=0.0)
    assert not is_noticed("http://127.0.0.1:9")
    assert told == []
