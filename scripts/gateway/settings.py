"""What the front door is told by its environment, read once.

settings = read_gateway_settings(os.environ, Path.cwd())
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

from recipes.recipe import BackendName
from scripts.errors import InputError, Problem
from scripts.job_token import SHORTEST_SECRET
from scripts.settings import read_settings

SWITCH = "yes"


@dataclass(frozen=True)
class GatewaySettings:
    """store: URL below which each client has its own. tokenizers: folders to look for tokenizers in."""

    store: str
    tokenizers: tuple[Path, ...]
    token_secret: str
    public_url: str = ""
    "How clients and machines reach this front door; empty takes what each request came to."
    backend: BackendName | None = None
    "Where jobs run; None takes the planner's choice among the recipe's backends."
    serving_url: str = ""
    "Where inference lives, to name it to those who knock at the wrong door."
    allows_loopback: bool = False
    "Test switch: training sets may come from this machine, without TLS."
    trainer_role: str = ""
    session_policy: str = ""
    "Role of one job's machine and its session policy with JOB_PREFIX in it: outputs of infra/modules/artifact-store."


def read_gateway_settings(environment: Mapping[str, str], folder: Path) -> GatewaySettings:
    """Settings from LORRY_STORE, LORRY_TOKEN_SECRET, LORRY_PUBLIC_URL, LORRY_BACKEND, INFERENCE_API_URL,
    LORRY_TRAINER_ROLE, LORRY_SESSION_POLICY, LORRY_ALLOW_LOOPBACK. Raises InputError with every problem."""
    problems = []
    secret, backend = environment.get("LORRY_TOKEN_SECRET", ""), environment.get("LORRY_BACKEND", "")
    public = environment.get("LORRY_PUBLIC_URL", "").rstrip("/")
    if len(secret) < SHORTEST_SECRET:
        want = f"a random text of {SHORTEST_SECRET} characters or more, such as `openssl rand -hex 32` prints"
        problems.append(Problem("LORRY_TOKEN_SECRET", "missing or too short", want))
    if backend and backend not in get_args(BackendName):
        problems.append(Problem("LORRY_BACKEND", repr(backend), "one of " + ", ".join(get_args(BackendName))))
    if public and urlsplit(public).scheme not in ("https", "http"):
        problems.append(Problem("LORRY_PUBLIC_URL", repr(public), "a URL that begins with https://"))
    if problems:
        raise InputError(*problems)
    general = read_settings(environment, folder)
    return GatewaySettings(
        store=general.store,
        tokenizers=general.tokenizers,
        token_secret=secret,
        public_url=public,
        backend=backend or None,  # type: ignore[arg-type]
        serving_url=environment.get("INFERENCE_API_URL", ""),
        allows_loopback=environment.get("LORRY_ALLOW_LOOPBACK") == SWITCH,
        trainer_role=environment.get("LORRY_TRAINER_ROLE", ""),
        session_policy=environment.get("LORRY_SESSION_POLICY", ""),
    )
