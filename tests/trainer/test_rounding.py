"""What the split sum loses in bf16, as the log of a ZeRO-3 run says it."""

from __future__ import annotations

import pytest
import torch

from trainer.rounding import split_share


def test_half_of_a_small_update_is_lost_in_bf16_and_nothing_in_fp32() -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 512) * 0.02
    assert split_share(weight, 8, torch.bfloat16) == pytest.approx(0.53, abs=0.05)
    assert split_share(weight, 8, torch.float32) == pytest.approx(1, abs=1e-4)
