"""A bucket for the Pods of the local Runpod, with the limits of Runpod's own S3 API. It needs moto (the `test` extra).

with serve_store("lorry") as url: ...      # AWS_ENDPOINT_URL=url, any keys

Runpod's network volumes take objects of 500 MB at most in one request, sign no URLs and delete one object at a time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs

MOST_BYTES = 500 * 1000**2
_Start = Callable[[str, list[tuple[str, str]]], Any]


@contextmanager
def serve_store(bucket: str, port: int = 0, *, limited: bool = True) -> Iterator[str]:
    """Runs until the block ends, with one empty bucket; all is kept in memory. Raises ImportError without moto.

    limited: what it refuses is what Runpod's S3 API refuses; False is a bucket of AWS, with sessions and signed links.
    """
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    aws = DomainDispatcherApplication(create_backend_app)
    app = Limited(aws) if limited else aws
    server = make_server("127.0.0.1", port, app, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    _make_bucket(url, bucket)
    try:
        yield url
    finally:
        server.shutdown()
        thread.join()


class Limited:
    """Refuses what Runpod's S3 API does not know, in the words of S3; hands on everything else."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def __call__(self, environ: dict[str, Any], start_response: _Start) -> Any:
        refusal = _refusal(environ)
        if refusal is None:
            return self._app(environ, start_response)
        status, code, said = refusal
        body = f"<Error><Code>{code}</Code><Message>{said}</Message></Error>".encode()
        start_response(status, [("content-type", "application/xml"), ("content-length", str(len(body)))])
        return [body]


def _refusal(environ: dict[str, Any]) -> tuple[str, str, str] | None:
    query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    if {"X-Amz-Signature", "Signature"} & set(query):
        return "501 Not Implemented", "NotImplemented", "presigned URLs are not supported"
    if environ["REQUEST_METHOD"] == "POST" and "delete" in query:
        return "501 Not Implemented", "NotImplemented", "DeleteObjects is not supported"
    if environ["REQUEST_METHOD"] == "PUT" and int(environ.get("CONTENT_LENGTH") or 0) > MOST_BYTES:
        return "400 Bad Request", "EntityTooLarge", "at most 500 MB in one request; send parts"
    return None


def _make_bucket(url: str, name: str) -> None:
    import boto3

    keys = {"aws_access_key_id": "local", "aws_secret_access_key": "local", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket=name)
