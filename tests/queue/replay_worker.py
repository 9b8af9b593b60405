"""What `scripts.worker` does, with the replay trainer and short timings: python -m tests.queue.replay_worker"""

from __future__ import annotations

import os

import runpod

from scripts.worker import QueueWorker

if __name__ == "__main__":
    worker = QueueWorker(
        os.environ,
        runpod.serverless.progress_update,
        module="tests.runpod.replay_pod",
        poll=0.1,
        tell_every=0.2,
        grace=20.0,
        silent=3.0,
    )
    runpod.serverless.start({"handler": worker.handler})
