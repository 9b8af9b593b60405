"""What the loop, the checkpoints and the export need of an engine. There are two: trainer.zero3 and trainer.replica.

engine.begin(rate, passes); engine.backward(loss) once per pass; norm = engine.end()     # one optimizer step
Checkpoints and adapters name matrices as the model does and hold them whole in fp32, so either engine reads both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from recipes.catalog import Family
from trainer.base_files import BaseFiles
from trainer.experts.projection import Summation

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
MakeOptimizer = Callable[[list[Any]], Any]
"An optimizer over the masters: torch's AdamW or trainer.adamw_8bit."


class Engine(Protocol):
    """A model in training: the same steps, whichever way its weights lie over the ranks."""

    summation: Summation
    "How LoRA of the experts is added to their output."
    expert_dtype: torch.dtype | None
    "In which LoRA of the experts is kept; None: in the model's."
    model: Any
    "What forward passes call."
    trainable: dict[str, Any]
    "Every LoRA matrix by name, in the same order on all ranks."

    def load(self, files: BaseFiles, family: Family, dtype: Any) -> Any:
        """The frozen base model, proven to be what its files say. Collective. Raises TrainingStopped."""

    def start(self, model: Any, trainable: dict[str, Any], make_optimizer: MakeOptimizer) -> None:
        """Takes over the model with its adapter. Collective."""

    def begin(self, rate: float, passes: int) -> None:
        """Opens an optimizer step of so many passes at this learning rate."""

    def backward(self, loss: Any) -> None:
        """Adds the gradients of one pass; `loss` is this rank's share of the mean loss of the step."""

    def end(self) -> float:
        """Clips, steps and forgets the gradients; the gradient norm before clipping. Collective."""

    def part(self, name: str) -> tuple[Any, Any]:
        """This rank's part of a matrix in fp32 and of its first moment."""

    def full(self, name: str) -> dict[str, Any]:
        """`weight`, and `exp_avg` and `exp_avg_sq` once a step was taken: whole, fp32, on the CPU. Collective."""

    def restore(self, step: int, read: Callable[[str], Any]) -> None:
        """Continues after `step` with the numbers read("<name>/<weight or moment>"). After `start`."""
