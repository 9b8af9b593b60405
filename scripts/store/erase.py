"""Removes everything below a folder of a store for good: every version, delete marker and unfinished upload.

removed = erase("s3://bucket/jobs/clients/acme"); still_there("s3://bucket/jobs/clients/acme")     # [] afterwards
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from recipes.job import Record
from scripts.store import FileStore, open_store
from scripts.store.base import sha256_of
from scripts.store.disk import disk_errors


class Removed(Record):
    """One object that was there. fingerprint: SHA-256 on a disk, the store's ETag in a bucket, nothing for a marker."""

    key: str
    version: str = ""
    kind: str = "object"
    "object, delete marker or unfinished upload."
    bytes: int = 0
    fingerprint: str = ""


def still_there(url: str, names: Collection[str] | None = None) -> list[Removed]:
    """What lies below the folder, hidden and old versions included; with names, of these files alone.

    Raises ProviderError when the store fails.
    """
    store: Any = open_store(url)
    if isinstance(store, FileStore):
        found = _on_disk(store.root)
    else:
        with store.errors(""):
            found = _in_bucket(store)
    return [item for item in found if names is None or item.key in names]


def erase(url: str, names: Collection[str] | None = None) -> list[Removed]:
    """Removes it all, or these files; what was there. Done twice it removes what is left.

    Raises ProviderError when the store fails.
    """
    found = still_there(url, names)
    s3: Any = open_store(url)
    if isinstance(s3, FileStore):
        with disk_errors(s3.root):
            for item in found:
                (s3.root / item.key).unlink(missing_ok=True)
            if names is None and s3.root.exists():
                shutil.rmtree(s3.root)
        return found
    with s3.errors(""):
        for item in found:
            at = {"Bucket": s3.bucket, "Key": s3.prefix + item.key}
            if item.kind == "unfinished upload":
                s3.client.abort_multipart_upload(**at, UploadId=item.version)
            else:  # one at a time: Runpod's S3 has no DeleteObjects
                s3.client.delete_object(**at, **({"VersionId": item.version} if item.version else {}))
    return found


def _on_disk(root: Path) -> list[Removed]:
    found = []
    with disk_errors(root):
        for where, _, names in os.walk(root):
            for path in (Path(where, name) for name in names):
                fingerprint = "" if path.is_symlink() else sha256_of(path)
                size = path.lstat().st_size
                found.append(Removed(key=path.relative_to(root).as_posix(), bytes=size, fingerprint=fingerprint))
    return sorted(found, key=lambda item: item.key)


def _in_bucket(s3: Any) -> list[Removed]:
    from botocore.exceptions import ClientError

    try:
        pages = s3.client.get_paginator("list_object_versions").paginate(Bucket=s3.bucket, Prefix=s3.prefix)
        found = [item for page in pages for item in _versions(s3, page)]
    except ClientError as error:
        if error.response["Error"].get("Code") not in _NO_VERSIONS:
            raise
        pages = s3.client.get_paginator("list_objects_v2").paginate(Bucket=s3.bucket, Prefix=s3.prefix)
        found = [_object(s3, item) for page in pages for item in page.get("Contents", ())]
    return found + _uploads(s3)


_NO_VERSIONS = {"NotImplemented", "MethodNotAllowed", "InvalidArgument", "501"}
"What stores without versions answer; Runpod's volumes are such (its S3 page, 2026-08)."


def _versions(s3: Any, page: Any) -> list[Removed]:
    markers = [
        Removed(key=item["Key"].removeprefix(s3.prefix), version=item["VersionId"], kind="delete marker")
        for item in page.get("DeleteMarkers", ())
    ]
    return [_object(s3, item) for item in page.get("Versions", ())] + markers


def _object(s3: Any, item: Any) -> Removed:
    return Removed(
        key=item["Key"].removeprefix(s3.prefix),
        version=item.get("VersionId") or "",
        bytes=item["Size"],
        fingerprint=item["ETag"].strip('"'),
    )


def _uploads(s3: Any) -> list[Removed]:
    """Parts of uploads that were never finished lie there, and are paid for, without being seen."""
    from botocore.exceptions import ClientError

    try:
        pages = s3.client.get_paginator("list_multipart_uploads").paginate(Bucket=s3.bucket, Prefix=s3.prefix)
        return [
            Removed(key=item["Key"].removeprefix(s3.prefix), version=item["UploadId"], kind="unfinished upload")
            for page in pages
            for item in page.get("Uploads", ())
        ]
    except ClientError as error:
        if error.response["Error"].get("Code") in _NO_VERSIONS:
            return []
        raise
