"""Fetches a training set from the URL a client names, and from nowhere inside our own network.

fetch(url, Path("set.jsonl"), Fetcher())        # https, public addresses, at most 512 MiB, 5 redirects, 5 minutes

Each connection goes to an address that was checked for it, so a name that answers differently the second time gains
nothing. Nothing is unpacked: a compressed answer is refused, and with it every bomb.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore

from scripts.errors import InputError, Problem

MIB = 2**20
WHERE = "dataset_url"
MAX_URL = 4096
MAX_REDIRECTS = 5
_TIMEOUTS = {"connect": 10.0, "read": 30.0, "write": 10.0, "pool": 10.0}
_REDIRECTS = (301, 302, 303, 307, 308)
# RFC 6052 and 6to4 carry an IPv4 address inside, which may be a private one.
_WRAPPED = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16"))

_FAILURES = (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError)

Resolve = Callable[[str, int], list[str]]
"(host, port) -> addresses. Raises OSError."


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, as this machine's resolver gives them."""
    return list(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


@dataclass(frozen=True)
class Fetcher:
    """How a training set is fetched. allows_loopback: a test switch, for http and this machine's own addresses."""

    allows_loopback: bool = False
    max_bytes: int = 512 * MIB
    max_seconds: float = 300.0
    resolve: Resolve = resolve
    tls: ssl.SSLContext | None = None
    now: Callable[[], float] = time.monotonic


class _NotAllowed(Exception):
    """An address that no client may make us connect to."""


def fetch(url: str, path: Path, fetcher: Fetcher) -> None:
    """Writes what the URL gives to `path`. Raises InputError; no message holds the query, which may be a signature."""
    tls = fetcher.tls or _default_tls()
    ends = fetcher.now() + fetcher.max_seconds
    with httpcore.ConnectionPool(
        ssl_context=tls, network_backend=_Checked(fetcher), max_keepalive_connections=0
    ) as pool:
        for _ in range(MAX_REDIRECTS + 1):
            parts = checked_url(url, fetcher)
            try:
                target = _step(pool, url, path, fetcher, ends)
            except _NotAllowed as error:
                raise _problem(parts, str(error), "a public address") from None
            except (*_FAILURES, ValueError) as error:  # ValueError: a name that no resolver can even be asked for
                got = f"cannot be fetched ({_reason(error)})"
                raise _problem(parts, got, "a link that works from the internet") from None
            if target is None:
                return
            url = urljoin(url, target)
    raise _problem(parts, f"more than {MAX_REDIRECTS} redirects", "the link that they lead to")


def checked_url(url: str, fetcher: Fetcher) -> SplitResult:
    """The parts of a URL that may be fetched. Raises InputError."""
    shown = Problem(WHERE, ascii(url[:80]), "a link that begins with https://")
    if len(url) > MAX_URL:
        raise InputError(Problem(WHERE, f"{len(url)} characters", f"at most {MAX_URL}"))
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise InputError(Problem(WHERE, "a character that no URL has", "percent-encode it"))
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise InputError(shown) from None
    if not host or port == 0 or parts.scheme not in ("https", "http"):
        raise InputError(shown)
    if parts.scheme == "http" and not (fetcher.allows_loopback and host in ("127.0.0.1", "localhost", "::1")):
        raise _problem(parts, "not encrypted", "a link that begins with https://")
    if parts.username is not None or parts.password is not None:
        raise InputError(Problem(WHERE, "a user name or password in the link", "a signed link instead"))
    return parts


def checked_addresses(addresses: Iterable[str], allows_loopback: bool) -> list[str]:
    """The addresses, all of them public. Raises _NotAllowed when one is not: a name with two faces is no accident."""
    found = list(addresses)
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        if allows_loopback and address.is_loopback:
            continue
        wrapped = any(address.version == net.version and address in net for net in _WRAPPED)
        if wrapped or not address.is_global or address.is_multicast or address.is_reserved:
            raise _NotAllowed("it leads to an address that is not public")
    if not found:
        raise _NotAllowed("its host has no address")
    return found


class _Checked(httpcore.NetworkBackend):
    """Connects to addresses that were just resolved and checked; TLS still asks for the name in the URL."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher, self._inner = fetcher, httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            addresses = self._fetcher.resolve(host, port)
        except (OSError, UnicodeError):
            raise _NotAllowed("its host is not known") from None
        for address in checked_addresses(addresses, self._fetcher.allows_loopback):
            try:
                return self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
        raise last


@lru_cache(maxsize=1)
def _default_tls() -> ssl.SSLContext:
    """The certificates this machine trusts; reading them takes a tenth of a second."""
    return ssl.create_default_context()


def _step(pool: httpcore.ConnectionPool, url: str, path: Path, fetcher: Fetcher, ends: float) -> str | None:
    """One request: writes the file, or returns where it is redirected to."""
    parts = urlsplit(url)
    headers = [("Host", parts.netloc), ("Accept-Encoding", "identity"), ("Accept", "*/*"), ("User-Agent", "lorry")]
    with pool.stream("GET", url, headers=headers, extensions={"timeout": _TIMEOUTS}) as answer:
        said = {name.lower(): value.decode("latin-1") for name, value in answer.headers}
        if answer.status in _REDIRECTS and b"location" in said:
            return said[b"location"]
        if answer.status != 200:
            want = "a link that works now: a signed link may have expired"
            raise _problem(parts, f"the server answered {answer.status}", want)
        if said.get(b"content-encoding", "identity").lower() not in ("", "identity"):
            raise _problem(parts, "a compressed answer", "serve the file as it is")
        too_large = _problem(parts, f"more than {fetcher.max_bytes // MIB} MiB", "a smaller training set")
        if said.get(b"content-length", "").isdigit() and int(said[b"content-length"]) > fetcher.max_bytes:
            raise too_large
        size = 0
        with path.open("wb") as file:
            for chunk in answer.iter_stream():
                size += len(chunk)
                if size > fetcher.max_bytes:
                    raise too_large
                if fetcher.now() > ends:
                    raise _problem(parts, f"not here after {fetcher.max_seconds:.0f} s", "a faster server")
                file.write(chunk)
    return None


def _problem(parts: SplitResult, got: str, want: str) -> InputError:
    return InputError(Problem(f"{WHERE} {parts.scheme}://{parts.hostname}{parts.path[:120]}", got, want))


def _reason(error: Exception) -> str:
    if isinstance(error, httpcore.TimeoutException):
        return "no answer in time"
    text = str(error)
    return "its certificate is not valid" if "CERTIFICATE" in text.upper() else "no connection"
