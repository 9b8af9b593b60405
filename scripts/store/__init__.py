"""Where job folders live: a folder on disk (file:///...) or a bucket (s3://bucket/prefix), behind one small protocol.

store = open_store("file:///srv/jobs"); store.create("job-1/stop.json", b"...")     # False when it exists already
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from scripts.errors import InputError, Problem
from scripts.store.base import Store, checked
from scripts.store.disk import FileStore

__all__ = ["FileStore", "Store", "open_store"]


def open_store(url: str) -> Store:
    """The store at file:///folder or s3://bucket/prefix. Nothing is contacted or created yet."""
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return FileStore(Path(unquote(parts.path)))
    if url.startswith("s3://"):
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        if bucket:
            from scripts.store.s3 import S3Store  # boto3 takes half a second to import

            return S3Store(bucket, checked(prefix) if prefix else "")
    raise InputError(Problem("store", repr(url), "a URL: file:///folder or s3://bucket/prefix"))
