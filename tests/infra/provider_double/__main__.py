"""Starts the stand-in and prints how Terraform reaches it; ends when its standard input closes.

RUNPOD_API_KEY=k RUNPOD_API_BASE_URL=http://127.0.0.1:8080/v2 python -m tests.infra.provider_double --dev
"""

from __future__ import annotations

import os
import sys
import threading

from tf import runner

from tests.infra.provider_double.provider import RunpodProvider


def _pass_on(interceptor: object, continuation: object, details: object) -> object:
    """Answer StopProvider without stopping: creates that run when Terraform is interrupted must finish and be saved."""
    return continuation(details)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    runner._ShutdownInterceptor.intercept_service = _pass_on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runner.run_provider(RunpodProvider(dict(os.environ)), sys.argv)
