"""The worker of a serverless queue: the same container as in a Pod, once per queue job, ended when that is cancelled.

python -m scripts.worker          # what the trainer image runs where Runpod starts it for an endpoint

It takes what the front door's /run takes and answers what its /status answers; see queue_order and queue_outcome. What
a job did stands in its job folder; Runpod's own answers are a copy that it forgets after 30 minutes.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from recipes.job import Stop
from scripts.container.pod_end import require_filled
from scripts.container.supervisor import end_leftovers, start_child
from scripts.errors import Conflict, LorryError, Problem
from scripts.gateway.views import Json, progress
from scripts.job_folder import read_job
from scripts.queue_order import Order, WorkerSettings, order_of, read_worker_settings
from scripts.queue_outcome import look_at, output_of

Tell = Callable[[Json, Json], None]
"(queue job, progress): the `progress_update` of the runpod package, which sends it from a thread of its own."
ENDED_ON_THE_QUEUE = "the queue ended it: it was cancelled there, or took longer than its queue job may"
_OLD_SECONDS = 600.0
_KEPT = ("RUNPOD_POD_ID", "RUNPOD_ENDPOINT_ID", "RUNPOD_GPU_COUNT", "RUNPOD_VOLUME_ID")


@dataclass(frozen=True)
class QueueWorker:
    """Trains what the queue hands it. grace: from the word to end to the kill; silent: after so long without a new word
    another machine's container counts as dead; patience: how long it is waited for. In seconds."""

    environment: Mapping[str, str]
    tell: Tell
    module: str = "scripts.container"
    poll: float = 1.0
    tell_every: float = 10.0
    grace: float = 90.0
    silent: float = 30.0
    patience: float = 600.0

    async def handler(self, job: Json) -> Json:
        """The output of one queue job.

        A failure is raised up to here and leaves as `error`: the runpod package makes FAILED of that as of what is
        raised, but keeps the sentence as it is. Whatever nobody foresaw is raised on.
        """
        try:
            return await self._train(job)
        except LorryError as error:
            return {"error": str(error)}

    async def _train(self, job: Json) -> Json:
        require_filled(self.environment)
        settings = read_worker_settings(self.environment)
        preparing = asyncio.create_task(asyncio.to_thread(order_of, job, settings, time.time))
        try:
            order = await asyncio.shield(preparing)
            if order.superseded:
                return {"job_id": order.job_id, "superseded": True, "message": "another request trains this job"}
            if not await asyncio.to_thread(order.has_ended):
                await self._until_alone(order)
                await self._contain(job, order, settings)
        except asyncio.CancelledError:
            with suppress(LorryError):
                await asyncio.to_thread(_record_end, await preparing)
            raise
        look = await asyncio.to_thread(look_at, order, settings.client, time.time())
        return await asyncio.to_thread(output_of, look, time.time())

    async def _until_alone(self, order: Order) -> None:
        """Waits while the container of another worker still writes: Runpod may hand a job on before its worker is dead.

        Raises Conflict when it does not fall silent.
        """
        give_up, moved_at, seen = time.monotonic() + self.patience, time.monotonic(), -1.0
        while container := (await asyncio.to_thread(read_job, order.store, order.job_id)).container:
            if container.updated_at != seen:
                seen, moved_at = container.updated_at, time.monotonic()
            is_old = time.time() - seen > _OLD_SECONDS
            if container.ended or is_old or time.monotonic() - moved_at > self.silent:
                return
            if time.monotonic() > give_up:
                raise Conflict(Problem(f"job {order.job_id}", "another machine is at work on it", "let it finish"))
            await asyncio.sleep(self.poll)

    async def _contain(self, job: Json, order: Order, settings: WorkerSettings) -> None:
        """Runs the container to its end, and tells how it goes. When this task is cancelled, the container is told to
        end, and what is left of it is killed."""
        work = Path("jobs", order.job_id).resolve()
        child = start_child(self._command(order, work), self._environment(), None, work)
        senders: list[threading.Thread] = []
        try:
            told_at = time.monotonic()
            while child.poll() is None:
                await asyncio.sleep(self.poll)
                if child.poll() is None and time.monotonic() - told_at >= self.tell_every:
                    told_at = time.monotonic()
                    senders = [*filter(threading.Thread.is_alive, senders), *await self._told(job, order, settings)]
        finally:
            await asyncio.shield(asyncio.to_thread(self._end, child, work, order))
            for sender in senders:  # progress that comes after the result would take its place
                await asyncio.to_thread(sender.join, 30.0)

    async def _told(self, job: Json, order: Order, settings: WorkerSettings) -> list[threading.Thread]:
        """Sends the progress; the threads that do it."""
        try:
            view = progress(await asyncio.to_thread(look_at, order, settings.client, time.time()))
        except LorryError:  # the store is silent; the next turn tells more
            return []
        before = set(threading.enumerate())
        self.tell(job, view)
        return [thread for thread in threading.enumerate() if thread not in before]

    def _end(self, child: subprocess.Popen[bytes], work: Path, order: Order) -> None:
        """Sees the container off: one that has ended already, or one whose queue job is ended before it."""
        if child.poll() is None:
            with suppress(LorryError):
                _record_end(order)
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(self.grace)
        end_leftovers(work)
        child.wait()

    def _command(self, order: Order, work: Path) -> list[str]:
        where = ["--store", order.store.url, "--job", order.job_id, "--work", str(work)]
        return [sys.executable, "-m", self.module, *where]

    def _environment(self) -> dict[str, str]:
        """The worker's own, without the keys and addresses by which it speaks to the queue."""
        return {k: v for k, v in self.environment.items() if k in _KEPT or not k.startswith("RUNPOD_")}


def main() -> None:
    """Hands the worker to the loop of the runpod package, which speaks to the queue until it is told to end."""
    # Its usual level prints every output, and with it links that are keys for an hour. It is read at import.
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
    import runpod  # type: ignore[import-untyped]

    worker = QueueWorker(os.environ, runpod.serverless.progress_update)
    runpod.serverless.start({"handler": worker.handler})


def _record_end(order: Order) -> None:
    """Why the container is told to end, unless a stop says so already: without it the job would count as lost."""
    stop = Stop(by="operator", reason=ENDED_ON_THE_QUEUE, at=time.time())
    if not order.superseded and not order.has_ended():
        order.store.create(f"{order.job_id}/stop.json", stop.model_dump_json(indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
