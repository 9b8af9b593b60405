"""`make bench`: every figure that was promised has a goal, and every benchmark is found by its run()."""

from __future__ import annotations

import json
import pkgutil
import re

from benchmarks.__main__ import FOLDER, GOALS

PROMISED = {
    "expert_speedup_40",
    "expert_speedup_512",
    "expert_memory",
    "expert_memory_recompute",
    "grad_error_f64",
    "grad_error_f32",
    "grad_error_bf16_ratio",
    "delta_share",
    "int8_time",
    "int8_bytes",
    "int8_error",
    "ce_peak",
    "ce_time",
    "tokenise_speedup",
    "tokenise_identical",
    "staged_load_cpu",
}


def test_every_promised_figure_has_a_goal() -> None:
    assert set(GOALS) >= PROMISED


def test_modules_with_a_run_are_benchmarks_and_the_one_for_a_gpu_is_none() -> None:
    names = {info.name for info in pkgutil.iter_modules([str(FOLDER)])}
    found = {name for name in names if re.search(r"^def run\(", (FOLDER / f"{name}.py").read_text(), re.M)}
    assert {"check", "plan", "demo", "gateway", "experts", "cross_entropy"} <= found
    assert "h200" in names - found


def test_the_page_shows_every_recorded_figure_that_has_a_goal() -> None:
    results = json.loads((FOLDER / "results.json").read_text())
    page = (FOLDER / "RESULTS.md").read_text()
    assert all(f"(`{key}`)" in page for key in GOALS if key in results)
    assert "Nothing here was measured on a GPU" in page
