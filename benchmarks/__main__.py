"""Runs the benchmarks and writes results.json and RESULTS.md, with machine, versions and date.

python -m benchmarks              # all of them; or name some: python -m benchmarks check plan

A benchmark is a module of this folder with a function run() that returns its figures by key; its goals stand below.
benchmarks.h200 is none of them: it wants a GPU.
"""

from __future__ import annotations

import datetime
import json
import os
import pkgutil
import platform
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "msgspec")
# key: (what it says, the goal as text, whether the goal is met)
GOALS = {
    "check_schema_pairs": ("schema pass over pairs, MB/s over a json.loads loop's", ">= 2", lambda v: v >= 2),
    "check_schema_messages": ("the same over OpenAI chat rows", ">= 2", lambda v: v >= 2),
    "check_peak_mib_10_mb": ("peak MiB of `lorry check` on 10 MB", "-", None),
    "check_peak_mib_1_gb": ("peak MiB of `lorry check` on 1 GB", "flat", lambda v: v <= 128),
    "check_tokens_mb_per_second": ("exact tokens and masks, MB/s on one core", "-", None),
    "plan_seconds": ("`lorry plan` of the 80B, process start included", "<= 1", lambda v: v <= 1),
    "plan_with_set_seconds": ("the same with a training set", "<= 1", lambda v: v <= 1),
    "make_plan_seconds": ("the planning alone, all offers", "-", None),
    "demo_seconds": ("`make demo` after installation", "<= 180", lambda v: v <= 180),
    "demo_peak_gib": ("its memory, all processes, GiB", "<= 4", lambda v: v <= 4),
    "gateway_run_without_fetch_ms": (
        "front door, /run without the fetch, median ms, 1,000 jobs",
        "<= 50",
        lambda v: v <= 50,
    ),
    "gateway_status_ms": ("front door, /status, median ms", "<= 10", lambda v: v <= 10),
    "gateway_stream_per_second": ("front door, requests/s of status held for 30 s", ">= 199", lambda v: v >= 199),
    "gateway_stream_errors": ("errors among them", "0", lambda v: v == 0),
    "expert_speedup_40": (
        "expert layer forward + backward over PEFT's, 40 rows per expert",
        ">= 1.5",
        lambda v: v >= 1.5,
    ),
    "expert_speedup_512": ("the same, 512 rows per expert", ">= 1.05", lambda v: v >= 1.05),
    "expert_memory": ("extra peak of that step over PEFT's", "<= 0.167", lambda v: v <= 1 / 6),
    "expert_memory_recompute": ("the same in recompute mode", "<= 0.1", lambda v: v <= 0.1),
    "grad_error_f64": ("gradient error against a float64 reference, float64", "<= 1e-12", lambda v: v <= 1e-12),
    "grad_error_f32": ("the same, float32", "<= 1e-6", lambda v: v <= 1e-6),
    "grad_error_bf16_ratio": ("the same, bf16, over PEFT's", "<= 1.3", lambda v: v <= 1.3),
    "delta_share": ("share of a small delta that reaches the output in bf16", "0.98-1.02", lambda v: 0.98 <= v <= 1.02),
    "int8_time": ("int8 experts, time over PEFT bf16", "<= 1.25", lambda v: v <= 1.25),
    "int8_bytes": ("bytes per parameter", "<= 1.03", lambda v: v <= 1.03),
    "int8_error": ("relative output error", "<= 0.01", lambda v: v <= 0.01),
    "ce_peak": ("chunked cross-entropy, peak over the plain one's, vocabulary 151,936", "<= 0.05", lambda v: v <= 0.05),
    "tokenise_speedup": ("tokens and masks per core over TRL's path", ">= 5", lambda v: v >= 5),
    "tokenise_identical": ("share of them that are identical", "1", lambda v: v == 1),
    "staged_load_cpu": ("CPU s/GB of a staged load over from_pretrained's", "<= 0.35", lambda v: v <= 0.35),
    "ce_time": ("its time over the plain one's", "<= 1.1", lambda v: v <= 1.1),
}


def main(names: list[str]) -> None:
    """Runs the named benchmarks (all without names) and merges their figures into results.json."""
    path = FOLDER / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    for name in names or [info.name for info in pkgutil.iter_modules([str(FOLDER)])]:
        module = import_module(f"benchmarks.{name}") if name != "__main__" else None
        if not hasattr(module, "run"):
            continue
        print(f"== {name}", flush=True)
        for key, value in module.run().items():
            results[key] = {
                "value": float(f"{value:.4g}"),
                "date": today,
                "machine": _machine(),
                "versions": _versions(),
            }
        path.write_text(json.dumps(results, indent=1) + "\n")
    (FOLDER / "RESULTS.md").write_text(_page(results))


def _page(results: dict[str, dict[str, object]]) -> str:
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks`. Ratios are against the named peer in the same run: interleaved rounds, CPU",
        "time, least of the rounds. Plain figures are wall time.",
        "",
        "**Nothing here was measured on a GPU.** `python -m benchmarks.h200` is for one H200 or H100 and has run on",
        "a CPU at toy size only: speed and peak of the 80B are arithmetic so far (`lorry plan RECIPE --explain`).",
        "",
        "| figure | value | goal | met | date |",
        "|---|---|---|---|---|",
    ]
    for key, (says, goal, is_met) in GOALS.items():
        if key in results:
            value = results[key]["value"]
            met = "-" if is_met is None else "yes" if is_met(value) else "**no**"
            lines.append(f"| {says} (`{key}`) | {value} | {goal} | {met} | {results[key]['date']} |")
    machines = sorted({f"{r['machine']}; {r['versions']}" for r in results.values()})
    return "\n".join([*lines, "", *(f"Machine: {machine}." for machine in machines)]) + "\n"


def _machine() -> str:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return f"{os.cpu_count()} cores of {cpu}, Python {platform.python_version()}"


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES)


if __name__ == "__main__":
    main(sys.argv[1:])
