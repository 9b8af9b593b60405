"""A base model with an adapter from its file, in the arithmetic the adapter was trained in, ready to answer.

model, tensors = load_adapter(model_folder, job / "adapter", family, spec.recipe)
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from recipes.catalog import Family
from recipes.recipe import Recipe
from trainer.base_files import BaseFiles, loading, refuse_incomplete
from trainer.experts.module import use_our_experts
from trainer.experts.projection import Summation
from trainer.export import WEIGHTS, file_tensors, read_adapter
from trainer.failures import TrainingStopped
from trainer.load import DTYPES, load_whole
from trainer.targets import attach, meta_model, named_trainable, plan_targets


def load_adapter(model_folder: Path, adapter: Path, family: Family, recipe: Recipe) -> tuple[Any, int]:
    """(the model with the adapter in eval mode, tensors of the file that it took up: all). Raises TrainingStopped."""
    experts_in_bf16 = "experts" in recipe.adapter.targets and recipe.training.precision == "bf16"
    if recipe.hardware.quantize or experts_in_bf16:
        return _with_our_modules(model_folder, adapter, family, recipe)
    model, consumed = _with_peft(model_folder, adapter, family, DTYPES[recipe.training.precision])
    if family.our_experts and recipe.training.precision == "bf16":
        use_our_experts(model)  # rounded as in training, or near-ties in the routers fall otherwise
    return model, consumed


def _with_peft(model_folder: Path, adapter: Path, family: Family, dtype: torch.dtype) -> tuple[Any, int]:
    model, info = AutoModelForCausalLM.from_pretrained(
        model_folder,
        dtype=dtype,
        device_map="auto" if torch.cuda.is_available() else None,
        **loading(family),
    )
    refuse_incomplete(info)
    try:
        peft_model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    except (SafetensorError, ValueError, RuntimeError, OSError, KeyError) as error:
        raise TrainingStopped("no_effect", f"PEFT cannot load the adapter: {error}".splitlines()[0]) from error
    return peft_model.eval(), consumed_tensors(peft_model, adapter / WEIGHTS)


def _with_our_modules(model_folder: Path, adapter: Path, family: Family, recipe: Recipe) -> tuple[Any, int]:
    """The adapter attached as in training and filled from the file."""
    dtype = DTYPES[recipe.training.precision]
    device = "auto" if torch.cuda.is_available() and not recipe.hardware.quantize else _one_device()
    model = load_whole(BaseFiles(model_folder), family, dtype, device, recipe.hardware.quantize)
    plan = plan_targets(meta_model(model.config, dtype), family, recipe.adapter)
    summation: Summation = "accumulator" if recipe.hardware.engine == "replica" else "split"
    attach(model, family, recipe.adapter, plan, seed=0, dtype=dtype, summation=summation)
    if family.our_experts:
        use_our_experts(model)
    try:
        weights = read_adapter(adapter / WEIGHTS, plan)
    except (SafetensorError, ValueError) as error:
        raise TrainingStopped("no_effect", f"the adapter cannot be loaded: {error}".splitlines()[0]) from error
    with torch.no_grad():
        for name, parameter in named_trainable(model).items():
            parameter.copy_(weights[name])
    return model.eval(), len(file_tensors(weights))


def _one_device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def consumed_tensors(peft_model: Any, path: Path) -> int:
    """How many tensors the file holds, each proven to be in the model. PEFT only warns about keys it cannot place."""
    inside = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    with safe_open(path, "pt") as file:
        strange = sorted(set(file.keys()) ^ set(inside))
        if strange:
            raise TrainingStopped(
                "no_effect", f"{len(strange)} adapter tensors have no counterpart, first {strange[0]}"
            )
        for key, tensor in inside.items():
            if not torch.equal(tensor.cpu(), file.get_tensor(key).to(tensor.dtype)):
                raise TrainingStopped("no_effect", f"{key} was not loaded from the file")
    return len(inside)


def quiet_transformers() -> None:
    """No progress bars and no advice in the log."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
