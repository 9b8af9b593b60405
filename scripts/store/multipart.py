"""Sends one large file to S3 in parts, goes on with what an interrupted upload left, and hashes what was sent.

checksum = upload_in_parts(client, {"Bucket": "my-bucket", "Key": "job-1/adapter.tar"}, path, None)
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from scripts.errors import InputError, Problem
from scripts.store.base import Progress, report

MIB = 1024 * 1024
PART_BYTES = 8 * MIB
"The smallest part we send; S3's own floor is 5 MiB. Files up to this size go in one request."

_MOST_PARTS = 10_000
_LARGEST_PART = 500_000_000  # Runpod's S3 API; AWS allows 5 GiB
_SENDERS = 4  # parts in memory at once: 4 x 8 MiB for files up to 80 GB
_CANNOT_TELL = {"NotImplemented", "501", "MethodNotAllowed", "AccessDenied", "NoSuchUpload"}


def part_bytes_of(size: int) -> int:
    """Bytes per part of a file: 8 MiB, and more only where 10,000 parts would not do. The same for every attempt.

    Raises InputError above 10,000 parts of 500 MB = 5 TB.
    """
    part = max(PART_BYTES, -(-size // (_MOST_PARTS * MIB)) * MIB)
    if part > _LARGEST_PART:
        raise InputError(Problem("store", f"a file of {size} bytes", f"at most {_MOST_PARTS * _LARGEST_PART} bytes"))
    return part


def composite_sha256(pieces: Iterable[bytes], part_bytes: int) -> str:
    """The SHA-256 of the SHA-256s of the parts, in base64: what S3 calls a composite checksum, without its `-parts`."""
    whole, part, room = hashlib.sha256(), hashlib.sha256(), part_bytes
    for piece in pieces:
        while piece:
            part.update(piece[:room])
            room, piece = room - min(room, len(piece)), piece[room:]
            if room == 0:
                whole.update(part.digest())
                part, room = hashlib.sha256(), part_bytes
    if room < part_bytes:
        whole.update(part.digest())
    return _base64(whole.digest())


def upload_in_parts(client: Any, at: dict[str, str], tag: dict[str, str], path: Path, progress: Progress | None) -> str:
    """Uploads the file to `at` (Bucket, Key) with `tag` (Tagging) and returns its composite checksum.

    A file may grow: its size now counts. Parts that an earlier upload of this key left, with the same bytes, are not
    sent again. Raises botocore's errors.
    """
    size = path.stat().st_size
    part_bytes = part_bytes_of(size)
    upload_id, there = _unfinished_upload(client, at)
    if upload_id is None:
        upload_id = client.create_multipart_upload(**at, **tag, ChecksumAlgorithm="SHA256")["UploadId"]

    def send(number: int) -> dict[str, Any]:
        with path.open("rb") as file:
            file.seek((number - 1) * part_bytes)
            data = file.read(min(part_bytes, size - file.tell()))
        return _sent_part(client, {**at, "UploadId": upload_id}, number, data, there.get(number))

    parts: list[dict[str, Any]] = []
    with ThreadPoolExecutor(_SENDERS) as pool:
        for part in pool.map(send, range(1, -(-size // part_bytes) + 1)):
            report(progress, min(part_bytes, size - len(parts) * part_bytes))
            parts.append(part)
    try:
        client.complete_multipart_upload(**at, UploadId=upload_id, MultipartUpload={"Parts": parts})
    except ClientError as error:
        # Joining many parts can outlast the connection; asked again, the store no longer knows the upload, because it
        # is done. The caller compares the checksum anyway.
        if error.response["Error"]["Code"] != "NoSuchUpload":
            raise
    return _base64(hashlib.sha256(b"".join(base64.b64decode(p["ChecksumSHA256"]) for p in parts)).digest())


def _sent_part(
    client: Any, at: dict[str, Any], number: int, data: bytes, known: dict[str, Any] | None
) -> dict[str, Any]:
    """What completing the upload needs to know of a part, which is sent unless the store has it already."""
    checksum = _base64(hashlib.sha256(data).digest())
    if known is not None and _is_part(known, checksum, data):
        etag = known["ETag"]
    else:
        etag = client.upload_part(**at, PartNumber=number, Body=data, ChecksumSHA256=checksum)["ETag"]
    return {"PartNumber": number, "ETag": etag, "ChecksumSHA256": checksum}


def _unfinished_upload(client: Any, at: dict[str, str]) -> tuple[str | None, dict[int, dict[str, Any]]]:
    """The newest unfinished upload of exactly this key with SHA-256 parts, and its parts by number.

    None where there is none or the store does not tell: going on is a saving, not a need.
    """
    try:
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=at["Bucket"], Prefix=at["Key"])
        uploads = [upload for page in pages for upload in page.get("Uploads", ()) if upload["Key"] == at["Key"]]
        usable = [upload for upload in uploads if upload.get("ChecksumAlgorithm", "SHA256") == "SHA256"]
        if not usable:
            return None, {}
        newest = max(usable, key=lambda upload: upload["Initiated"])["UploadId"]
        pages = client.get_paginator("list_parts").paginate(**at, UploadId=newest)
        return newest, {part["PartNumber"]: part for page in pages for part in page.get("Parts", ())}
    except ClientError as error:
        if error.response["Error"]["Code"] not in _CANNOT_TELL:
            raise
        return None, {}


def _is_part(known: dict[str, Any], sha256: str, data: bytes) -> bool:
    """Whether the store's part has these bytes: by SHA-256, or by MD5 where it tells no more than the ETag."""
    if "ChecksumSHA256" in known:
        return bool(known["ChecksumSHA256"] == sha256)
    return bool(known["ETag"].strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest())


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
