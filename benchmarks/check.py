"""Speed and memory of `lorry check`: the schema pass against a plain json.loads loop, peak memory up to 1 GB.

python -m benchmarks.check

Rounds are interleaved (ours, plain, ours, ...), times are CPU seconds of this process, and the least of the rounds
counts: what disturbs a run only ever adds to it. The whole preparation runs in a process of its own, so that its peak
memory is its own. Depth and repeated keys are looked for beside the schema pass; with them inside the loop
the ratio is about 1.4. Without a tokenizer tokens are estimated from words; exact counting is timed apart.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

from scripts.tokenizer import find_tokenizer
from scripts.training_set.container import open_container
from scripts.training_set.findings import Findings
from scripts.training_set.forms import decoded, recognise
from scripts.training_set.merge import Example
from scripts.training_set.prepare import READ_BYTES
from scripts.training_set.tokens import Counter

ROOT = Path(__file__).parent.parent
MB = 10**6
TEXT = """chain squeaks oil each link wheel brake pad lever cable tension rear derailleur when the and of to a in is it
you that with for on clean turn spin check before after ride winter light thick dry wet hand bolt loose tight"""
WORDS = TEXT.split()
PREPARE = """
import json, resource, sys, time
from pathlib import Path
from recipes.recipe import Data
from scripts.training_set import prepare
report = prepare(Path(sys.argv[1]), Path(sys.argv[2]), Data(), 1)
used = resource.getrusage(resource.RUSAGE_SELF)
peak_kib = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
print(json.dumps({"cpu_seconds": used.ru_utime + used.ru_stime, "peak_mib": peak_kib / 1024,
                  "conversations": report.conversations, "merged": report.merged}))
"""


def run(rounds: int = 7, largest_mb: int = 1000) -> dict[str, float]:
    """Ratios of the schema pass to json.loads, MB/s of exact token counts, peak MiB of a small and a large file."""
    with tempfile.TemporaryDirectory(prefix="lorry-benchmark-") as folder:
        passes = {form.__name__: schema(Path(folder), form, rounds) for form in (write_pairs, write_messages)}
        small, large = memory(Path(folder), [10, largest_mb])
        counted = tokens(Path(folder))
    print(table(list(passes.values()), [small, large], counted))
    return {
        "check_schema_pairs": passes["write_pairs"]["ratio"],
        "check_schema_messages": passes["write_messages"]["ratio"],
        "check_peak_mib_10_mb": small["peak_mib"],
        "check_peak_mib_1_gb": large["peak_mib"],
        "check_tokens_mb_per_second": counted["mb_per_second"],
    }


def schema(folder: Path, write: Callable[[Path, int], None], rounds: int) -> dict[str, Any]:
    """The schema pass and the plain loop over the same 40 MB."""
    path = folder / f"{write.__name__}.jsonl"
    write(path, 40 * MB)
    size = path.stat().st_size / MB
    ours, plain = [], []
    for _ in range(rounds):
        ours.append(_cpu_seconds(lambda: _schema_pass(path)))
        plain.append(_cpu_seconds(lambda: _plain_loop(path)))
    path.unlink()
    return {
        "form": write.__name__.removeprefix("write_"),
        "schema_mb_per_second": size / min(ours),
        "json_loads_mb_per_second": size / min(plain),
        "ratio": min(plain) / min(ours),
    }


def memory(folder: Path, sizes_mb: list[int]) -> list[dict[str, Any]]:
    """The whole preparation of files of growing size."""
    results = []
    for size in sizes_mb:
        path = folder / f"{size}.jsonl"
        write_pairs(path, size * MB)
        command = [sys.executable, "-c", PREPARE, str(path), str(folder / "out")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        measured = json.loads(done.stdout)
        results.append({"mb": size, "mb_per_second": size / measured["cpu_seconds"], **measured})
        path.unlink()
    return results


def tokens(folder: Path) -> dict[str, float]:
    """Exact counting with the smoke model's tokenizer and template, over the text of whole conversations."""
    path = folder / "tokens.jsonl"
    write_messages(path, 2 * MB)
    counter = Counter(find_tokenizer("lorry/smoke", []))
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    examples = [
        Example(1, [m | {"trained": True} if m["role"] == "assistant" else m for m in messages]) for messages in rows
    ]
    seconds = min(_cpu_seconds(lambda: [counter.count(example) for example in examples]) for _ in range(3))
    return {"mb_per_second": path.stat().st_size / MB / seconds}


def table(passes: list[dict[str, Any]], prepared: list[dict[str, Any]], counted: dict[str, float]) -> str:
    """The result for a person."""
    lines = ["schema pass, CPU time, least of the rounds"]
    for row in passes:
        lines.append(
            f"  {row['form']:<10} {row['schema_mb_per_second']:7.0f} MB/s, json.loads "
            f"{row['json_loads_mb_per_second']:5.0f} MB/s: {row['ratio']:.2f}x"
        )
    lines.append("whole preparation without token counts")
    for row in prepared:
        lines.append(f"  {row['mb']:>6} MB  {row['mb_per_second']:5.0f} MB/s, peak {row['peak_mib']:.0f} MiB")
    lines.append(f"exact token counts and masks: {counted['mb_per_second']:.1f} MB/s")
    return "\n".join(lines)


def write_pairs(path: Path, size: int) -> None:
    """Form (b): every pair repeats its history, as the web app sends it; all conversations merge."""
    rng = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        file.write('{"_meta": {"file_name": "benchmark", "version": "4.0.0"}}\n')
        written, conversation = 0, 0
        while written < size:
            conversation += 1
            history: list[dict[str, Any]] = []
            for turn in range(2, 2 * rng.randint(2, 6), 2):
                question, answer = _text(rng, 30), _text(rng, 220)
                asked = {"turn": turn - 1, "role": "user", "content": question, "emotional_state": {"primary": "calm"}}
                history = [*history, asked]
                pair = {
                    "id": f"c{conversation}-{turn}",
                    "conversation_id": f"c{conversation}",
                    "turn_number": turn,
                    "conversation_metadata": {"topic": "bicycles", "tags": ["care", "repair"]},
                    "system_prompt": " ".join(WORDS * 2),
                    "conversation_history": history,
                    "current_user_input": question,
                    "emotional_context": {"primary": "calm", "intensity": 0.5},
                    "target_response": answer,
                    "training_metadata": {"quality_score": 3, "human_reviewed": False},
                }
                written += file.write(json.dumps(pair, ensure_ascii=False) + "\n")
                history = [*history, {"turn": turn, "role": "assistant", "content": answer, "emotional_state": {}}]


def write_messages(path: Path, size: int) -> None:
    """Form (h): whole conversations."""
    rng = random.Random(2)
    with path.open("w", encoding="utf-8") as file:
        written = 0
        while written < size:
            messages = [{"role": "system", "content": " ".join(WORDS * 2)}]
            for _ in range(rng.randint(1, 5)):
                messages.append({"role": "user", "content": _text(rng, 30)})
                messages.append({"role": "assistant", "content": _text(rng, 220)})
            written += file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)).capitalize() + "."


def _schema_pass(path: Path) -> None:
    findings = Findings(path.name)
    with BufferedReader(FileIO(path), READ_BYTES) as file:
        container = open_container(path, file)
        form = recognise(container.rows(findings.refuse), path.name)
        for _ in decoded(container.rows(findings.refuse), form, findings, []):
            pass
    assert not findings.problem_count


def _plain_loop(path: Path) -> None:
    with path.open("rb") as file:
        for line in file:
            json.loads(line)


def _cpu_seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


if __name__ == "__main__":
    run()
