"""Links to the files of an adapter that need no key: S3's own presigned URLs, or the front door's for a store on disk.

adapter_links(room, "bicycle-1", files=("adapter_model.safetensors",), base_url, secret, now)

Each look at a finished job makes them anew, so they work whenever they are asked for.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from scripts.gateway.door import Room
from scripts.job_token import signature
from scripts.store import FileStore

LINK_SECONDS = 3600


def adapter_links(
    room: Room, job_id: str, names: Iterable[str], *, base_url: str, secret: str, now: float
) -> dict[str, str]:
    """File name -> URL that gives the file to whoever holds it, for an hour."""
    keys = {name: f"{job_id}/adapter/{name}" for name in names}
    if isinstance(room.jobs, FileStore):
        expires = int(now) + LINK_SECONDS
        return {name: _own_link(base_url, room.client.name, key, expires, secret) for name, key in keys.items()}
    store: Any = room.jobs
    return {
        name: _s3().generate_presigned_url(
            "get_object", Params={"Bucket": store.bucket, "Key": store.prefix + key}, ExpiresIn=LINK_SECONDS
        )
        for name, key in keys.items()
    }


def is_signed(client: str, key: str, expires: str, signed: str, secret: str, now: float) -> bool:
    """Whether this is a link the front door gave out and that has not expired."""
    if not (expires.isdigit() and len(expires) <= 12 and signed.isascii()):
        return False
    return hmac.compare_digest(signature(_text(client, key, int(expires)), secret), signed) and now < int(expires)


def _own_link(base_url: str, client: str, key: str, expires: int, secret: str) -> str:
    signed = signature(_text(client, key, expires), secret)
    return f"{base_url}/files/{client}/{quote(key)}?expires={expires}&signature={signed}"


def _text(client: str, key: str, expires: int) -> str:
    return f"file|{client}|{key}|{expires}"


@lru_cache(maxsize=1)
def _s3() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(signature_version="s3v4"))
