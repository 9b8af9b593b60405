"""How many parameters are held at each precision: what the log says, and what a surprise would be."""

from __future__ import annotations

from collections import Counter
from typing import Any

from recipes.recipe import Recipe
from trainer.experts.module import STACKS
from trainer.experts.quantised import Int8, Nf4
from trainer.experts.storage import FrozenStack
from trainer.failures import TrainingStopped
from trainer.load import DTYPES


def precision_of(held: Any) -> str:
    """The word for how a parameter or a frozen stack is held: int8, nf4, or torch's name of its dtype."""
    if isinstance(held, Int8):
        return "int8"
    if isinstance(held, Nf4):
        return "nf4"
    dtype = held.weight.dtype if isinstance(held, FrozenStack) else held.dtype
    return str(dtype).removeprefix("torch.")


def frozen(model: Any) -> dict[str, Any]:
    """Everything frozen by name: parameters, and stacks that lie in storages of their own."""
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, FrozenStack)}
    return stacks | {name: p for name, p in model.named_parameters() if not p.requires_grad}


def shares(model: Any) -> dict[str, int]:
    """Frozen parameters per precision."""
    counts: Counter[str] = Counter()
    for held in frozen(model).values():
        counts[precision_of(held)] += _size(held)
    return dict(counts)


def describe(model: Any, optimizer: str | None) -> str:
    """One line for the log."""
    counts = shares(model)
    total = sum(counts.values())
    said = ", ".join(f"{count:,} {name} ({count / total:.1%})" for name, count in sorted(counts.items()))
    adapter: Counter[str] = Counter()
    for p in model.parameters():
        if p.requires_grad:
            adapter[precision_of(p)] += _size(p)
    trained = ", ".join(f"{count:,} {name}" for name, count in sorted(adapter.items()))
    moments = "8-bit" if optimizer == "adamw_8bit" else "float32"
    return f"frozen: {said}; adapter: {trained}; optimizer {moments}"


def refuse_surprises(model: Any, recipe: Recipe) -> None:
    """Refuses a model held otherwise than the recipe says: experts left in 16 bit fill the memory without a word.

    Stacks of experts must be in the recipe's storage, all else in it or in the recipe's precision. Raises
    TrainingStopped (bad_base_model).
    """
    precision, quantize = str(DTYPES[recipe.training.precision]).removeprefix("torch."), recipe.hardware.quantize
    for name, held in frozen(model).items():
        is_stack = isinstance(held, FrozenStack) or name.rpartition(".")[2] in STACKS
        allowed = {quantize or precision} if is_stack else {precision, quantize}
        if precision_of(held) not in allowed:
            wanted = quantize if is_stack and quantize else precision
            raise TrainingStopped("bad_base_model", f"{name} is held in {precision_of(held)}; the recipe says {wanted}")


def _size(held: Any) -> int:
    if isinstance(held, FrozenStack):
        return held.experts * held.out_features * held.in_features
    return int(getattr(held, "ds_numel", held.numel()))
