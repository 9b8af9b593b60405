"""Loads the base model, partitioned over the ranks or whole, and refuses one that is not what its files say."""

from __future__ import annotations

from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

from recipes.catalog import Family
from recipes.job import read_record
from recipes.recipe import Recipe
from recipes.staged import STAGED, Kind, StagedModel
from trainer.base_files import FP8, MXFP4, BaseFiles, loading, refuse_incomplete
from trainer.experts.module import quantise_experts
from trainer.failures import TrainingStopped, explain
from trainer.quantised_linear import QuantisedLinear
from trainer.shards import read_shard
from trainer.staged import STORAGES, load_staged, quantised_layers, refuse_other_names, staged_files

Quantisation = Literal["int8", "nf4"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"By a recipe's word for its precision."


def load_partitioned(files: BaseFiles, family: Family, dtype: Any) -> Any:
    """The model under zero.Init, every parameter partitioned, its weights proven to be those of the files.

    HfDeepSpeedConfig must exist and be held by the caller. Raises TrainingStopped.
    """
    if _refuse_other_kind(files, "bf16", "engine zero3 partitions bf16 weights"):
        model = _partitioned_from_staged(files, family, dtype)
    else:
        model = _loaded(files, family, dtype=dtype)
    refuse_unpartitioned(model)
    if family.moe_block:
        refuse_eager(model.config)
    probe_weights(model, files)
    return model


def _partitioned_from_staged(files: BaseFiles, family: Family, dtype: Any) -> Any:
    """Rank 0 reads every file once, front to back, and hands each tensor to the ranks that hold a share of it."""
    record, headers = staged_files(files.folder)
    config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False, local_files_only=True)
    experts = {"experts_implementation": "grouped_mm"} if family.moe_block else {}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **experts)
    named = dict(model.named_parameters())
    layout = {name: header.empty(name, device="meta") for header in headers.values() for name in header.tensors}
    refuse_other_names(named, layout, files.folder)
    for file, header in headers.items():
        read = read_shard(header, record.files[file].crc32, "cpu") if dist.get_rank() == 0 else None
        for name in header.in_order():
            with deepspeed.zero.GatheredParameters([named[name]], modifier_rank=0):
                if read is not None:
                    named[name].data.copy_(next(read)[1])
        if read is not None:
            next(read, None)  # compares the file's sum
    model.config.use_cache = False
    return model


def load_whole(files: BaseFiles, family: Family, dtype: Any, device: Any, quantize: Quantisation | None) -> Any:
    """The whole model on one device, or spread over all for "auto", in the storage the recipe names.

    A staged model is read straight to its place. A plain one is quantised here, which takes room for all of it in
    `dtype`: fit for small models. Raises TrainingStopped.
    """
    if _refuse_other_kind(files, quantize or "bf16", f"the recipe says quantize {quantize or 'null'}"):
        return load_staged(files.folder, dtype, device)[0]
    where = {"device_map": "auto" if device == "auto" else {"": device}}
    if files.quantised_by == FP8:
        where["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    model = _loaded(files, family, dtype=dtype, **where)
    if quantize:
        quantise_in_memory(model, family, dtype, quantize)
    return model


def refuse_quantised(files: BaseFiles, recipe: Recipe) -> None:
    """Refuses a published checkpoint that is quantised, but for one of FP8 whose experts stay as they are.

    Its weights are decoded as they are loaded, and take the room of the recipe's precision. Raises TrainingStopped.
    """
    method = files.quantised_by
    if method is None:
        return
    why = f"{files.folder} is quantised by its publisher ({method})"
    instead = f"or stage the bf16 checkpoint: `lorry stage {recipe.base.id}`"
    if method == MXFP4:
        step = "make bf16 of it with `python -m trainer.quantize --kind bf16`, and stage that folder"
        raise TrainingStopped("bad_base_model", f"{why}, which is not read here; {step}")
    if method != FP8:
        raise TrainingStopped("bad_base_model", f"{why}, which is not read here; stage the bf16 checkpoint instead")
    if "experts" in recipe.adapter.targets:
        raise TrainingStopped(
            "bad_base_model",
            f"{why}, and its experts cannot be trained; take experts out of adapter.targets, {instead}",
        )
    if recipe.hardware.engine != "replica" or recipe.hardware.quantize:
        raise TrainingStopped(
            "bad_base_model", f"{why}; say engine replica and quantize null, by which it is decoded, {instead}"
        )


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
