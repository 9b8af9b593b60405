"""GitHub, as a step of a workflow with `id-token: write` asks it who the workflow is.

with serve_github() as environment: httpx.get(environment["ACTIONS_ID_TOKEN_REQUEST_URL"] + "&audience=...", ...)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "CANARY-identity"


@contextmanager
def serve_github(asked: list[str] | None = None) -> Iterator[dict[str, str]]:
    """Gives the two variables that GitHub sets. It answers to its own key and for AWS alone, and notes what for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            (asked if asked is not None else []).append(self.path)
            knows = self.headers.get("Authorization") == "Bearer key-of-this-run"
            is_for_aws = self.path == "/token?api-version=2.0&audience=sts.amazonaws.com"
            body = json.dumps({"count": 1, "value": TOKEN} if knows and is_for_aws else {"message": "no"}).encode()
            self.send_response(200 if knows and is_for_aws else 403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            """Nothing: a test says what it needs."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield {
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"http://127.0.0.1:{server.server_port}/token?api-version=2.0",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "key-of-this-run",
        }
    finally:
        server.shutdown()
        server.server_close()
