"""A frozen linear layer whose weight is a storage of one matrix, decoded inside its own autograd function.

linear = QuantisedLinear(Int8.quantise([weight], 1), bias, torch.bfloat16)   # LoRA of PEFT attaches as to any nn.Linear

PEFT rewrites targets named gate_proj, up_proj and down_proj to the routed experts, and a storage is no parameter that
its target_parameters could wrap: such layers get their LoRA from `attach_lora`, under the same parameter names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.experts.storage import FrozenStack


class QuantisedLinear(nn.Linear):
    """y = W x + b with W (out, in) in a FrozenStack of one matrix; its tensors are named `<layer>.storage.<tensor>`."""

    def __init__(self, storage: FrozenStack, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = storage.in_features, storage.out_features
        self.storage, self.compute_dtype = storage, dtype
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """The decoded weight, made anew at every look: for whoever asks for its device or wants to merge."""
        return self.storage.dequantise(0, 1, self.compute_dtype)[0]

    def forward(self, input: Tensor) -> Tensor:
        """y (..., out) of x (..., in)."""
        product = _FrozenProduct.apply(input, self.storage)
        return product if self.bias is None else product + self.bias


class _FrozenProduct(torch.autograd.Function):
    """x W^T; the weight is decoded once forward and once backward, and never kept. It gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, storage: FrozenStack) -> Tensor:
        ctx.storage = storage
        return x @ storage.dequantise(0, 1, x.dtype)[0].mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.storage.dequantise(0, 1, dy.dtype)[0], None


def attach_lora(model: nn.Module, layers: Iterable[str], rank: int, alpha: float) -> None:
    """Wraps each named layer of a frozen model in PEFT's own LoRA layer, whatever its name is.

    Call it before get_peft_model, which then leaves other parameters as they are, trainable or not.

    Its matrices are trainable parameters `<layer>.lora_A.default.weight` and `.lora_B.`, as PEFT's are.
    """
    from peft import LoraConfig, inject_adapter_in_model  # seconds to import, and a conversion attaches nothing

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=["layer"])
    for name in layers:
        parent, _, last = name.rpartition(".")
        # Alone in a holder without a configuration, by which PEFT would know the family and rewrite the name.
        holder = nn.ModuleDict({"layer": model.get_submodule(name)})
        holder.register_parameter("device_for_peft", nn.Parameter(torch.empty(0, device=holder["layer"].weight.device)))
        inject_adapter_in_model(config, holder)
        setattr(model.get_submodule(parent), last, holder["layer"])
