"""vLLM behind a Runpod serverless endpoint: its adapters are the list LORA_MODULES, which a worker reads at its start.

with RunpodVllm(runpod, "ep1", store, url, key, "ann", time.time, time.sleep) as vllm: vllm.load("bicycle-1", path)

A runtime load would reach one worker only. So the list is changed, and every worker is replaced: what the endpoint
shall be is recorded first, then list and drain go to Runpod in one PATCH, then the workers come back. Whoever comes
next, after a kill at any moment, brings it to the same end; `restore` alone is what `lorry tick` does. An endpoint
found at zero comes back with one worker or more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from recipes.serving import EndpointState
from scripts.backends.runpod_api import RunpodApi
from scripts.errors import Conflict, NotFound, Problem, ProviderError, VerificationFailed
from scripts.serving.client import Offer, Vllm
from scripts.store import Store, open_store
from scripts.store.erase import erase

FOLDER = "_endpoints"
"In the root store: the clients of a front door share an endpoint."
MODULES = "LORA_MODULES"
DRAIN_SECONDS = 900.0
"A worker that has not gone by then answers with the old list for a while; serving nobody would be worse."
START_SECONDS = 3600.0
"A worker loads 160 GB from a volume before it says a word."
PAUSE_SECONDS = 5.0
_TRIES = 20
_CLIENT_JOBS = re.compile(r"(.*)/clients/[^/]+/jobs")
_OPENAI = "https://api.runpod.ai/v2/{}/openai"


def openai_url(endpoint: str) -> str:
    """Where an endpoint's worker image answers OpenAI's routes, without the /v1."""
    return _OPENAI.format(endpoint)


class RunpodVllm(Vllm):
    """The same client, whose load and unload change the endpoint. store: of the jobs; states lie in its root."""

    ready_seconds = START_SECONDS

    def __init__(
        self,
        runpod: RunpodApi,
        endpoint: str,
        store: Store,
        url: str,
        key: str,
        by: str,
        now: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        super().__init__(url, key)
        self._runpod, self._endpoint, self._by, self._now, self._sleep = runpod, endpoint, by, now, sleep
        self._store = root_of(store)

    def models(self) -> dict[str, str | None]:
        """As the server says; where all workers sleep, the first question wakes one, and is asked until it answers."""
        give_up = self._now() + self.ready_seconds
        while True:
            try:
                return super().models()
            except ProviderError:
                if self._now() > give_up:
                    raise
                self._sleep(PAUSE_SECONDS)

    def offer(self) -> Offer:
        """From the endpoint's environment, and the memory of the smallest GPU that it may get."""
        shown = read_endpoint(self._runpod, self._endpoint)
        env, gpu = shown["env"], shown.get("gpu") or {}
        sizes = [row["memory"] for row in self._runpod.serverless_gpus() if row["pool"] in gpu.get("pools", ())]
        return Offer(
            lora=env.get("ENABLE_LORA", "").lower() == "true",
            max_lora_rank=_number(env.get("MAX_LORA_RANK"), 16),  # vLLM's own defaults
            max_loras=_number(env.get("MAX_LORAS"), 1),
            gpu_gib=min(sizes) * gpu.get("count", 1) if sizes else None,
        )

    def load(self, name: str, path: str) -> None:
        """Puts the adapter on the list and replaces the workers. Raises ProviderError, NotFound, Conflict."""
        self._become(lambda modules: {**modules, name: path})

    def unload(self, name: str) -> None:
        """Takes the adapter off the list. Workers are not replaced for it: the next change does that."""
        shown = read_endpoint(self._runpod, self._endpoint)
        if name in modules_of(shown):
            record(self._store, shown, lambda modules: _without(modules, [name]), self._by, self._now())
            apply_list(self._runpod, self._store, self._endpoint)

    def names(self) -> list[str]:
        """What is on the list; no worker is woken for it."""
        return list(modules_of(read_endpoint(self._runpod, self._endpoint)))

    def forget(self, names: Sequence[str]) -> None:
        """Takes adapters off the list for good: no worker holds them afterwards, and no older state names them."""
        self._become(lambda modules: _without(modules, names))
        state = newest_state(self._store, self._endpoint)
        if state is not None:
            erase(f"{self._store.url}/{FOLDER}/{self._endpoint}")
            write_state(self._store, state)

    def _become(self, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
        shown = read_endpoint(self._runpod, self._endpoint)
        record(self._store, shown, change, self._by, self._now())
        drain(self._runpod, self._store, self._endpoint)
        while not restore(self._runpod, self._store, self._endpoint, self._now()):
            self._sleep(PAUSE_SECONDS)


def root_of(store: Store) -> Store:
    """The store that a client's store of jobs lies in; any other store itself."""
    of_a_client = _CLIENT_JOBS.fullmatch(store.url)
    return open_store(of_a_client[1]) if of_a_client else store


def endpoint_ids(store: Store) -> list[str]:
    """Every endpoint whose list was ever changed from this store."""
    return sorted({key.split("/")[1] for key in store.keys(FOLDER)})


def newest_state(store: Store, endpoint: str) -> EndpointState | None:
    """What the endpoint shall be. Raises VerificationFailed when that is damaged."""
    keys = store.keys(f"{FOLDER}/{endpoint}")
    if not keys:
        return None
    try:
        return EndpointState.model_validate_json(store.read(keys[-1]) or b"")
    except ValueError:
        raise VerificationFailed(Problem(f"{store.url}/{keys[-1]}", "not the state of an endpoint")) from None


def write_state(store: Store, state: EndpointState) -> bool:
    """Writes the state under its number; whether nobody was faster."""
    data = state.model_dump_json(indent=2).encode() + b"\n"
    return store.create(f"{FOLDER}/{state.endpoint}/{state.number:08d}.json", data)


def record(
    store: Store, shown: dict[str, Any], change: Callable[[dict[str, str]], dict[str, str]], by: str, now: float
) -> EndpointState:
    """Writes what the endpoint shall be: the newest state, changed. A number is created once: no change is lost."""
    endpoint = str(shown["id"])
    for _ in range(_TRIES):
        before = newest_state(store, endpoint)
        modules = before.modules if before else modules_of(shown)
        workers = shown["workers"] if shown["workers"]["max"] else {}  # zero: it is being drained, or was left so
        least = workers.get("min", before.workers_min if before else 0)
        most = max(1, workers.get("max", before.workers_max if before else 1))
        state = EndpointState(
            number=before.number + 1 if before else 1,
            endpoint=endpoint,
            modules=change(modules),
            workers_min=least,
            workers_max=most,
            by=by,
            at=now,
        )
        if write_state(store, state):
            return state
    raise Conflict(Problem(f"endpoint {endpoint}", "others change it all the time", "try again"))


def apply_list(runpod: RunpodApi, store: Store, endpoint: str, *, drained: bool = False) -> None:
    """Makes the list what it shall be; with `drained` also ends all workers, in the same request.

    The whole environment is sent, since Runpod replaces it; secrets stand there as references.
    """
    want = newest_state(store, endpoint)
    shown = read_endpoint(runpod, endpoint)
    if want is None or modules_of(shown) == want.modules:
        return
    listed = [{"name": name, "path": path} for name, path in want.modules.items()]
    body: dict[str, Any] = {"env": {**shown["env"], MODULES: json.dumps(listed)}}
    if drained:
        body["workers"] = {"min": 0, "max": 0}
    runpod.change("serverless", endpoint, body)


def drain(runpod: RunpodApi, store: Store, endpoint: str) -> None:
    """Changes the list and ends the workers that read the old one."""
    apply_list(runpod, store, endpoint, drained=True)


def restore(runpod: RunpodApi, store: Store, endpoint: str, now: float) -> bool:
    """Gives a drained endpoint its workers back, once the old ones are gone or are late; whether it has them."""
    want = newest_state(store, endpoint)
    shown = runpod.read("serverless", endpoint)
    if want is None or shown is None or shown["workers"]["max"] > 0:
        return True
    if now - want.at < DRAIN_SECONDS and runpod.workers(endpoint)["summary"]["total"] > 0:
        return False
    drain(runpod, store, endpoint)  # a newer state than the one that was drained for
    runpod.change("serverless", endpoint, {"workers": {"min": want.workers_min, "max": want.workers_max}})
    return True


def read_endpoint(runpod: RunpodApi, endpoint: str) -> dict[str, Any]:
    """The endpoint as Runpod shows it. Raises NotFound."""
    shown = runpod.read("serverless", endpoint)
    if shown is None:
        raise NotFound(Problem(f"endpoint {endpoint}", "Runpod knows none of that id", "see `lorry env ROOT`"))
    return shown


def modules_of(shown: dict[str, Any]) -> dict[str, str]:
    """Name -> path of LORA_MODULES. Raises VerificationFailed for what is no such list."""
    text = (shown.get("env") or {}).get(MODULES) or "[]"
    try:
        return {str(module["name"]): str(module["path"]) for module in json.loads(text)}
    except (ValueError, TypeError, KeyError):
        raise VerificationFailed(Problem(MODULES, ascii(text[:120]), 'a JSON list of {"name", "path"}')) from None


def _without(modules: dict[str, str], names: Sequence[str]) -> dict[str, str]:
    return {name: path for name, path in modules.items() if name not in names}


def _number(text: str | None, usual: int) -> int:
    return int(text) if text and text.isdecimal() else usual
