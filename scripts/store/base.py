"""What every store is: the protocol, what a safe key looks like, and how files are read and checked on the way.

A key is a relative path with forward slashes. What a reader sees under a key is always whole: the old bytes or the new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from scripts.errors import InputError, NotFound, Problem, VerificationFailed

Progress = Callable[[int], None]
"Called with the bytes done since the last call."

READ_BYTES = 64 * 1024 * 1024
"The most that `read` takes into memory; larger files go through get_file."
CHUNK_BYTES = 1024 * 1024
_KEY_BYTES = 900  # S3 allows 1,024 with the store's own prefix
_PART_BYTES = 255  # the limit of a file name


class Store(Protocol):
    """Files by key. Every method raises InputError for an unsafe key and ProviderError when the store fails."""

    url: str

    def read(self, key: str) -> bytes | None:
        """The bytes; None when there is no such key. Raises InputError for more than READ_BYTES."""

    def write(self, key: str, data: bytes) -> None:
        """Replaces the bytes at once."""

    def create(self, key: str, data: bytes) -> bool:
        """Writes only when the key is new: of several writers exactly one gets True."""

    def holds(self, key: str, path: Path) -> bool:
        """Whether the key holds exactly the bytes of the file."""

    def put_file(self, path: Path, key: str, *, progress: Progress | None = None) -> None:
        """Copies a file of any size into the store, unless it is there already. Interrupted, it goes on where it was.

        Raises NotFound when `path` is missing, VerificationFailed when the store ends up with other bytes.
        """

    def get_file(self, key: str, path: Path, *, sha256: str | None = None, progress: Progress | None = None) -> None:
        """Copies a file out of the store; `path` appears only when it is whole and, where given, has that SHA-256.

        Raises NotFound when the key is missing, VerificationFailed when the bytes are not the right ones.
        """

    def keys(self, folder: str = "") -> list[str]:
        """All keys below a folder, sorted. Names that begin with a dot are not shown: they are unfinished."""

    def folders(self) -> list[str]:
        """The names of the first level: the job folders, sorted."""


def checked(key: str) -> str:
    """The key itself when it is safe on every store; InputError otherwise."""
    parts = key.split("/")
    want = ""
    if not key or "" in parts:
        want = "a relative path such as job-1/data/train.jsonl"
    elif any(part.startswith(".") for part in parts):
        want = "no part may begin with a dot"
    elif "\\" in key or not key.isprintable():
        want = "no control characters and no backslash"
    elif len(key.encode()) > _KEY_BYTES or any(len(part.encode()) > _PART_BYTES for part in parts):
        want = f"at most {_KEY_BYTES} bytes, {_PART_BYTES} in one part"
    if want:
        raise InputError(Problem("store key", ascii(key[:120]), want))
    return key


def shown(key: str) -> bool:
    """Whether a name found in a store is one of ours; half-written files and other tools' objects are not."""
    try:
        return checked(key) == key
    except InputError:
        return False


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_file(path: Path) -> None:
    """Raises NotFound when a file that shall be sent is not there."""
    if not path.is_file():
        raise NotFound(Problem(str(path), "no such file", "the path of a file"))


def require_sha256(where: str, got: str, want: str | None) -> None:
    """Raises VerificationFailed when a hash was expected and another was found."""
    if want is not None and got != want:
        raise VerificationFailed(
            Problem(
                where, f"SHA-256 {got[:12]}..., not {want[:12]}... as expected", "the bytes are damaged; push again"
            )
        )


def report(progress: Progress | None, count: int) -> None:
    """Tells the progress, where anybody listens."""
    if progress is not None:
        progress(count)


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """The rest of a file in pieces of CHUNK_BYTES."""
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
