"""staged.json: what a staged model holds, in which precision, made of which base. Written by trainer.quantize, last.

A staged folder has config.json, tokenizer and template files, model-00001-of-000NN.safetensors in the order of the
layers, model.safetensors.index.json, and this record.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from recipes.job import Record
from recipes.recipe import Quantize

STAGED = "staged.json"
Kind = Quantize | Literal["bf16"]
"How the large matrices are held. bf16 leaves them as they are and only fuses the experts."


class StagedFile(Record):
    """One file of weights."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str
    crc32: int
    "Checked on the way at every load, which SHA-256 is too slow for."


class StagedModel(Record):
    """staged.json. Without it the folder is unfinished."""

    format: Literal[1] = 1
    model: str
    "Id of the base model."
    revision: str | None
    base_sha256: str
    "Names the exact base, as result.json and the adapter's manifest do."
    kind: Kind
    inputs_per_scale: int
    scales_per_step: int
    "Scales are int8 themselves: so many share an fp32 step."
    files: dict[str, StagedFile]
    "The weights, in the order in which they are read."
    parameters: dict[str, int]
    "Weights of the model by precision: int8, nf4, or the name of torch's dtype."

    @property
    def total_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(file.bytes for file in self.files.values())
