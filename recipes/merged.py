"""merged.json: of which base and adapter a merged model was made, and how much of the adapter its precision kept."""

from __future__ import annotations

from typing import Literal

from recipes.job import Record
from recipes.staged import StagedFile

MERGED = "merged.json"
Precision = Literal["bf16", "fp32"]


class Survival(Record):
    """How much of one target group's delta is in the merged weights, next to the base in the same precision."""

    group: str
    weights: int
    share: float
    "Projection of the delta that arrived on the delta that was meant: 1 is all of it, 0 nothing."
    relative_error: float
    "Length of what went wrong over the length of the delta: rounding, also where the share is 1."


class MergedModel(Record):
    """merged.json, written last."""

    format: Literal[1] = 1
    job_id: str
    base_model: str
    base_revision: str | None
    base_sha256: str
    adapter_sha256: str
    "Of adapter_model.safetensors."
    precision: Precision
    files: dict[str, StagedFile]
    survival: tuple[Survival, ...]
    probe_error: float | None
    "RMS difference of log-probabilities, merged model against trained model; null where the job's probe was not given."
    probe_limit: float | None
    "The most it might have been."
