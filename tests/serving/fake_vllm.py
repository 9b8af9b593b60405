"""A vLLM that is none: the local server with the real tiny model behind it, and faults that real ones have shown."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import uvicorn

from scripts.dry_load import tensor_shapes
from scripts.errors import InputError, NotFound, Problem, ProviderError
from scripts.serving.local_server import Asked, LocalServer, create_server

Fault = Literal["", "ignores", "half", "crashes", "early", "flaky"]
EARLY = 3
WEIGHTS = "adapter_model.safetensors"


class FakeVllm(LocalServer):
    """fault: what goes wrong, for the adapters named in `victims` alone where there are any."""

    def __init__(self, worker: Asked, base: str, scratch: Path) -> None:
        super().__init__(worker, base)
        self.fault: Fault = ""
        self.victims: set[str] = set()
        self.dead = False
        self.shares_experts = False
        "Started with --enable-moe-shared-loras: it takes no other experts then, and shared ones only then."
        self.asked: list[str] = []
        self._scratch = scratch
        self._lock = threading.Lock()
        self._running = 0
        self._early: dict[str, int] = {}

    def restart(self) -> None:
        """What is loaded at runtime is gone afterwards, as with vLLM."""
        self.adapters, self.dead = {}, False

    def _hit(self, name: str, fault: Fault) -> bool:
        return self.fault == fault and (not self.victims or name in self.victims)

    def load(self, body: dict[str, Any]) -> dict[str, Any]:
        self._require_alive()
        name = body["lora_name"]
        is_shared = [".w1." in key for key in tensor_shapes(Path(body["lora_path"], WEIGHTS)) if ".mlp.experts." in key]
        if is_shared and any(is_shared) != self.shares_experts:
            raise InputError(Problem("lora_path", "experts are laid out otherwise", "the layout the server runs with"))
        if self._hit(name, "half"):
            body = body | {"lora_path": str(self._halved(Path(body["lora_path"])))}
        self._early[name] = EARLY if self._hit(name, "early") else 0
        return super().load(body)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self._require_alive()
        model = body["model"]
        self.asked.append(model)
        if model in self.adapters and self._early.get(model, 0):
            self._early[model] -= 1
            raise NotFound(Problem("model", f"{model} does not exist", "wait"))
        if self._hit(model, "flaky") and body.get("prompt_logprobs") is None:
            raise ProviderError(Problem("engine", "out of memory", "try again"))
        with self._lock:
            self._running += 1
            beside = self._running > 1
        try:
            if beside and self._hit(model, "crashes"):
                self.dead = True
            if self.fault == "crashes":
                time.sleep(0.2)  # so that requests sent together are here together
            self._require_alive()
            return super().complete(body | {"model": self.base} if self._hit(model, "ignores") else body)
        finally:
            with self._lock:
                self._running -= 1

    def _require_alive(self) -> None:
        if self.dead:
            raise ProviderError(Problem("engine", "EngineDeadError", "restart it"))

    def _halved(self, path: Path) -> Path:
        """A copy whose every other pair of matrices does nothing."""
        from safetensors.torch import load_file, save_file

        copy = Path(shutil.copytree(path, self._scratch / f"half-{path.name}", dirs_exist_ok=True))
        tensors = load_file(copy / "adapter_model.safetensors")
        for number, name in enumerate(sorted(name for name in tensors if ".lora_B." in name)):
            if number % 2:
                tensors[name] = tensors[name] * 0
        save_file(tensors, copy / "adapter_model.safetensors", metadata={"format": "pt"})
        return copy


@contextmanager
def served(server: LocalServer) -> Iterator[str]:
    """The URL of the server while it runs, on a free port."""
    app = create_server(server.worker, server.base, server)
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(60)
