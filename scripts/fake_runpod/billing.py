"""What the local Runpod charges for Pods and workers: price per hour x the time they were on, in buckets of time.

meter = Meter(); meter.turn_on("pod1", 4.59, now); meter.turn_off("pod1", now + 3600); meter.total("pod1", now + 7200)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from scripts.fake_runpod.clock import seconds_of

Json = dict[str, Any]
_HOUR = 3600
_FIRST_DAYS = 30
_AMOUNTS = ("totalAmount", "gpuAmount", "cpuAmount", "diskAmount")
_KINDS = {
    "pods": ("podId", "uniquePodCount", ()),
    "clusters": ("clusterId", "uniqueClusterCount", ("networkingAmount",)),
    "serverless": ("serverlessId", "uniqueServerlessCount", ("feeAmount",)),
}


@dataclass
class Span:
    """One stretch of time for which a Pod is charged; `end` is None while it lasts."""

    start: float
    usd_per_hour: float
    on_gpu: bool
    end: float | None = None


@dataclass
class Meter:
    """Spans by the id of a Pod, or by `endpoint/worker`; they outlive both, as a bill does."""

    spans: dict[str, list[Span]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    "The cluster of each Pod that is or was in one."

    def turn_on(self, pod_id: str, usd_per_hour: float, now: float, *, on_gpu: bool = True) -> None:
        """Charges from now on; nothing new for a Pod that is charged already."""
        spans = self.spans.setdefault(pod_id, [])
        if not spans or spans[-1].end is not None:
            spans.append(Span(now, usd_per_hour, on_gpu))

    def turn_off(self, pod_id: str, now: float) -> None:
        """Charges no more."""
        spans = self.spans.get(pod_id)
        if spans and spans[-1].end is None:
            spans[-1].end = max(now, spans[-1].start)

    def part(self, *, in_groups: bool) -> Meter:
        """The same spans of the Pods that are in no cluster, or of the others, as `cluster/Pod`."""
        if not in_groups:
            return Meter({pod: spans for pod, spans in self.spans.items() if pod not in self.groups})
        return Meter({f"{self.groups[pod]}/{pod}": spans for pod, spans in self.spans.items() if pod in self.groups})

    def total(self, pod_id: str, now: float) -> float:
        """USD for one Pod until now."""
        return sum(_hours(span, span.start, now) * span.usd_per_hour for span in self.spans.get(pod_id, ()))


def bill(kind: str, meter: Meter, query: dict[str, list[str]], now: float) -> Json:
    """The answer of GET /v2/billing/{kind}: by Pod, or by endpoint over all its workers.

    Raises ValueError for a time or a bucket that is none.
    """
    name, unique, extra = _KINDS[kind]
    size = query.get("bucketSize", ["day"])[0]
    end = _asked(query, "endTime", now)
    start = _asked(query, "startTime", now - _FIRST_DAYS * 86400)
    if "lastN" in query:
        start = _lasting(size, int(query["lastN"][0]), now)
    wanted = query.get(name, [None])[0]
    spans: dict[str, list[Span]] = {}
    for key, some in meter.spans.items():
        if wanted in (None, key.partition("/")[0]):
            spans.setdefault(key.partition("/")[0], []).extend(some)
    cut_at = min(end, now)
    found = [r for low, high in _buckets(size, start, end) for r in _records(spans, low, high, cut_at)]
    records = [{name: record.pop("id"), **record, **dict.fromkeys(extra, 0)} for record in found]
    totals = {amount: sum(record[amount] for record in records) for amount in (*_AMOUNTS, *extra)}
    asked = {"startTime": _iso(start), "endTime": _iso(end), "bucketSize": size, name: wanted}
    number = len({record[name] for record in records})
    metadata = {"query": asked, "recordCount": len(records), unique: number, "totals": totals}
    return {"records": records, "metadata": metadata}


def _records(spans: dict[str, list[Span]], low: datetime, high: datetime, cut_at: float) -> Iterator[Json]:
    until = min(high.timestamp(), cut_at)
    for key, some in spans.items():
        parts = [(s, _hours(s, low.timestamp(), until) * s.usd_per_hour) for s in some]
        gpu, cpu = sum(usd for s, usd in parts if s.on_gpu), sum(usd for s, usd in parts if not s.on_gpu)
        if gpu + cpu > 0:
            span = {"startTime": _iso(low.timestamp()), "endTime": _iso(high.timestamp())}
            amounts = {"totalAmount": gpu + cpu, "gpuAmount": gpu, "cpuAmount": cpu, "diskAmount": 0}
            yield {"id": key, **span, **amounts}


def _hours(span: Span, low: float, high: float) -> float:
    end = high if span.end is None else min(high, span.end)
    return max(0.0, end - max(low, span.start)) / _HOUR


def _asked(query: dict[str, list[str]], name: str, otherwise: float) -> float:
    return seconds_of(query[name][0]) if name in query else otherwise


def _buckets(size: str, start: float, end: float) -> Iterator[tuple[datetime, datetime]]:
    low = _floor(size, datetime.fromtimestamp(start, UTC))
    while low.timestamp() < end:
        high = _floor(size, low + timedelta(days={"hour": 0, "day": 1, "week": 7, "month": 32, "year": 367}[size]))
        if size == "hour":
            high = low + timedelta(hours=1)
        yield low, high
        low = high


def _lasting(size: str, number: int, now: float) -> float:
    low = _floor(size, datetime.fromtimestamp(now, UTC))
    for _ in range(number - 1):
        low = _floor(size, low - timedelta(seconds=1))
    return low.timestamp()


def _floor(size: str, at: datetime) -> datetime:
    """The start of the bucket that holds this time. Raises ValueError for an unknown size."""
    hour = at.replace(minute=0, second=0, microsecond=0)
    day = hour.replace(hour=0)
    starts = {
        "hour": hour,
        "day": day,
        "week": day - timedelta(days=day.weekday()),
        "month": day.replace(day=1),
        "year": day.replace(month=1, day=1),
    }
    if size not in starts:
        raise ValueError(f"bucketSize {size} is not one of {', '.join(starts)}")
    return starts[size]


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
