"""The benchmark of one GPU: all of it up to the GPU runs here at toy size; at true size its plan is held to goals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import h200
from recipes.catalog import load_catalog
from recipes.recipe import Adapter

FACTS = load_catalog()
SHAPE, FAMILY = FACTS.models[h200.MODEL].shape, FACTS.family_of(h200.MODEL)
TOY = "--device cpu --layers 2 --experts 8 --hidden 32 --width 32 --head 16 --vocabulary 100 --row 16 --layer-tokens 32"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_cases_run_at_toy_size_on_a_cpu_and_their_loss_falls(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(h200, "LEARNING_RATE", 1e-2)
    out = tmp_path / "h200.json"
    assert h200.main([*TOY.split(), "--tokens", "16", "32", "--steps", "4", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(c["kind"], c["adapter"], c["tokens"]) for c in found["cases"]] == [
        (kind, adapter, tokens) for kind in ("nf4", "int8") for adapter in h200.ADAPTERS for tokens in (16, 32)
    ]
    for case in found["cases"]:
        assert case["falls"]
        assert case["tokens_per_second"] > 0
        assert case["planned_gib"] > 0.3
        assert len(case["losses"]) == 4
    assert set(found["layer"]) == {"PEFT + grouped_mm", "ours, bf16", "ours, int8", "roofline"}
    printed = capsys.readouterr().out
    assert "tok/s" in printed
    assert printed.count("nf4, experts r16") >= 3


def test_a_loss_that_does_not_fall_is_told_and_fails() -> None:
    flat = h200.Case("nf4", "experts r16", 16, 1.0, 1.0, None, 1.0, (2.0, 1.9, 2.0))
    assert not flat.falls
    assert "DOES NOT FALL" in h200.table({"machine": "cpu", "layer": {}}, [flat])


def test_the_roofline_is_the_one_of_the_facts() -> None:
    """8,192 tokens, rank 16: 2.03 ms of arithmetic and 3.53 of memory."""
    assert h200.roofline_ms(SHAPE, 8192, 16) == pytest.approx(2.03 + 3.53, rel=0.02)


@pytest.mark.parametrize(("kind", "goal"), [("nf4", 70), ("int8", 108)])
def test_expert_lora_of_the_80b_at_16k_tokens_is_planned_within_the_goal(kind: str, goal: float) -> None:
    """With an fp32 adapter, bf16 gradients and 8-bit moments: 8.03 bytes a trained value."""
    adapter = Adapter(rank=16, targets=("experts",))
    assert 0.85 * goal < h200.planned_gib(SHAPE, FAMILY, adapter, kind, 16384) <= goal
