"""ZeRO-3 on a staged model: read once by rank 0, the same weights on two ranks, and the same adapter out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.quantize import quantise


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_train_on_a_staged_model_as_on_the_published_one(
    reference: Any, jobs: Any, smoke_model: Path, tmp_path: Path
) -> None:
    staged = tmp_path / "staged"
    quantise(smoke_model, staged, "bf16", model="lorry/smoke", revision=None, say=lambda done, total: None)
    job = jobs.make(tmp_path / "job", jobs.reference, jobs.reference_rows())
    log = jobs.train(job, staged)
    assert job.result.outcome == "completed", log[-3000:]
    assert job.result.base_sha256 == reference.result.base_sha256
    wanted, found = jobs.tensors(reference), jobs.tensors(job)
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-4, atol=1e-6, msg=key)
