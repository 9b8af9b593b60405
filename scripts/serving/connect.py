"""The client of a place: a server that loads at runtime, or a Runpod endpoint whose list is changed.

with connect(place, store, os.environ, "ann", time.time, time.sleep) as vllm: vllm.models()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from recipes.serving import Place
from scripts.backends.runpod_api import BASE_URL, RunpodApi
from scripts.serving.client import Vllm
from scripts.serving.runpod_endpoint import RunpodVllm
from scripts.store import Store


def connect(
    place: Place,
    store: Store,
    environment: Mapping[str, str],
    by: str,
    now: Callable[[], float],
    sleep: Callable[[float], None],
) -> Vllm:
    """Keys: LORRY_SERVING_KEY for the server; for a Runpod endpoint RUNPOD_API_KEY, and for its answers too where the
    other is not set. Raises InputError for a URL or a key that cannot be one."""
    key = environment.get("LORRY_SERVING_KEY", "")
    if place.endpoint is None:
        return Vllm(place.url, key)
    runpod_key = environment.get("RUNPOD_API_KEY", "")
    runpod = RunpodApi(runpod_key, environment.get("RUNPOD_API_BASE_URL") or BASE_URL)
    return RunpodVllm(runpod, place.endpoint, store, place.url, key or runpod_key, by, now, sleep)
