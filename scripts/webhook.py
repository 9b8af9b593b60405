"""A signed message to the client's own address: who sent it, when, and that nobody changed it on the way.

Webhook("https://app.example/api/lorry", secret, httpx.Client()).post("job-1.completed", {...}, now=time.time())

| header | holds |
|---|---|
| Lorry-Delivery | the id of the delivery: the same for every try, so that a receiver can drop what it has seen |
| Lorry-Timestamp | seconds since 1970 of this try |
| Lorry-Signature | sha256= and the HMAC-SHA256 of "timestamp.body" with the secret, as hex |
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from scripts.errors import Problem, ProviderError

TIMEOUT = httpx.Timeout(10.0, connect=5.0)


@dataclass(frozen=True)
class Webhook:
    """Where a client wants to be told, and the secret that signs what it is told."""

    url: str
    secret: str = field(repr=False)
    http: httpx.Client = field(repr=False)

    def post(self, delivery: str, message: Mapping[str, Any], now: float) -> None:
        """One try. Raises ProviderError unless the answer is 2xx; a redirect is not followed."""
        body = json.dumps(message, sort_keys=True, allow_nan=False).encode()
        headers = signed_headers(self.secret, delivery, body, int(now))
        where = f"webhook at {urlsplit(self.url).hostname}"
        try:
            with self.http.stream("POST", self.url, content=body, headers=headers, timeout=TIMEOUT) as response:
                status = response.status_code
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ProviderError(Problem(where, f"no answer ({type(error).__name__})", "see that it is up")) from None
        if not 200 <= status < 300:
            raise ProviderError(Problem(where, f"status {status}", "answer 200 once the message is taken"))


def signed_headers(secret: str, delivery: str, body: bytes, timestamp: int) -> dict[str, str]:
    """The headers of one try. Pure."""
    signature = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
    return {
        "content-type": "application/json",
        "lorry-delivery": delivery,
        "lorry-timestamp": str(timestamp),
        "lorry-signature": f"sha256={signature}",
    }
