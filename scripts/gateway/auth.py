"""Which client a request is from: a bearer key, or the same key as X-Lorry-Key where a platform wants Authorization.

client = authenticated(request.headers, clients)
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from scripts.errors import LorryError, Problem
from scripts.gateway.clients import Client

_WHERE = "Authorization"


class Unauthorized(LorryError):
    """No key, or one that is nobody's."""

    code = "unauthorized"


def authenticated(headers: Mapping[str, str], clients: Mapping[str, Client]) -> Client:
    """The client whose key the headers carry. Raises Unauthorized.

    Hashes are compared, each of them, in constant time: neither how much of a key is right nor whose it is shows.
    """
    key = headers.get("x-lorry-key", "").strip() or bearer(headers)
    if not key:
        want = "send the client's key as `Authorization: Bearer KEY` or `X-Lorry-Key: KEY`"
        raise Unauthorized(Problem(_WHERE, "no key", want))
    digest = hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
    found = [c for c in clients.values() if any([hmac.compare_digest(digest, known) for known in c.key_sha256])]
    if not found:
        raise Unauthorized(Problem(_WHERE, "not the key of any client", "the key that this front door was given"))
    return found[0]


def bearer(headers: Mapping[str, str]) -> str:
    """The text after `Bearer`; an Authorization without that word counts as the key itself."""
    text = headers.get("authorization", "").strip()
    scheme, _, rest = text.partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else "" if rest else text
