"""The client of a place: a server that loads at runtime, or a Runpod endpoint whose list is changed.

with connect(place, store, os.environ, "ann", time.time, time.sleep) as vllm: vllm.models()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from recipes.serving import Place
from scripts.backends.runpod_api import RunpodApi
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
    answers_key = key or environment.get("RUNPOD_API_KEY", "")
    return RunpodVllm(RunpodApi.of(environment), place.endpoint, store, place.url, answers_key, by, now, sleep)
