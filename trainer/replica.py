"""The engine that keeps the whole model on each rank and averages nothing but the adapter's gradients.

No weight ever travels: a step costs one all-reduce of the adapter's gradients. A matrix in bf16 has an fp32 master
that collects its gradients over the passes and is stepped; a matrix in fp32 is its own master. Gradients add up in
fp32, or in bf16 under the 8-bit optimizer: a step has few passes, and its moments are coarser than that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from recipes.catalog import Family
from trainer.adamw_8bit import AdamW8bit, Coded
from trainer.base_files import BaseFiles
from trainer.engine import MOMENTS, WEIGHT, MakeOptimizer
from trainer.environment import Place
from trainer.experts.projection import Summation
from trainer.load import Quantisation, load_whole


class Replica:
    """Data parallel training of the adapter; see trainer.engine.Engine."""

    summation: Summation = "accumulator"
    expert_dtype = torch.float32

    def __init__(self, clipping: float, quantize: Quantisation | None, place: Place) -> None:
        self._quantize, self._place = quantize, place
        self.model: Any = None
        self.trainable: dict[str, Any] = {}
        self._clipping = clipping
        self._masters: dict[str, Any] = {}
        self._optimizer: Any = None

    def load(self, files: BaseFiles, family: Family, dtype: Any) -> Any:
        """Whole, on this rank's device. Raises TrainingStopped."""
        return load_whole(files, family, dtype, self._place.device, self._quantize)

    def start(self, model: Any, trainable: dict[str, Any], make_optimizer: MakeOptimizer) -> None:
        """Rank 0's adapter wins."""
        self.model, self.trainable = model, trainable
        for name, parameter in trainable.items():
            dist.broadcast(parameter.data, src=0)
            self._masters[name] = parameter
            if parameter.dtype != torch.float32:
                self._masters[name] = master = parameter.detach().float()
                parameter.register_post_accumulate_grad_hook(_handed_to(master))
        self._optimizer = make_optimizer(list(self._masters.values()))
        if isinstance(self._optimizer, AdamW8bit):
            for master in self._masters.values():
                master.grad_dtype = torch.bfloat16

    def begin(self, rate: float, passes: int) -> None:
        """Gradients are gone since the last step."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Any) -> None:
        """Gradients add up in the masters."""
        loss.backward()

    def end(self) -> float:
        """The ranks' gradients are summed: each is already divided by the tokens of the whole step."""
        masters = list(self._masters.values())
        for master in masters:
            if master.grad is None:  # a rank whose rows hold no trained token takes part all the same
                master.grad = torch.zeros_like(master, dtype=master.grad_dtype)
        for work in [dist.all_reduce(master.grad, async_op=True) for master in masters]:
            work.wait()
        norm = _clip([master.grad for master in masters], self._clipping)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._copy_out()
        return float(norm)

    def part(self, name: str) -> tuple[Any, Any]:
        """Every rank holds all."""
        master = self._masters[name]
        return master.detach(), _plain(self._optimizer.state[master]["exp_avg"])

    def full(self, name: str) -> dict[str, Any]:
        """No communication."""
        master = self._masters[name]
        moments = self._optimizer.state.get(master, {})
        found = {WEIGHT: master.detach()} | {moment: _plain(moments[moment]) for moment in MOMENTS if moment in moments}
        return {kind: tensor.to("cpu", copy=True) for kind, tensor in found.items()}

    def restore(self, step: int, read: Callable[[str], Any]) -> None:
        """Masters, moments and step count, then the model's own copies."""
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(read(f"{name}/{WEIGHT}"))
                moments = {moment: read(f"{name}/{moment}").to(master.device) for moment in MOMENTS}
                if isinstance(self._optimizer, AdamW8bit):
                    self._optimizer.restore(master, step, **moments)
                else:
                    self._optimizer.state[master] = {"step": torch.tensor(float(step), device=master.device), **moments}
        self._copy_out()

    def _copy_out(self) -> None:
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                if parameter is not self._masters[name]:
                    parameter.copy_(self._masters[name])


def _clip(gradients: list[Any], limit: float) -> Any:
    """Scales the gradients to a norm of at most `limit`; their norm before, in fp32 whatever they are in."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))
    return norm


def _plain(moment: Any) -> Any:
    return moment.values() if isinstance(moment, Coded) else moment


def _handed_to(master: Any) -> Callable[[Any], None]:
    """A hook that moves a fresh gradient to the master, so that many passes do not round each other away."""

    def hand_over(parameter: Any) -> None:
        gradient = parameter.grad.to(master.grad_dtype)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return hand_over
