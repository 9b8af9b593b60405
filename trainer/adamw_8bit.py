"""AdamW whose two moments take one byte a value each: codes in blocks of 256 with one fp32 scale.

optimizer = AdamW8bit(matrices, lr=2e-4, weight_decay=0.0); optimizer.step()
optimizer.state[matrix]["exp_avg"].values()             # the moment in fp32, in the matrix's shape

Blocks after Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2021). Their table of codes is here a power:
a code stands for scale x (code / steps)^4, which is near in relative terms over nine decades. The largest value of a
block comes out exactly, so what was decoded encodes to the same codes: a checkpoint in fp32 resumes to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass
class Coded:
    """A moment in blocks. Signed codes count to 127, unsigned to 255."""

    codes: Tensor
    scales: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, values: Tensor, signed: bool) -> Coded:
        """Encodes fp32 values of any shape. An unsigned value above zero never becomes zero: it will be divided by."""
        flat = values.flatten()
        blocks = pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(1, keepdim=True)
        shares = blocks.abs().div_(scales.clamp(min=torch.finfo(torch.float32).tiny))
        codes = shares.sqrt_().sqrt_().mul_(127 if signed else 255).round_()
        codes = codes.mul_(blocks.sign()).to(torch.int8) if signed else codes.clamp_(min=1).mul_(blocks > 0).byte()
        return cls(codes, scales, values.shape)

    def values(self) -> Tensor:
        """What the codes stand for, fp32."""
        shares = self.codes.float().div_(127 if self.codes.dtype == torch.int8 else 255)
        signs = shares.sign()
        values = shares.square_().square_().mul_(signs).mul_(self.scales).flatten()
        return values[: self.shape.numel()].view(self.shape)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019), one matrix after the other, so that fp32 copies of one alone exist."""

    def __init__(self, matrices: list[Any], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Steps every matrix that has a gradient, in whatever precision that is."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._step(matrix, group["lr"], group["weight_decay"])

    def restore(self, matrix: Any, step: int, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Continues after `step` with these moments, on the matrix's device."""
        coded = {"exp_avg": Coded.of(exp_avg, True), "exp_avg_sq": Coded.of(exp_avg_sq, False)}
        self.state[matrix] = {"step": step, **coded}

    def _step(self, matrix: Any, rate: float, decay: float) -> None:
        gradient, held = matrix.grad.float(), self.state[matrix]
        step = held.get("step", 0) + 1
        mean = held["exp_avg"].values() if held else torch.zeros_like(gradient)
        square = held["exp_avg_sq"].values() if held else torch.zeros_like(gradient)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        self.restore(matrix, step, mean, square)
        # Moments start at zero: the division undoes that bias.
        divisor = square.sqrt_().div_((1 - BETAS[1] ** step) ** 0.5).add_(EPSILON)
        matrix.mul_(1 - rate * decay).addcdiv_(mean, divisor, value=-rate / (1 - BETAS[0] ** step))
