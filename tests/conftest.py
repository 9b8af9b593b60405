"""Shared by all tests. With LORRY_TESTS_MUST_RUN set (continuous integration), a skipped test is a failure.

Runpod's OpenAPI document is the exception: it is not part of the repository, so a clone alone cannot have it.
"""

from __future__ import annotations

import os
import signal

import pytest

_skipped: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what it puts into the background with Ctrl-C ignored, and every process below inherits that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "long: takes minutes, or a gigabyte of an SDK; runs in `make test-long`")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "RUNPOD_OPENAPI is not set" not in str(report.longrepr):
        _skipped.append(
            f"{report.nodeid}: {report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr}"
        )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    is_worker = hasattr(session.config, "workerinput")
    if _skipped and os.environ.get("LORRY_TESTS_MUST_RUN") and not is_worker:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skipped and os.environ.get("LORRY_TESTS_MUST_RUN"):
        terminalreporter.section("skipped, which is a failure here")
        for line in _skipped:
            terminalreporter.line(line)
