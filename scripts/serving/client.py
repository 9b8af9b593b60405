"""A client of a vLLM server, and of the local server: which models there are, load, unload, and log-probabilities.

with Vllm("http://127.0.0.1:8000") as vllm: vllm.load("bicycle-1", "/adapters/bicycle-1")
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from scripts.errors import InputError, Problem, ProviderError

_SAFE_URL = re.compile(r"^(https://|http://(127\.0\.0\.1|localhost|\[::1\])[:/])[^\s@]+$")
_TIMEOUT = httpx.Timeout(300.0, connect=10.0)
"Loading an adapter of 512 experts takes minutes."


@dataclass(frozen=True)
class Offer:
    """What a server was started with, as far as it can be known; None is unknown."""

    lora: bool | None = None
    "Whether it takes adapters at all."
    max_lora_rank: int | None = None
    max_loras: int = 1
    gpu_gib: float | None = None
    "All the memory of its GPUs."


class NoAnswer(ProviderError):
    """Nobody is there, or the line is cut."""


class Vllm:
    """One server. key: its own API key, sent as a bearer; it appears in no message."""

    ready_seconds = 900.0
    "Servers call themselves ready long before they are."

    def __init__(self, url: str, key: str = "") -> None:
        if not _SAFE_URL.match(url + "/"):
            raise InputError(Problem("server", ascii(url[:120]), "https://host, or http:// on this machine"))
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=_TIMEOUT)

    def __enter__(self) -> Vllm:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> dict[str, str | None]:
        """Name -> name of the base for an adapter, None for a base model."""
        return {str(m["id"]): m.get("parent") for m in self._ask("GET", "/v1/models").get("data", [])}

    def names(self) -> list[str]:
        """The adapters that are loaded."""
        return [name for name, base in self.models().items() if base is not None]

    def forget(self, names: Sequence[str]) -> None:
        """Unloads adapters for good."""
        for name in names:
            self.unload(name)

    def offer(self) -> Offer:
        """vLLM's own document lists the route of loading only where it was started with adapters."""
        try:
            paths = self._ask("GET", "/openapi.json").get("paths")
        except ProviderError:  # a server may hide its document
            return Offer()
        return Offer(lora="/v1/load_lora_adapter" in paths) if isinstance(paths, dict) else Offer()

    def load(self, name: str, path: str) -> None:
        """Loads an adapter at runtime, in the place of one of that name. Raises ProviderError."""
        body = {"lora_name": name, "lora_path": path, "load_inplace": True}
        self._ask("POST", "/v1/load_lora_adapter", body, LOADING)

    def unload(self, name: str) -> None:
        """Unloads an adapter; one that is not there is no failure."""
        if name in self.models():
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, LOADING)

    def log_probabilities(self, model: str, ids: Sequence[int]) -> list[float | None]:
        """Per token of the prompt its log-probability given those before; None for the first."""
        body = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        choice = self._ask("POST", "/v1/completions", body)["choices"][0]
        said = choice.get("prompt_logprobs")
        if not isinstance(said, list) or len(said) != len(ids):
            want = "vLLM 0.33 or later, or lorry's own server"
            raise ProviderError(Problem(self.url, "it gives no log-probabilities of the prompt", want))
        return [
            None if row is None else float(row[str(token)]["logprob"]) for row, token in zip(said, ids, strict=True)
        ]

    def answers(self, model: str, ids: Sequence[int]) -> bool:
        """Whether one real request is answered: with a token, and no error."""
        body = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0}
        try:
            said = self._ask("POST", "/v1/completions", body)
        except ProviderError:
            return False
        return bool(said.get("choices")) and (said.get("usage") or {}).get("completion_tokens", 0) > 0

    def _ask(self, method: str, path: str, body: Any = None, want: str = "look at the server") -> dict[str, Any]:
        try:
            reply = self._http.request(method, self.url + path, json=body)
        except httpx.HTTPError as error:
            raise NoAnswer(Problem(self.url + path, type(error).__name__, "start the server, or wait")) from None
        if reply.status_code >= 400:
            said = " ".join(reply.text.split())[:300]
            raise ProviderError(Problem(self.url + path, f"HTTP {reply.status_code} ({said})", want))
        try:
            value = reply.json()
        except ValueError:  # vLLM answers a load with a sentence
            return {}
        return value if isinstance(value, dict) else {}


LOADING = "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
