"""S3 alone: resumed uploads, damage on the wire and at rest, lost answers, and its errors as sentences."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from scripts.errors import InputError, LorryError, NotFound, ProviderError, VerificationFailed
from scripts.store import Store, open_store
from scripts.store.base import sha256_of
from scripts.store.multipart import part_bytes_of

MIB = 1024 * 1024
PUT = "import sys; from pathlib import Path; from scripts.store import open_store\n"
PUT += "open_store(sys.argv[1]).put_file(Path(sys.argv[2]), 'job-1/adapter.bin')"


def _flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file of 8 parts, the last one short."""
    path = tmp_path / "large.bin"
    path.write_bytes(os.urandom(60 * MIB))
    return path


def _kill_after_parts(wire: Any, url: str, path: Path, whole: int) -> None:
    """Starts an upload in a process of its own, lets `whole` parts through, and kills it with -9."""
    slots, killed = threading.Semaphore(whole), threading.Event()

    def hold(request: Any) -> None:
        if request.part and not slots.acquire(blocking=False):
            killed.wait(120)
            raise ConnectionError  # the sender is dead: what it was sending never arrives

    wire.hold = hold
    process = subprocess.Popen([sys.executable, "-c", PUT, url, str(path)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    while len(wire.parts()) < whole and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    killed.set()
    wire.hold = lambda request: None


def test_a_killed_upload_sends_only_the_missing_parts(
    wire: Any, s3_url: str, s3_store: Store, large: Path, tmp_path: Path
) -> None:
    _kill_after_parts(wire, s3_url, large, whole=3)
    sent_before = wire.parts()
    assert len(sent_before) == 3
    assert s3_store.keys() == []
    wire.reset()
    done: list[int] = []
    s3_store.put_file(large, "job-1/adapter.bin", progress=done.append)
    assert sorted(wire.parts()) == sorted(set(range(1, 9)) - set(sent_before))
    assert sum(done) == 60 * MIB
    s3_store.get_file("job-1/adapter.bin", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()


def test_parts_of_other_bytes_are_sent_again(wire: Any, s3_url: str, s3_store: Store, large: Path) -> None:
    _kill_after_parts(wire, s3_url, large, whole=3)
    kept = set(wire.parts())
    with large.open("r+b") as file:  # the first kept part changes, the others stay
        file.seek((min(kept) - 1) * 8 * MIB + 5)
        file.write(b"other")
    wire.reset()
    s3_store.put_file(large, "job-1/adapter.bin")
    assert set(wire.parts()) == set(range(1, 9)) - kept | {min(kept)}
    assert s3_store.holds("job-1/adapter.bin", large)


def test_the_same_file_is_not_sent_twice(wire: Any, s3_store: Store, large: Path) -> None:
    s3_store.put_file(large, "job-1/adapter.bin")
    wire.reset()
    done: list[int] = []
    s3_store.put_file(large, "job-1/adapter.bin", progress=done.append)
    assert [request.method for request in wire.log] == ["HEAD"]
    assert sum(done) == 60 * MIB


@pytest.mark.parametrize("size", [100, 17 * MIB])
def test_a_bit_flipped_on_the_way_up_is_caught(wire: Any, s3_store: Store, tmp_path: Path, size: int) -> None:
    """The server takes any checksum a client claims, so only a look at what it holds can find this."""
    path = tmp_path / "file.bin"
    path.write_bytes(os.urandom(size))
    wire.on_body = lambda request, body: _flip(body) if request.method == "PUT" and request.part != 1 else body
    with pytest.raises(VerificationFailed, match=r"job-1/file\.bin: not the bytes that were sent"):
        s3_store.put_file(path, "job-1/file.bin")
    wire.reset()
    s3_store.put_file(path, "job-1/file.bin")
    assert s3_store.holds("job-1/file.bin", path)


@pytest.mark.parametrize("size", [100, 17 * MIB])
def test_a_bit_flipped_on_the_way_down_is_caught(wire: Any, s3_store: Store, tmp_path: Path, size: int) -> None:
    path, back = tmp_path / "file.bin", tmp_path / "back.bin"
    path.write_bytes(os.urandom(size))
    s3_store.put_file(path, "job-1/file.bin")
    flips = iter([True])
    wire.on_answer = lambda request, body: _flip(body) if request.method == "GET" and next(flips, False) else body
    with pytest.raises(VerificationFailed, match="not the bytes that the store holds"):
        s3_store.get_file("job-1/file.bin", back)
    assert not back.exists()


def test_damage_at_rest_is_caught_by_the_hash(s3: Any, s3_store: Store, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(os.urandom(9 * MIB))
    s3_store.put_file(path, "job-1/file.bin")
    s3.put_object(Bucket=s3_store.url.split("/")[2], Key="jobs/job-1/file.bin", Body=_flip(path.read_bytes()))
    assert not s3_store.holds("job-1/file.bin", path)
    with pytest.raises(VerificationFailed, match="as expected"):
        s3_store.get_file("job-1/file.bin", tmp_path / "back.bin", sha256=sha256_of(path))


def test_a_store_that_cannot_list_uploads_still_takes_large_files(
    wire: Any, s3_store: Store, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto = wire.app

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        lists_uploads = environ["REQUEST_METHOD"] == "GET" and "uploads" in environ["QUERY_STRING"]
        return (_answer("NotImplemented", "501 Not Implemented") if lists_uploads else moto)(environ, start_response)

    monkeypatch.setattr(wire, "app", app)
    s3_store.put_file(large, "job-1/large.bin")
    assert s3_store.holds("job-1/large.bin", large)


def test_an_object_of_another_tool_is_compared_by_reading_it(s3: Any, s3_store: Store, large: Path) -> None:
    s3.upload_file(str(large), s3_store.url.split("/")[2], "jobs/job-1/large.bin")
    assert s3_store.holds("job-1/large.bin", large)


def test_a_download_goes_on_where_the_connection_broke(wire: Any, s3_store: Store, large: Path, tmp_path: Path) -> None:
    s3_store.put_file(large, "job-1/large.bin")
    wire.reset()
    breaks = iter([True, True])
    wire.on_answer = lambda request, body: (
        body[: len(body) // 2] if request.method == "GET" and next(breaks, False) else body
    )
    s3_store.get_file("job-1/large.bin", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    assert [request.method for request in wire.log].count("GET") == 3


def test_a_writer_whose_answer_was_lost_still_knows_that_it_won(wire: Any, s3_store: Store) -> None:
    losses = iter([True])
    wire.on_answer = lambda request, body: None if request.method == "PUT" and next(losses, False) else body
    assert s3_store.create("job-1/stop.json", b"mine") is True
    losses = iter([True])
    assert s3_store.create("job-1/stop.json", b"other") is False
    assert s3_store.read("job-1/stop.json") == b"mine"


def test_a_lost_answer_to_the_last_request_does_no_harm(wire: Any, s3_store: Store, large: Path) -> None:
    losses = iter([True])
    wire.on_answer = lambda request, body: (
        None if request.method == "POST" and b"Complete" in body and next(losses, False) else body
    )
    s3_store.put_file(large, "job-1/large.bin")
    assert s3_store.holds("job-1/large.bin", large)
    assert next(losses, None) is None


def test_a_missing_bucket_is_named(wire: Any) -> None:
    store = open_store("s3://no-such-bucket/jobs")
    for call in (lambda: store.read("a/b"), lambda: store.create("a/b", b""), store.folders, store.keys):
        with pytest.raises(NotFound, match=r"s3://no-such-bucket/jobs.*NoSuchBucket.*; create the bucket"):
            call()


def _answer(code: str, status: str) -> Callable[[dict[str, Any], Any], list[bytes]]:
    body = f"<Error><Code>{code}</Code><Message>said so</Message></Error>".encode()

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        head = environ["REQUEST_METHOD"] == "HEAD"
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start_response(status, [*headers, ("x-amz-bucket-region", "eu-west-1")])
        return [] if head else [body]

    return app


@pytest.mark.parametrize(
    ("code", "status", "want"),
    [
        ("AccessDenied", "403 Forbidden", "give this key s3:GetObject, s3:PutObject and s3:ListBucket"),
        ("InvalidAccessKeyId", "403 Forbidden", "check AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", "403 Forbidden", "check AWS_SECRET_ACCESS_KEY"),
        ("ExpiredToken", "400 Bad Request", "sign in again"),
        ("PermanentRedirect", "301 Moved Permanently", "set AWS_DEFAULT_REGION"),
        ("AuthorizationHeaderMalformed", "400 Bad Request", "set AWS_DEFAULT_REGION"),
    ],
)
def test_refusals_become_sentences(
    wire: Any, s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, status: str, want: str
) -> None:
    monkeypatch.setattr(wire, "app", _answer(code, status))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ProviderError) as caught:
        s3_store.write("job-1/a.json", b"{}")
    assert want in str(caught.value)
    assert "said so" in str(caught.value)
    calls: list[Callable[[], Any]] = [
        lambda: s3_store.read("job-1/a.json"),
        lambda: s3_store.put_file(tmp_path / "file", "job-1/a.json"),
        lambda: s3_store.get_file("job-1/a.json", tmp_path / "b"),
        s3_store.folders,
    ]
    for call in calls:
        with pytest.raises(ProviderError):
            call()


def test_no_network_and_no_credentials_become_sentences(wire: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(LorryError, match="check the network and AWS_ENDPOINT_URL"):
        open_store("s3://bucket/jobs").read("a/b")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with pytest.raises(ProviderError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket/jobs").read("a/b")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(InputError, match="check AWS_ENDPOINT_URL"):
        open_store("s3://bucket/jobs")


def test_a_name_that_no_bucket_can_have_is_refused(wire: Any) -> None:
    with pytest.raises(InputError, match="a real bucket name"):
        open_store("s3://not a bucket/jobs").read("a/b")


@pytest.mark.parametrize("size", [1, 8 * MIB, 60 * MIB, 200 * 1000 * MIB, 4 * 10**12])
def test_part_sizes_keep_every_limit(size: int) -> None:
    part = part_bytes_of(size)
    assert 8 * MIB <= part <= 500_000_000
    assert -(-size // part) <= 10_000


def test_a_file_beyond_the_limits_is_refused() -> None:
    with pytest.raises(InputError, match="at most 5000000000000 bytes"):
        part_bytes_of(5 * 10**12)


def test_only_checkpoints_are_tagged_for_the_lifecycle(s3_store: Store, s3_url: str, s3: Any, tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x" * 100)
    large.write_bytes(os.urandom(9 * 1024 * 1024))
    bucket = s3_url.split("/")[2]
    for path in (small, large):
        tag = [{"Key": "lorry-kind", "Value": "checkpoint"}]
        for folder, tags in (("checkpoints/step-000004", tag), ("adapter", [])):
            key = f"job-1/{folder}/{path.name}"
            s3_store.put_file(path, key)
            assert s3.get_object_tagging(Bucket=bucket, Key=f"jobs/{key}")["TagSet"] == tags


def test_a_store_without_tags_still_takes_checkpoints(
    s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runpod's volumes answer NotImplemented to a tag."""
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"x" * 100)
    client = s3_store.client  # type: ignore[attr-defined]
    put, refused = client.put_object, []

    def put_object(**request: Any) -> Any:
        if "Tagging" in request:
            refused.append(request["Key"])
            raise ClientError({"Error": {"Code": "NotImplemented", "Message": "no tags here"}}, "PutObject")
        return put(**request)

    monkeypatch.setattr(client, "put_object", put_object)
    for step in ("step-000004", "step-000008"):
        s3_store.put_file(path, f"job-1/checkpoints/{step}/lora.safetensors")
    assert len(refused) == 1
    assert len(s3_store.keys("job-1/checkpoints")) == 2
