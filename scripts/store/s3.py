"""Job folders in an S3 bucket, on AWS or on any store that speaks the same API (AWS_ENDPOINT_URL names it).

store = S3Store("my-bucket", "jobs"); store.put_file(path, "job-1/adapter/adapter_model.safetensors")
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from scripts.errors import InputError, LorryError, NotFound, Problem, ProviderError, VerificationFailed
from scripts.store.base import READ_BYTES, Progress, checked, chunks, report, require_file, require_sha256, shown
from scripts.store.disk import disk_errors, replace_durably, unfinished
from scripts.store.multipart import PART_BYTES, composite_sha256, part_bytes_of, upload_in_parts

_CONNECTIONS = 32  # read_jobs asks for that many records at once
_ATTEMPTS = 5
_MISSING = {"NoSuchKey", "NotFound", "404"}
_EXISTS = {"PreconditionFailed", "412"}
_RIGHTS = "give this key s3:GetObject, s3:PutObject and s3:ListBucket here"
_REGION = "the bucket is in another region; set AWS_DEFAULT_REGION to it"
_ADVICE = {
    "NoSuchBucket": "create the bucket, or correct the store's URL",
    "AccessDenied": _RIGHTS,
    "403": _RIGHTS,
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "sign in again",
    "PermanentRedirect": _REGION,
    "301": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
}

CHECKPOINT_TAG = "lorry-kind=checkpoint"
"infra/modules/artifact-store removes what carries it after some days."
_NO_TAGS = {"NotImplemented", "MethodNotAllowed", "InvalidArgument", "501"}
"What stores without tags answer; Runpod's volumes are such (its S3 page, 2026-08)."


class S3Store:
    """Job folders below a prefix of a bucket. Credentials, region and endpoint are found as boto3 finds them."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._knows_tags = True
        config = Config(
            # boto3 adds CRC32 trailers by default, which other stores refuse. The signature covers the bytes.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
            connect_timeout=10,
            read_timeout=120,
            max_pool_connections=_CONNECTIONS,
        )
        try:
            self.client: Any = boto3.client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            raise InputError(Problem(self.url, str(error), "check AWS_ENDPOINT_URL and AWS_PROFILE")) from None

    def read(self, key: str) -> bytes | None:
        with self.errors(key):
            answer = self._get(key)
            if answer is None:
                return None
            if answer["ContentLength"] > READ_BYTES:
                raise InputError(Problem(self._name(key), f"more than {READ_BYTES} bytes", "a smaller file"))
            return bytes(answer["Body"].read())

    def write(self, key: str, data: bytes) -> None:
        with self.errors(key):
            self.client.put_object(**self._at(key), Body=data)

    def create(self, key: str, data: bytes) -> bool:
        with self.errors(key):
            for _ in range(_ATTEMPTS):
                try:
                    self.client.put_object(**self._at(key), Body=data, IfNoneMatch="*")
                    return True
                except ClientError as error:
                    if _code(error) == "ConditionalRequestConflict":
                        continue  # another writer is at it at this moment; asked again, the store names the winner
                    if _code(error) not in _EXISTS:
                        raise
                    # When an answer was lost and the request sent again, the winner may be this very writer.
                    sent_again = error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                    return sent_again and self.read(key) == data
        raise ProviderError(Problem(self._name(key), "other writers are at it all the time", "try again"))

    def holds(self, key: str, path: Path) -> bool:
        with disk_errors(path), self.errors(key):
            if not path.is_file():
                return False
            size = path.stat().st_size
            head = self._head(key)
            if head is None or head["ContentLength"] != size:
                return False
            with path.open("rb") as file:
                return self._has(key, head, composite_sha256(chunks(file), part_bytes_of(size)))

    def put_file(self, path: Path, key: str, *, progress: Progress | None = None) -> None:
        require_file(path)
        if self.holds(key, path):
            return report(progress, path.stat().st_size)
        with disk_errors(path), self.errors(key):
            checksum = self._upload(path, key, progress)
            head = self._head(key)
            if head is None or not self._has(key, head, checksum):
                want = "the connection or the store damages data; try again"
                raise VerificationFailed(Problem(self._name(key), "not the bytes that were sent", want))

    def get_file(self, key: str, path: Path, *, sha256: str | None = None, progress: Progress | None = None) -> None:
        with disk_errors(path), self.errors(key), unfinished(path) as temporary:
            with temporary.open("xb") as file:
                got = self._download(key, file, progress)
            require_sha256(self._name(key), got, sha256)
            if sha256 is None and not self.holds(key, temporary):
                raise VerificationFailed(Problem(self._name(key), "not the bytes that the store holds", "try again"))
            replace_durably(temporary, path)

    def keys(self, folder: str = "") -> list[str]:
        start = self.prefix + (f"{checked(folder)}/" if folder else "")
        with self.errors(folder):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
            found = [item["Key"].removeprefix(self.prefix) for page in pages for item in page.get("Contents", ())]
        return sorted(key for key in found if shown(key))

    def folders(self) -> list[str]:
        with self.errors(""):
            paginator = self.client.get_paginator("list_objects_v2")
            pages = paginator.paginate(Bucket=self.bucket, Prefix=self.prefix, Delimiter="/")
            found = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())]
        names = (name.removeprefix(self.prefix).rstrip("/") for name in found)
        return sorted(name for name in names if shown(name))

    def _upload(self, path: Path, key: str, progress: Progress | None) -> str:
        """Sends the file and returns its checksum. Checkpoints are tagged: the bucket's lifecycle removes them."""
        if self._knows_tags and "checkpoints" in key.split("/"):
            try:
                return self._send(path, key, {"Tagging": CHECKPOINT_TAG}, progress)
            except ClientError as error:
                if _code(error) not in _NO_TAGS:
                    raise
                self._knows_tags = False
        return self._send(path, key, {}, progress)

    def _send(self, path: Path, key: str, tag: dict[str, str], progress: Progress | None) -> str:
        if path.stat().st_size > PART_BYTES:
            return upload_in_parts(self.client, self._at(key), tag, path, progress)
        data = path.read_bytes()
        self.client.put_object(**self._at(key), **tag, Body=data)
        report(progress, len(data))
        return composite_sha256([data], part_bytes_of(len(data)))

    def _get(self, key: str) -> dict[str, Any] | None:
        try:
            return dict(self.client.get_object(**self._at(key)))
        except ClientError as error:
            if _code(error) in _MISSING:
                return None
            raise

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            return dict(self.client.head_object(**self._at(key), ChecksumMode="ENABLED"))
        except ClientError as error:
            if _code(error) in _MISSING:
                return None
            raise

    def _has(self, key: str, head: dict[str, Any], checksum: str) -> bool:
        """Whether the object has this composite checksum: the store's word where it gives one, else by reading it."""
        size = head["ContentLength"]
        if str(head.get("ChecksumSHA256", "")).partition("-")[0] == checksum:
            return True
        answer = self._get(key)
        return answer is not None and composite_sha256(chunks(answer["Body"]), part_bytes_of(size)) == checksum

    def _download(self, key: str, file: BinaryIO, progress: Progress | None) -> str:
        """Writes the object into `file` and returns its SHA-256; a broken connection is taken up where it broke."""
        answer = self._get(key)
        if answer is None:
            raise NotFound(Problem(self._name(key), "no such file", "see what there is with `lorry jobs`"))
        digest, size = hashlib.sha256(), answer["ContentLength"]
        for attempt in range(_ATTEMPTS):
            if attempt:
                span = f"bytes={file.tell()}-"
                answer = self.client.get_object(**self._at(key), Range=span, IfMatch=answer["ETag"])
            try:
                for chunk in chunks(answer["Body"]):
                    file.write(chunk)
                    digest.update(chunk)
                    report(progress, len(chunk))
            except (HTTPClientError, IncompleteReadError):
                if attempt + 1 == _ATTEMPTS or file.tell() >= size:
                    raise
                continue
            break
        return digest.hexdigest()

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + checked(key)}

    def _name(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    @contextmanager
    def errors(self, key: str) -> Iterator[None]:
        """Turns every answer and failure of S3 into a sentence."""
        where = self._name(key)
        try:
            yield
        except ClientError as error:
            code = _code(error)
            kind: type[LorryError] = NotFound if code in {"NoSuchBucket", "NoSuchKey"} else ProviderError
            got = f"{code} ({error.response['Error'].get('Message', 'no reason given')})"
            raise kind(
                Problem(where, got, _ADVICE.get(code, "try again; if it stays, ask the store's provider"))
            ) from None
        except (NoCredentialsError, PartialCredentialsError):
            want = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            raise ProviderError(Problem(where, "no credentials", want)) from None
        except ParamValidationError as error:
            raise InputError(Problem(where, _one_line(error), "s3://bucket/prefix with a real bucket name")) from None
        except BotoCoreError as error:
            raise ProviderError(Problem(where, _one_line(error), "check the network and AWS_ENDPOINT_URL")) from None


def _code(error: ClientError) -> str:
    return str(error.response["Error"].get("Code", "an error without a code"))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
