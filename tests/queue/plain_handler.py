"""Somebody else's handler in the unmodified worker loop: python -m tests.queue.plain_handler [CONCURRENCY | stream]"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import runpod


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    given = job["input"]
    if given.get("boom"):
        raise RuntimeError("it went wrong")
    for step in range(given.get("steps", 1)):
        if step < 3:
            runpod.serverless.progress_update(job, {"step": step})
        await asyncio.sleep(0.1)
    return {"steps": given.get("steps", 1)}


async def stream(job: dict[str, Any]) -> AsyncIterator[dict[str, int]]:
    for step in range(job["input"]["steps"]):
        yield {"step": step}


if __name__ == "__main__":
    mode = sys.argv[1]
    config: dict[str, Any] = {"handler": stream if mode == "stream" else handler}
    if mode.isdigit():
        config["concurrency_modifier"] = lambda current: int(mode)
    sys.argv = [sys.argv[0], "--rp_log_level", "INFO"]
    runpod.serverless.start(config)
