"""Our experts in transformers' experts interface, and the small module that holds the LoRA of one layer.

attach_expert_lora(model, rank=16, alpha=32)                   # every MoE layer of the model, after PEFT's own targets
quantise_experts(model, "int8")                                # a staged model brings its storages instead: use_storage

A model whose config says experts implementation "lorry" calls `experts_forward` in each MoE layer; no class is changed.
Under ZeRO-3 the stacks stay parameters of the experts module and the factors are parameters of its `lora` module, whose
own forward is called, so that both are gathered while they are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from trainer.experts.layouts import PREFIX
from trainer.experts.lora_function import expert_mlp
from trainer.experts.projection import Call, Factors, Summation
from trainer.experts.quantised import Int8, Nf4
from trainer.experts.storage import Dense, FrozenStack

IMPLEMENTATION = "lorry"
Layout = Literal["per_expert", "shared_outer"]
STACKS = ("gate_up_proj", "down_proj")


class ExpertLora(nn.Module):
    """LoRA of one layer's experts: A and B of both projections, B zero at first, so that nothing changes yet.

    shared_outer: the factors on the hidden dimension, A of gate_up and B of down, are one for all experts.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        rank: int,
        alpha: float,
        *,
        layout: Layout = "per_expert",
        summation: Summation = "split",
        keep_gate_up: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ):
        """`shape` is (experts, hidden, width). The factors are drawn on CPU, so a seed means the same on any device."""
        super().__init__()
        experts, hidden, width = shape
        outer = (experts,) if layout == "per_expert" else ()
        self.scale, self.summation, self.keep_gate_up, self.enabled = alpha / rank, summation, keep_gate_up, True

        def factor(*size: int, bound: float = 0.0) -> nn.Parameter:
            drawn = torch.empty(*size).uniform_(-bound, bound, generator=generator) if bound else torch.zeros(*size)
            return nn.Parameter(drawn.to(device=device, dtype=dtype))

        # PEFT's initialisation: kaiming uniform with a = sqrt(5), which is 1 / sqrt(inputs) either way.
        self.gate_up_a = factor(*outer, rank, hidden, bound=hidden**-0.5)
        self.gate_up_b = factor(experts, 2 * width, rank)
        self.down_a = factor(experts, rank, width, bound=width**-0.5)
        self.down_b = factor(*outer, hidden, rank)

    @property
    def factors(self) -> Factors:
        """The trainable factors themselves."""
        return Factors(self.gate_up_a, self.gate_up_b, self.down_a, self.down_b)

    def forward(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: FrozenStack, down: FrozenStack) -> Tensor:
        """y (T, H) of the frozen experts with LoRA."""
        call = Call(gate_up, down, self.scale, self.summation, self.keep_gate_up, _experts_per_block(x))
        factors = working_factors(self.factors, x.dtype, _rank_multiple(x)) if self.enabled else None
        return expert_mlp(x, index, weight, factors, call)

    def extra_repr(self) -> str:
        """Shapes and settings, for print(model)."""
        shapes = ", ".join(f"{name} {tuple(factor.shape)}" for name, factor in self.factors._asdict().items())
        return f"{shapes}, scale {self.scale:g}, {self.summation}"


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls for one MoE layer: tokens (T, H), their experts and weights (T, k)."""
    gate_up, down = (_storage(getattr(experts, name)) for name in STACKS)
    lora = getattr(experts, "lora", None)
    if lora is not None:
        return lora(hidden_states, top_k_index, top_k_weights, gate_up, down)
    call = Call(gate_up, down, experts_per_block=_experts_per_block(hidden_states))
    return expert_mlp(hidden_states, top_k_index, top_k_weights, None, call)


def working_factors(factors: Factors, dtype: torch.dtype, multiple: int) -> Factors:
    """The factors in the tokens' precision, their rank padded with zeros to a multiple; gradients flow through."""
    a1, b1, a2, b2 = (factor.to(dtype) for factor in factors)
    missing = -a1.shape[-2] % multiple
    if missing:
        a1, a2 = (pad(a, (0, 0, 0, missing)) for a in (a1, a2))
        b1, b2 = (pad(b, (0, missing)) for b in (b1, b2))
    return Factors(a1, b1, a2, b2)


def expert_layers(model: nn.Module) -> dict[str, Any]:
    """The experts modules by their name in the base model, with or without PEFT around it.

    Raises ValueError when there are none or one is not of the shape we compute.
    """
    layers = {n.removeprefix(PREFIX): m for n, m in model.named_modules() if hasattr(m, "is_concatenated")}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no fused experts; expert LoRA needs a mixture-of-experts model")
    for name, experts in layers.items():
        strange = [trait for trait in ("has_bias", "is_transposed", "_is_expert_parallel") if getattr(experts, trait)]
        strange += [f"not {trait}" for trait in ("has_gate", "is_concatenated") if not getattr(experts, trait)]
        strange += [] if _is_silu(experts.act_fn) else [f"activation {type(experts.act_fn).__name__}"]
        if strange:
            raise ValueError(f"{name}: experts with {', '.join(strange)}; only silu-gated [gate; up] stacks are known")
    return layers


def attach_expert_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    layout: Layout = "per_expert",
    summation: Summation = "split",
    keep_gate_up: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, ExpertLora]:
    """Puts LoRA on the experts of every MoE layer, freezes their stacks and switches the model to our implementation.

    Accumulator summation moves unquantised stacks into storages with free columns. Call it after PEFT has attached its
    own targets: PEFT freezes whatever it finds that is not its own. Raises ValueError.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, experts in expert_layers(model).items():
        for stack in STACKS:
            weight = getattr(experts, stack)
            if isinstance(weight, nn.Parameter):
                weight.requires_grad_(False)
                if summation == "accumulator":
                    _replace(experts, stack, Dense(_refuse_partitioned(weight, name), -(-rank // 8) * 8))
        count, twice_width, hidden = _shape(experts.gate_up_proj)
        experts.lora = made[name] = ExpertLora(
            (count, hidden, twice_width // 2),
            rank,
            alpha,
            layout=layout,
            summation=summation,
            keep_gate_up=keep_gate_up,
            dtype=dtype,
            device=experts.gate_up_proj.device,
            generator=generator,
        )
    use_our_experts(model)
    return made


def use_our_experts(model: Any) -> None:
    """Switches all MoE layers of the model to our implementation."""
    model.set_experts_implementation(IMPLEMENTATION)


def use_storage(experts: Any, gate_up: FrozenStack, down: FrozenStack) -> None:
    """Lets one layer's experts read these storages instead of its parameters. Raises ValueError on another shape."""
    for name, storage in zip(STACKS, (gate_up, down), strict=True):
        given, expected = _shape(storage), _shape(getattr(experts, name))
        if given != expected:
            raise ValueError(f"{name}: storage of shape {given}; the model wants {expected}")
        _replace(experts, name, storage)


def quantise_experts(model: Any, kind: Literal["int8", "nf4"]) -> None:
    """Quantises every layer's stacks in place, one layer at a time, and switches to our implementation."""
    quantise = {"int8": Int8.quantise, "nf4": Nf4.quantise}[kind]
    for experts in expert_layers(model).values():
        gate_up, down = (getattr(experts, name) for name in STACKS)
        use_storage(experts, quantise(gate_up, len(gate_up)), quantise(down, len(down)))
    use_our_experts(model)


@contextmanager
def base_model_only(model: nn.Module) -> Iterator[None]:
    """Within it the experts compute without their LoRA."""
    modules = [module for module in model.modules() if isinstance(module, ExpertLora)]
    before = [module.enabled for module in modules]
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled


def _storage(stack: Any) -> FrozenStack:
    return stack if isinstance(stack, FrozenStack) else Dense(stack)


def _shape(stack: Any) -> tuple[int, int, int]:
    if isinstance(stack, FrozenStack):
        return stack.experts, stack.out_features, stack.in_features
    experts, rows, width = getattr(stack, "ds_shape", stack.shape)  # ZeRO-3 leaves a partitioned parameter shapeless
    return experts, rows, width


def _replace(experts: Any, name: str, storage: FrozenStack) -> None:
    delattr(experts, name)
    setattr(experts, name, storage)


def _refuse_partitioned(weight: Any, name: str) -> Tensor:
    if hasattr(weight, "ds_id"):
        raise ValueError(f"{name}: accumulator summation of a stack that ZeRO-3 partitions; use split summation")
    return weight


def _is_silu(activation: Any) -> bool:
    probe = torch.tensor([-1.5, 0.5])
    return bool(torch.equal(activation(probe), silu(probe)))


def _experts_per_block(x: Tensor) -> int | None:
    # One expert at a time costs no speed on CPU and the least memory; a GPU must not wait for row counts.
    return 1 if x.device.type == "cpu" else None


def _rank_multiple(x: Tensor) -> int:
    return 16 // x.element_size() if x.is_cuda else 1  # CUDA's grouped_mm wants strides of 16 bytes


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
