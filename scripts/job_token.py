"""The token a rented machine shows at the front door: which job of which client it works on, and until when.

token = make_token("bicycle-1", "acme", expires=1_790_000_000, secret=secret); read_token(token, secret, now)

The secret (LORRY_TOKEN_SECRET) stays on the front door's side. A token opens the routes /machines/<job id>/ alone.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass

from recipes.errors import InputError, Problem
from recipes.job import JOB_ID

CLIENT_NAME = re.compile(r"[a-z0-9-]{2,32}")
SHORTEST_SECRET = 16
KEYS_SECONDS = 12 * 3600
"The longest for which AWS gives session keys. A machine with a token renews its own; one without ends by then."

SPARE_SECONDS = 3600
"For which a token outlives its machine's deadline: the end must be asked for too."

_STORE = re.compile(rf".*/clients/({CLIENT_NAME.pattern})/jobs/?")


@dataclass(frozen=True)
class Claim:
    """What a token proves. expires: seconds since 1970."""

    job_id: str
    client: str
    expires: int


def make_token(job_id: str, client: str, expires: int, secret: str) -> str:
    """`job.client.expires.signature`. Raises InputError for a secret that could be guessed."""
    if len(secret) < SHORTEST_SECRET:
        raise InputError(Problem("LORRY_TOKEN_SECRET", "missing or too short", f"{SHORTEST_SECRET} characters or more"))
    return f"{job_id}.{client}.{expires}.{signature(f'{job_id}|{client}|{expires}', secret)}"


def machine_token(store: str, job_id: str, deadline: int, secret: str) -> str:
    """The token of a machine that may run until `deadline` (unix seconds); empty without a client or a secret."""
    client = client_of(store)
    return make_token(job_id, client, deadline + SPARE_SECONDS, secret) if client and secret else ""


def door_variables(front_door: str, job_id: str, token: str) -> dict[str, str]:
    """What a machine needs to renew its keys of the store at the front door; boto3 reads the first two by itself."""
    return {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{front_door}/machines/{job_id}/credentials",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": token,
        "LORRY_JOB_TOKEN": token,
    }


def read_token(token: str, secret: str, now: float) -> Claim | None:
    """The claim of a token that this secret signed and that has not expired; None for any other text."""
    parts = token.split(".")
    if len(secret) < SHORTEST_SECRET or len(parts) != 4 or not token.isascii():
        return None
    job_id, client, expires, signed = parts
    if not (JOB_ID.fullmatch(job_id) and CLIENT_NAME.fullmatch(client) and re.fullmatch(r"[0-9]{1,12}", expires)):
        return None
    is_ours = hmac.compare_digest(signature(f"{job_id}|{client}|{expires}", secret), signed)
    return Claim(job_id, client, int(expires)) if is_ours and now < int(expires) else None


def client_of(store_url: str) -> str | None:
    """The client whose jobs a store holds (`.../clients/<client>/jobs`); None for a store of the terminal."""
    found = _STORE.fullmatch(store_url)
    return found.group(1) if found else None


def signature(text: str, secret: str) -> str:
    """HMAC-SHA256 of the text, as hex."""
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()
