"""Whether a server answers with that very adapter: its log-probabilities against those the trainer recorded.

heard = listen(vllm, base="lorry/smoke", adapter="bicycle-1", points=read_points(Path("probe.safetensors")))
heard.problem      # None, or a sentence
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from scripts.errors import InputError, Problem, ProviderError
from scripts.serving.client import Vllm

MOST_ERROR = 0.35
"""Largest RMS error of the adapter's effect as a share of the effect. Measured on the
smoke model, two jobs, CPU, torch 2.13.0, 2026-11-27: f32 0.00, bf16 0.003 and 0.045, alone and in a padded batch of 8;
every other pair missing 0.55 and 0.69, another job's adapter 0.44 and 0.73, ignored 1."""
PARALLEL = 4
REQUESTS = 20
MOST_FAILED = 0.05
"One of twenty real requests may fail: a worker that is replaced meanwhile is no fault of the adapter."


@dataclass(frozen=True)
class Point:
    """One place of a conversation: the token at `position` had these log-probabilities in the trainer."""

    position: int
    base: float
    trained: float


@dataclass(frozen=True)
class Heard:
    """effect: RMS of what the adapter changes at the points, as served. error: RMS of its difference from the record,
    as a share of the recorded effect. steady: whether requests side by side answer as one alone. failed: share of real
    requests that got no answer."""

    effect: float
    error: float
    steady: bool
    failed: float = 0.0

    @property
    def problem(self) -> str | None:
        """Why this is not that adapter at work; None when it is."""
        if not self.steady:
            return "it answers otherwise, or fails, when asked several times at once"
        if self.failed > MOST_FAILED:
            return f"{self.failed:.0%} of {REQUESTS} real requests failed; at most {MOST_FAILED:.0%}"
        if not self.error <= MOST_ERROR:
            return (
                f"its effect on log-probabilities is {self.effect:.3f} and differs from the recorded one by"
                f" {self.error:.0%}; at most {MOST_ERROR:.0%}: the adapter is ignored, loaded in part, or another one"
            )
        return None


Points = list[tuple[list[int], list[Point]]]


def read_points(path: Path) -> Points:
    """(token ids, points) per conversation of probe.safetensors, whose layout trainer/probe.py states.

    Only one number per row is read: the log-probability of the token that follows. Raises InputError.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
            start = 8 + length
            count = sum(name.startswith("ids.") for name in header)
            return [_conversation(file, header, start, i) for i in range(count)]
    except (OSError, ValueError, KeyError, IndexError, struct.error):
        raise InputError(Problem(str(path), "not the probe of a trainer", "the file as the trainer wrote it")) from None


def listen(vllm: Vllm, base: str, adapter: str, points: Points) -> Heard:
    """Asks base and adapter. Raises ProviderError when the server fails or does not know the adapter."""
    served: list[float] = []
    recorded: list[float] = []
    for ids, places in points:
        said, own = vllm.log_probabilities(adapter, ids), vllm.log_probabilities(base, ids)
        for place in places:
            served.append((said[place.position] or 0.0) - (own[place.position] or 0.0))
            recorded.append(place.trained - place.base)
    effect = _rms(recorded)
    error = _rms([a - b for a, b in zip(served, recorded, strict=True)])
    steady = _is_steady(vllm, adapter, base, points[0][0])
    failed = error_rate(vllm, adapter, points) if steady else 1.0
    return Heard(_rms(served), error / effect if effect else 1.0, steady, failed)


def error_rate(vllm: Vllm, model: str, points: Points) -> float:
    """Share of REQUESTS real requests, the beginnings of the probe's conversations, that get no answer."""
    prompts = [points[number % len(points)][0] for number in range(REQUESTS)]
    with ThreadPoolExecutor(PARALLEL) as pool:
        answered = list(pool.map(lambda ids: vllm.answers(model, ids[: max(1, len(ids) // 2)]), prompts))
    return 1 - sum(answered) / REQUESTS


def _is_steady(vllm: Vllm, adapter: str, base: str, ids: Sequence[int]) -> bool:
    """Several requests at once, base and adapter mixed: each like the same one alone."""
    names = [adapter, base] * (PARALLEL // 2)
    alone = {name: vllm.log_probabilities(name, ids) for name in (adapter, base)}
    try:
        with ThreadPoolExecutor(PARALLEL) as pool:
            together = list(pool.map(lambda name: vllm.log_probabilities(name, ids), names))
    except ProviderError:
        return False
    far = max(
        abs((a or 0.0) - (b or 0.0))
        for name, said in zip(names, together, strict=True)
        for a, b in zip(said, alone[name], strict=True)
    )
    return far <= _NOISE


_NOISE = 0.2  # nats; batches of another shape round otherwise in bf16


def _conversation(file: BinaryIO, header: dict[str, Any], start: int, number: int) -> tuple[list[int], list[Point]]:
    ids = _numbers(file, header[f"ids.{number}"], start)
    positions = _numbers(file, header[f"positions.{number}"], start)
    points = []
    for row, position in enumerate(positions):
        token = ids[position + 1]
        base, trained = (_value(file, header[f"{kind}.{number}"], start, row, token) for kind in ("base", "trained"))
        points.append(Point(position + 1, base, trained))
    return ids, points


def _numbers(file: BinaryIO, entry: dict[str, Any], start: int) -> list[int]:
    begin, end = entry["data_offsets"]
    if entry["dtype"] != "I64":
        raise ValueError(entry["dtype"])
    file.seek(start + begin)
    return list(struct.unpack(f"<{(end - begin) // 8}q", file.read(end - begin)))


def _value(file: BinaryIO, entry: dict[str, Any], start: int, row: int, column: int) -> float:
    if entry["dtype"] != "F32":
        raise ValueError(entry["dtype"])
    file.seek(start + entry["data_offsets"][0] + 4 * (row * entry["shape"][1] + column))
    return float(struct.unpack("<f", file.read(4))[0])


def _rms(values: Sequence[float]) -> float:
    return float((sum(value * value for value in values) / len(values)) ** 0.5) if values else 0.0
