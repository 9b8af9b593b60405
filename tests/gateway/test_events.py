"""Progress as server-sent events, taken up again where a reader lost its connection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.gateway.conftest import KEYS, Front

JOB = "5f0c1d7e-58a5-4a3b-9d5e-0c9a54f1e001"


def read(front: Front, until: str, last: str | None = None) -> list[dict[str, Any]]:
    """Events up to the first of a kind: [{"event", "id", "data"}]."""
    headers = {"Authorization": f"Bearer {KEYS['acme']}"} | ({"Last-Event-ID": last} if last else {})
    found: list[dict[str, Any]] = []
    with front.http.stream("GET", f"{front.url}/v2/lorry/events/{JOB}", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        event: dict[str, Any] = {}
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name in ("event", "id"):
                event[name] = value
            elif name == "data":
                event["data"] = json.loads(value)
            elif not line and event:
                found.append(event)
                if event["event"] == until:
                    break
                event = {}
    return found


def steps(path: Path, first: int, last: int) -> None:
    with path.open("a") as file:
        for step in range(first, last + 1):
            line = {"kind": "train", "at": 1.0, "attempt": 1, "epoch": 1, "step": step}
            file.write(json.dumps(line | {"training_loss": 4.0 - step / 10, "learning_rate": 1e-4}) + "\n")


def test_events_go_on_after_the_last_one_seen(front: Front) -> None:
    front.script(JOB, steps=100_000)
    front.run()
    front.wait(JOB, lambda view: view["status"] == "IN_PROGRESS")
    metrics = front.folder(JOB) / "metrics.jsonl"
    steps(metrics, 1, 3)
    with metrics.open("a") as file:
        file.write('{"kind": "tra')  # a line that is still being written
    first = read(front, "status")
    assert [event["id"] for event in first if event["event"] == "metrics"] == ["1", "2", "3"]
    assert first[-1]["data"]["status"] == "IN_PROGRESS"
    metrics.write_text(metrics.read_text().rpartition("\n")[0] + "\n")
    steps(metrics, 4, 5)
    front.post(f"/v2/lorry/cancel/{JOB}")
    rest = read(front, "end", last="3")
    assert [event["id"] for event in rest if event["event"] == "metrics"] == ["4", "5"]
    assert rest[-1] == {"event": "end", "data": {"status": "CANCELLED"}}


def test_a_failed_job_ends_its_events_with_the_reason(front: Front) -> None:
    front.script(JOB, faults={"1": ["out_of_memory", 2]})
    front.run()
    events = read(front, "end", last="no number")
    assert events[-1]["data"] == {"status": "FAILED"}
    assert "memory" in events[-2]["data"]["error"]
