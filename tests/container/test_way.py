"""The way from launch to manifest, and what a second start of the same job does."""

from __future__ import annotations

from collections.abc import Callable

from scripts.adapter import verify_adapter
from tests.container.conftest import Job


def test_a_job_goes_from_launch_to_manifest(make_job: Callable[..., Job]) -> None:
    job = make_job()
    job.launch()
    files = job.finish()
    assert files.container is not None
    assert (files.container.ended, files.container.stage) == ("completed", "done"), job.log()
    assert [(a.number, a.exit_code, a.last_step) for a in files.container.attempts] == [(1, 0, 8)]
    manifest = verify_adapter(job.folder / "adapter")
    assert manifest.cost_usd == 0.0
    assert not job.processes()
