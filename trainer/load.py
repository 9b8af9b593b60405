"""Loads the base model partitioned over the ranks, and refuses one that is not what its files say."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers import AutoModelForCausalLM

from recipes.catalog import Family
from trainer.base_files import BaseFiles, loading, refuse_incomplete
from trainer.failures import TrainingStopped, explain


def load_base(files: BaseFiles, family: Family, dtype: Any) -> Any:
    """The model under zero.Init, every parameter partitioned, its weights proven to be those of the files.

    HfDeepSpeedConfig must exist and be held by the caller. Raises TrainingStopped.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(files.folder, dtype=dtype, **loading(family))
    except (RuntimeError, ValueError) as error:
        if explain(error)[0] != "unexpected":
            raise
        raise TrainingStopped("bad_base_model", f"{files.folder} does not load: {error}".splitlines()[0]) from error
    refuse_incomplete(info)
    refuse_unpartitioned(model)
    if family.moe_block:
        refuse_eager(model.config)
    probe_weights(model, files)
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
