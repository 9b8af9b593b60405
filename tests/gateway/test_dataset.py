"""Training sets come from the open internet alone, whole, of bounded size, and are what they claim to be."""

from __future__ import annotations

import gzip
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from scripts.errors import InputError
from scripts.gateway.dataset import Fetcher, fetch
from tests.gateway.conftest import EXAMPLE, Front, Sets, only_loopback

LOCAL = Fetcher(allows_loopback=True, max_bytes=2_000_000, max_seconds=20, resolve=only_loopback)


def refusal(url: str, path: Path, fetcher: Fetcher = LOCAL) -> str:
    with pytest.raises(InputError) as caught:
        fetch(url, path, fetcher)
    return str(caught.value)


def test_a_set_arrives_byte_by_byte_as_it_is(sets: Sets, tmp_path: Path) -> None:
    fetch(f"{sets.url}/set.jsonl", tmp_path / "set", LOCAL)
    assert (tmp_path / "set").read_bytes() == EXAMPLE.read_bytes()


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.7", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "198.18.0.1", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00:ec2::254",
        "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "ff02::1", "240.0.0.1",
    ],
)  # fmt: skip
def test_a_name_that_leads_inside_is_refused(tmp_path: Path, address: str) -> None:
    fetcher = Fetcher(resolve=lambda host, port: ["93.184.215.14", address])  # two faces: one look public
    said = refusal("https://training.example/set.jsonl?token=canary", tmp_path / "set", fetcher)
    assert "it leads to an address that is not public; a public address" in said
    assert "canary" not in said


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://training.example/set.jsonl", "not encrypted"),
        ("ftp://training.example/set.jsonl", "begins with https://"),
        ("file:///etc/passwd", "begins with https://"),
        ("gopher://training.example/", "begins with https://"),
        ("//training.example/set", "begins with https://"),
        ("https://", "begins with https://"),
        ("https://a:b@training.example/", "a user name or password"),
        ("https://training.example:0/", "begins with https://"),
        ("https://training.example:99999/", "begins with https://"),
        ("https://[::1/", "begins with https://"),
        ("https://training.example/a b", "a character that no URL has"),
        ("https://training.example\\@127.0.0.1/", "a character that no URL has"),
        ("https://training.example/\r\nHost: x", "a character that no URL has"),
        ("https://tr\u0430ining.example/", "a character that no URL has"),
        ("https://127.0.0.1/", "not public"),
        ("https://2130706433/", "not public"),
        ("https://0x7f.1/", "not public"),
        ("https://nowhere.invalid/", "its host is not known"),
        ("https://training.example/" + "a" * 5000, "at most 4096"),
    ],
)
def test_a_link_that_may_not_be_followed_is_a_sentence(tmp_path: Path, url: str, sentence: str) -> None:
    def known(host: str, port: int) -> list[str]:
        import socket

        if host.endswith((".example", ".invalid")):
            raise socket.gaierror
        return [socket.inet_ntoa(socket.inet_aton(host))]

    assert sentence in refusal(url, tmp_path / "set", Fetcher(resolve=known))


@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        ("http://169.254.169.254/latest/meta-data/", "not encrypted"),
        ("https://169.254.169.254/latest/meta-data/", "not public"),
        ("file:///etc/passwd", "begins with https://"),
        ("/a", "more than 5 redirects"),
        ("https://user:pass@localhost/", "a user name or password"),
    ],
)
def test_a_redirect_is_checked_like_the_link_itself(sets: Sets, tmp_path: Path, location: str, sentence: str) -> None:
    url = sets.put("/a", b"", 302, Location=location)
    assert sentence in refusal(url, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_redirect_to_the_set_is_followed(sets: Sets, tmp_path: Path) -> None:
    url = sets.put("/moved", b"", 307, Location="/set.jsonl")
    fetch(url, tmp_path / "set", LOCAL)
    assert (tmp_path / "set").stat().st_size == EXAMPLE.stat().st_size


def test_a_name_that_changes_its_address_gains_nothing(sets: Sets, tmp_path: Path) -> None:
    """The address that was checked is the one that is connected to: a second answer is never asked for."""
    asked: list[str] = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["169.254.169.254"]

    url = sets.url.replace("127.0.0.1", "localhost") + "/set.jsonl"
    fetch(url, tmp_path / "set", Fetcher(allows_loopback=True, resolve=rebinding))
    assert asked == ["localhost"]


@pytest.mark.parametrize(
    ("body", "status", "headers", "sentence"),
    [
        (b"x" * 2_000_001, 200, {}, "more than 1 MiB"),
        (b"", 200, {"Content_Length": "99999999999"}, "more than 1 MiB"),
        (gzip.compress(b"0" * 50_000_000), 200, {"Content_Encoding": "gzip"}, "a compressed answer"),
        (b"denied", 403, {}, "the server answered 403; a link that works now"),
        (b"", 204, {}, "the server answered 204"),
        (b"half", 200, {"Content_Length": "400"}, "cannot be fetched"),
    ],
    ids=["too long", "says it is too long", "bomb", "expired", "nothing", "cut short"],
)
def test_what_cannot_be_a_set_is_refused_while_it_is_fetched(
    sets: Sets, tmp_path: Path, body: bytes, status: int, headers: dict[str, str], sentence: str
) -> None:
    assert sentence in refusal(sets.put("/odd", body, status, **headers), tmp_path / "set")


def test_a_server_that_drips_is_left(sets: Sets, tmp_path: Path) -> None:
    clock = iter(range(0, 10_000, 15))
    fetcher = Fetcher(allows_loopback=True, max_seconds=20, resolve=only_loopback, now=lambda: float(next(clock)))
    url = sets.put("/slow", b"{}\n" * 200_000)
    assert "not here after 20 s" in refusal(url, tmp_path / "set", fetcher)


CONTENTS = [
    (b"<html>sign in</html>", "a web page or XML, perhaps the error page of a link that expired"),
    (gzip.compress(b"{}"), "a gzip file; unpack it first"),
    (b"PK\x03\x04", "a zip archive"),
    (b"", "an empty file"),
    (b'{"a": 1}\n', "set.jsonl"),
    (b"\xff\xfe{\x00", "UTF-16"),
]


def test_content_is_judged_by_itself_and_not_by_its_type(front: Front) -> None:
    for number, (body, sentence) in enumerate(CONTENTS):
        url = front.sets.put("/x/set.jsonl", body, Content_Type="application/jsonl")
        answer = front.post("/v2/lorry/run", {"input": front.input(dataset_url=url, job_id=f"job-{number}")})
        assert answer.status_code == 400
        assert sentence in answer.json()["error"], body


def test_tls_is_for_the_name_in_the_link_though_the_address_is_pinned(tmp_path: Path) -> None:
    trusted, server, port = tls_server(tmp_path, "sets.test")
    try:
        fetcher = Fetcher(allows_loopback=True, resolve=lambda host, port: ["127.0.0.1"], tls=trusted)
        fetch(f"https://sets.test:{port}/set", tmp_path / "set", fetcher)
        assert (tmp_path / "set").read_bytes() == b"{}\n"
        assert "its certificate is not valid" in refusal(f"https://other.test:{port}/set", tmp_path / "no", fetcher)
        stranger = Fetcher(allows_loopback=True, resolve=lambda host, port: ["127.0.0.1"])
        assert "its certificate is not valid" in refusal(f"https://sets.test:{port}/set", tmp_path / "no", stranger)
    finally:
        server.shutdown()


def tls_server(folder: Path, name: str) -> tuple[ssl.SSLContext, HTTPServer, int]:
    """A server with a certificate for `name`, and a context that trusts it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = serialization.Encoding.PEM
    plain = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(certificate.public_bytes(pem) + plain)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"{}\n")

        def log_message(self, *words: Any) -> None:
            return

    class Quiet(HTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            return

    server = Quiet(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    trusted = ssl.create_default_context()
    trusted.load_verify_locations(folder / "server.pem")
    return trusted, server, server.server_port


def test_uploads_are_bounded_and_kept_once(front: Front) -> None:
    headers = {"Authorization": "Bearer acme-key-canary-1"}

    def upload(body: bytes, purpose: str = "fine-tune") -> Any:
        files = {"file": ("../set.jsonl", body)}
        return front.http.post(f"{front.url}/v1/files", headers=headers, files=files, data={"purpose": purpose})

    first, second = upload(b"{}\n").json(), upload(b"{}\n").json()
    assert first["id"] == second["id"]
    assert [f["id"] for f in front.get("/v1/files").json()["data"]] == [first["id"]]
    assert upload(b"").status_code == 400
    assert upload(b"{}", "vision").status_code == 400
    assert upload(b"x" * 3_000_000).status_code == 413
    for text in ("no form", '{"file": 1}'):
        plain = front.http.post(f"{front.url}/v1/files", headers=headers, content=text)
        assert plain.status_code == 400, plain.text


def test_this_machine_serves_no_sets_unless_the_switch_is_set(make_front: Callable[..., Front]) -> None:
    """Loopback is refused unless the switch is set: the default front door fetches nothing from this machine."""
    front = make_front(fetcher=Fetcher(resolve=only_loopback))
    for url in (f"{front.sets.url}/set.jsonl", front.sets.url.replace("http://", "https://")):
        answer = front.post("/v2/lorry/run", {"input": front.input(dataset_url=url)})
        assert answer.status_code == 400
        assert "not encrypted" in answer.text or "not public" in answer.text
    assert front.sets.hits == []
