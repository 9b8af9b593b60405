"""The notice that a spot machine of EC2 will be taken back in two minutes: asked for every few seconds, told once.

watch_interruption(os.environ, lambda: os.kill(os.getpid(), signal.SIGTERM))         # a thread of its own

The metadata service answers 404 until there is a notice (EC2 user guide, spot instance interruption notices), and a
notice that a reservation or a host ends comes through the same path.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping

import httpx

EVERY_SECONDS = 5.0
_SERVICE = "http://169.254.169.254"
_NOTICE = "/latest/meta-data/spot/instance-action"
_TOKEN, _TOKEN_SECONDS = "/latest/api/token", "21600"


def watch_interruption(
    environment: Mapping[str, str], tell: Callable[[], None], *, every_seconds: float = EVERY_SECONDS
) -> None:
    """Starts the watch where LORRY_MACHINE is ec2; AWS_EC2_METADATA_SERVICE_ENDPOINT is another place to ask."""
    if environment.get("LORRY_MACHINE") != "ec2":
        return
    base = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _SERVICE

    def watch() -> None:
        while not is_noticed(base):
            time.sleep(every_seconds)
        print("EC2 takes this machine back in two minutes; it saves and ends", file=sys.stderr, flush=True)
        tell()

    threading.Thread(target=watch, daemon=True).start()


def is_noticed(base: str) -> bool:
    """Whether there is a notice now; a service that does not answer has given none."""
    try:
        with httpx.Client(base_url=base, timeout=2.0, trust_env=False) as service:
            token = service.put(_TOKEN, headers={"X-aws-ec2-metadata-token-ttl-seconds": _TOKEN_SECONDS})
            return service.get(_NOTICE, headers={"X-aws-ec2-metadata-token": token.text}).status_code == 200
    except httpx.HTTPError:
        return False
