"""The module under real ZeRO-3 over two processes: no leaf blocks, any prefetch, the losses of plain torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.experts.families import TOKENS
from tests.experts.zero3_worker import STEPS, prepare

ROOT = Path(__file__).parents[2]
SETTINGS = [("plain", 0), ("plain", 10**6), ("checkpointing", 0), ("checkpointing", 10**6)]


def _plain_losses(family: str) -> list[float]:
    model, factors = prepare(family, checkpointing=False)
    optimizer = torch.optim.AdamW(factors, lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", [pytest.param("qwen3_moe", marks=pytest.mark.long), "qwen3_next"])
def test_two_ranks_train_as_plain_torch_does(family) -> None:
    expected = _plain_losses(family)
    for mode, prefetch in SETTINGS if family == "qwen3_moe" else SETTINGS[:1]:
        arguments = [str(ROOT / "tests/experts/zero3_worker.py"), family, mode, str(prefetch)]
        ranks = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *ranks, *arguments],
            cwd=ROOT,
            env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        losses = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
        assert losses == pytest.approx(expected, abs=2e-4), (mode, prefetch)
