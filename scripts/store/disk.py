"""Job folders on a disk."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.errors import InputError, NotFound, Problem, ProviderError, VerificationFailed
from scripts.store.base import (
    CHUNK_BYTES,
    READ_BYTES,
    Progress,
    checked,
    chunks,
    report,
    require_file,
    require_sha256,
    sha256_of,
    shown,
)


class FileStore:
    """Job folders on a disk. Writes go to a hidden name beside the place, to the disk, then to the place."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = root.as_uri()

    def read(self, key: str) -> bytes | None:
        path = self._path(key)
        with disk_errors(path):
            try:
                with path.open("rb") as file:
                    data = file.read(READ_BYTES + 1)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None
        if len(data) > READ_BYTES:
            raise InputError(Problem(str(path), f"more than {READ_BYTES} bytes", "a smaller file"))
        return data

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with disk_errors(path), unfinished(path) as temporary:
            _fill(temporary, data)
            replace_durably(temporary, path)

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with disk_errors(path), unfinished(path) as temporary:
            _fill(temporary, data)
            try:
                os.link(temporary, path)  # unlike a rename, a link never replaces; unlike O_EXCL, it is never half
            except FileExistsError:
                return False
            _sync_folder(path.parent)
            return True

    def holds(self, key: str, path: Path) -> bool:
        target = self._path(key)
        with disk_errors(target):
            try:
                return os.path.samefile(target, path) or _same_bytes(target, path)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return False

    def put_file(self, path: Path, key: str, *, progress: Progress | None = None) -> None:
        target = self._path(key)
        require_file(path)
        if self.holds(key, path):
            return report(progress, path.stat().st_size)
        with disk_errors(target), unfinished(target) as temporary:
            sent = _copy(path, temporary, progress)
            if sha256_of(temporary) != sent:
                raise VerificationFailed(Problem(str(target), "not what was written", "check the disk, then try again"))
            replace_durably(temporary, target)

    def get_file(self, key: str, path: Path, *, sha256: str | None = None, progress: Progress | None = None) -> None:
        source = self._path(key)
        if not source.is_file():
            raise NotFound(Problem(str(source), "no such file", "see what there is with `lorry jobs`"))
        with disk_errors(path), unfinished(path) as temporary:
            require_sha256(str(source), _copy(source, temporary, progress), sha256)
            if not (path.exists() and os.path.samefile(source, path)):
                replace_durably(temporary, path)

    def keys(self, folder: str = "") -> list[str]:
        start = self._path(folder) if folder else self.root
        with disk_errors(start):
            paths = [Path(where, name) for where, _, names in os.walk(start, onerror=_raise) for name in names]
        return sorted(key for key in (p.relative_to(self.root).as_posix() for p in paths) if shown(key))

    def folders(self) -> list[str]:
        with disk_errors(self.root):
            if not self.root.is_dir():
                return []
            return sorted(e.name for e in os.scandir(self.root) if e.is_dir() and shown(e.name))

    def _path(self, key: str) -> Path:
        return self.root / checked(key)


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to; whatever still stands under it at the end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def replace_durably(temporary: Path, path: Path) -> None:
    """Moves the finished file to its place, so that it is there after a power cut too."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a failure of the disk into a sentence."""
    advice = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space",
        errno.EACCES: "make it readable and writable for you",
        errno.EPERM: "use a disk that knows hard links, and make it writable for you",
        errno.EROFS: "use a disk that can be written",
    }
    try:
        yield
    except OSError as error:
        want = advice.get(error.errno or 0, "check the disk and the store's URL")
        named = error.filename if isinstance(error.filename, str) and shown(Path(error.filename).name) else str(path)
        raise ProviderError(Problem(named, os.strerror(error.errno or errno.EIO), want)) from None


def _fill(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy(source: Path, target: Path, progress: Progress | None) -> str:
    """Copies and returns the SHA-256 of what was read."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("xb") as writer:
        for chunk in chunks(reader):
            writer.write(chunk)
            digest.update(chunk)
            report(progress, len(chunk))
    return digest.hexdigest()


def _same_bytes(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as a, other.open("rb") as b:
        return all(chunk == b.read(CHUNK_BYTES) for chunk in chunks(a))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _raise(error: OSError) -> None:
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        raise error
