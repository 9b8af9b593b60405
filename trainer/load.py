"""Loads the base model, partitioned over the ranks or whole, and refuses one that is not what its files say."""

from __future__ import annotations

from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers import AutoModelForCausalLM

from recipes.catalog import Family
from recipes.job import read_record
from recipes.staged import STAGED, Kind, StagedModel
from trainer.base_files import BaseFiles, loading, refuse_incomplete
from trainer.experts.module import quantise_experts
from trainer.failures import TrainingStopped, explain
from trainer.quantised_linear import QuantisedLinear
from trainer.staged import STORAGES, load_staged, quantised_layers

Quantisation = Literal["int8", "nf4"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"By a recipe's word for its precision."


def load_partitioned(files: BaseFiles, family: Family, dtype: Any) -> Any:
    """The model under zero.Init, every parameter partitioned, its weights proven to be those of the files.

    HfDeepSpeedConfig must exist and be held by the caller. Raises TrainingStopped.
    """
    _refuse_other_kind(files, "bf16", "engine zero3 partitions bf16 weights")
    model = _loaded(files, family, dtype=dtype)
    refuse_unpartitioned(model)
    if family.moe_block:
        refuse_eager(model.config)
    probe_weights(model, files)
    return model


def load_whole(files: BaseFiles, family: Family, dtype: Any, device: Any, quantize: Quantisation | None) -> Any:
    """The whole model on one device, or spread over all for "auto", in the storage the recipe names.

    A staged model is read straight to its place. A plain one is quantised here, which takes room for all of it in
    `dtype`: fit for small models. Raises TrainingStopped.
    """
    if _refuse_other_kind(files, quantize or "bf16", f"the recipe says quantize {quantize or 'null'}"):
        return load_staged(files.folder, dtype, device)[0]
    model = _loaded(files, family, dtype=dtype, device_map="auto" if device == "auto" else {"": device})
    if quantize:
        quantise_in_memory(model, family, dtype, quantize)
    return model


def quantise_in_memory(model: Any, family: Family, dtype: Any, quantize: Quantisation) -> None:
    """Leaves the model as its staged form would be loaded: expert stacks and the family's linears in storages."""
    quantise = STORAGES[quantize].quantise
    for name in quantised_layers(model, family)[1]:
        parent, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        storage = quantise([linear.weight], 1)
        setattr(model.get_submodule(parent), last, QuantisedLinear(storage, linear.bias, dtype))
    if family.moe_block:
        quantise_experts(model, quantize)


def _refuse_other_kind(files: BaseFiles, wanted: Kind, why: str) -> bool:
    """Whether the folder is a staged model; refuses one that is held otherwise than wanted."""
    staged = read_record(StagedModel, files.folder / STAGED)
    if staged and staged.kind != wanted:
        raise TrainingStopped("bad_base_model", f"{files.folder} is staged as {staged.kind}, but {why}")
    return staged is not None


def _loaded(files: BaseFiles, family: Family, **how: Any) -> Any:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(files.folder, **how, **loading(family))
    except (RuntimeError, ValueError) as error:
        if explain(error)[0] != "unexpected":
            raise
        raise TrainingStopped("bad_base_model", f"{files.folder} does not load: {error}".splitlines()[0]) from error
    refuse_incomplete(info)
    model.config.use_cache = False
    return model


def refuse_unpartitioned(model: Any) -> None:
    """Refuses a model that every rank holds in full: HfDeepSpeedConfig is weakly referenced and may have been freed."""
    whole = [name for name, p in model.named_parameters() if not hasattr(p, "ds_id")]
    if whole:
        raise TrainingStopped(
            "unexpected", f"{whole[0]} is not partitioned: HfDeepSpeedConfig was not alive at loading"
        )


def refuse_eager(config: Any) -> None:
    """Refuses eager experts under ZeRO-3: uneven routing hangs it, at a step nobody can foretell."""
    if getattr(config, "_experts_implementation", None) == "eager":
        raise TrainingStopped("unexpected", "eager experts hang under ZeRO-3; load with grouped_mm")


def refuse_gathered(model: Any) -> None:
    """After attaching the adapter: every frozen parameter must still be partitioned, nothing gathered for it."""
    held = [
        n for n, p in model.named_parameters() if hasattr(p, "ds_id") and p.ds_status != ZeroParamStatus.NOT_AVAILABLE
    ]
    if held:
        raise TrainingStopped("unexpected", f"{held[0]} was gathered while the adapter was attached")


def probe_weights(model: Any, files: BaseFiles) -> None:
    """Gathers embedding, head, the first q_proj and the first expert stack, and compares them with the files' bytes.

    Collective. Loading under zero.Init has left weights random before, without a word.
    """
    named = dict(model.named_parameters())
    for name in _probe_names(model, named):
        with deepspeed.zero.GatheredParameters([named[name]]):
            if dist.get_rank() == 0:
                refuse_difference(name, named[name], files)


def refuse_difference(name: str, parameter: Any, files: BaseFiles) -> None:
    """Refuses a gathered parameter whose numbers are not those of the files, in the parameter's precision."""
    expected = files.tensor(name).to(parameter.dtype)
    if not torch.equal(parameter.detach().cpu(), expected):
        raise TrainingStopped("bad_base_model", f"{name}: loaded numbers differ from the files of {files.folder}")


def _probe_names(model: Any, named: dict[str, Any]) -> list[str]:
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    names = [name for name, p in named.items() if any(p is table for table in tables)]
    names += [name for name in named if name.endswith("q_proj.weight")][:1]
    return names + [name for name, p in named.items() if len(p.ds_shape) == 3 and ".experts." in name][:1]
