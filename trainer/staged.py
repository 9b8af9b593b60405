"""Loads a staged model: built on the meta device, proven to fit its files, then filled in one pass over them.

model, record = load_staged(Path("/models/Qwen--Qwen3-Next-80B-A3B-Instruct.nf4"), torch.bfloat16, torch.device("cuda"))
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.catalog import Family
from recipes.job import read_record
from recipes.staged import STAGED, StagedModel
from trainer.experts.module import STACKS, use_our_experts
from trainer.experts.quantised import Int8, Nf4, storage_from_tensors
from trainer.experts.storage import FrozenStack
from trainer.failures import TrainingStopped
from trainer.quantised_linear import QuantisedLinear
from trainer.shards import Header, read_shard

STORAGES = {"int8": Int8, "nf4": Nf4}
_PARTS = r"codes|scales|scale_codes|scale_steps|scale_means"
Progress = Callable[[int], None]
"Called with the bytes done since the last call."


def load_staged(
    folder: Path, dtype: torch.dtype, device: Any, progress: Progress = lambda count: None
) -> tuple[Any, StagedModel]:
    """The model with its storages on `device`, every parameter frozen, and the record of its folder.

    Weights that are not quantised come in `dtype`. Raises TrainingStopped (bad_base_model) before a byte of weights is
    read when record, files and config.json do not say the same, and after a file whose checksum is wrong.
    """
    record, headers = staged_files(folder)
    model = empty_model(folder, dtype).requires_grad_(False)
    layout = {name: header.empty(name, device="meta") for header in headers.values() for name in header.tensors}
    install_storages(model, layout, dtype)
    refuse_other_names(_filled(model), layout, folder)
    _refuse_other_parameters(model, record, folder)
    for name, header in headers.items():
        for tensor_name, tensor in read_shard(header, record.files[name].crc32, device):
            _set(model, tensor_name, tensor)
        progress(record.files[name].bytes)
    _finish(model, device)
    return model, record


def empty_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model of the folder's config.json without storage: on the meta device."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def staged_files(folder: Path) -> tuple[StagedModel, dict[str, Header]]:
    """The record of a staged folder and its files in the order in which they are read, each of the recorded length.

    Raises TrainingStopped.
    """
    record = read_record(StagedModel, folder / STAGED)
    if record is None:
        raise TrainingStopped(
            "bad_base_model", f"{folder}: no {STAGED}; stage the model with `lorry stage MODEL --quantize int8|nf4`"
        )
    return record, {name: _header(folder, name, record) for name in record.files}


def quantised_layers(model: Any, family: Family) -> tuple[list[str], list[str]]:
    """(names of fused expert stacks, names of linear layers) that a quantised model holds in storages.

    The linears are those that a target group of the family reaches; router, gates of shared experts, norms,
    embedding and head stay as they are: they are small, and what they decide is delicate.
    """
    suffixes = {s for group in family.groups.values() for s in group.linears}
    suffixes |= {p.removesuffix(".weight") for group in family.groups.values() for p in group.parameters}
    stacks = [
        f"{name}.{stack}"
        for name, module in model.named_modules()
        if hasattr(module, "is_concatenated")
        for stack in STACKS
    ]
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name.endswith(f".{suffix}") for suffix in suffixes)
    ]
    return stacks, linears


def install_storages(model: Any, layout: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Puts storages of these (meta) tensors into the model, where their names say: `<stack>.codes` in place of an
    expert stack, `<linear>.storage.codes` in place of a linear layer. Raises TrainingStopped when one does not fit."""
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in layout.items():
        if match := re.fullmatch(rf"(.+)\.({_PARTS})", name):
            groups[match[1]][match[2]] = tensor
    for place, tensors in groups.items():
        try:
            _install(model, place, storage_from_tensors(tensors), dtype)
        except (ValueError, AttributeError) as error:
            raise TrainingStopped("bad_base_model", f"{place}: {error}; stage the model again") from None
    if any(not place.endswith(".storage") for place in groups):
        use_our_experts(model)


def parameters_by_precision(model: Any) -> dict[str, int]:
    """How many weights of the model are held in which precision: int8, nf4 or the name of torch's dtype."""
    counts: Counter[str] = Counter()
    kinds = {storage: kind for kind, storage in STORAGES.items()}
    for module in model.modules():
        if isinstance(module, FrozenStack):
            kind = kinds.get(type(module)) or str(next(module.buffers()).dtype).removeprefix("torch.")
            counts[kind] += module.experts * module.out_features * module.in_features
    for parameter in model.parameters():
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return dict(sorted(counts.items()))


def _header(folder: Path, name: str, record: StagedModel) -> Header:
    path = folder / Path(name).name
    size = path.stat().st_size if path.is_file() else None
    if size != record.files[name].bytes:
        said = "missing" if size is None else f"{size} bytes, {STAGED} says {record.files[name].bytes}"
        raise TrainingStopped("bad_base_model", f"{path}: {said}; stage the model again")
    return Header(path)


def _install(model: Any, place: str, storage: FrozenStack, dtype: torch.dtype) -> None:
    linear = place.endswith(".storage")
    name = place.removesuffix(".storage")
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    old = getattr(module, last)
    found = (storage.experts, storage.out_features, storage.in_features)
    wanted = (1, *old.weight.shape) if linear else tuple(old.shape)
    if found != wanted:
        raise ValueError(f"storage of shape {found}; the model wants {wanted}")
    delattr(module, last)
    setattr(module, last, QuantisedLinear(storage, old.bias, dtype) if linear else storage)


def refuse_other_names(model: Mapping[str, Any], layout: Mapping[str, Tensor], folder: Path) -> None:
    """Refuses files of which the tensors are not the model's: some would stay without numbers, others be ignored."""
    wanted = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in model.items()}
    found = {name: tuple(tensor.shape) for name, tensor in layout.items()}
    if odd := sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n)):
        name = odd[0]
        said = f"{name} is {_shape(found.get(name))} in the files and {_shape(wanted.get(name))} in the model"
        raise TrainingStopped("bad_base_model", f"{folder}: {len(odd)} tensors differ, first: {said}; stage it again")


def _refuse_other_parameters(model: Any, record: StagedModel, folder: Path) -> None:
    found = parameters_by_precision(model)
    quantised = {kind: count for kind, count in found.items() if kind in STORAGES}
    recorded = {kind: count for kind, count in record.parameters.items() if kind in STORAGES}
    if quantised != recorded or sum(found.values()) != sum(record.parameters.values()):
        raise TrainingStopped(
            "bad_base_model", f"{folder}: its files hold {found} weights, its {STAGED} says {record.parameters}"
        )


def _filled(model: Any) -> dict[str, Tensor]:
    """The tensors that files must hold: parameters, each once, and persistent buffers."""
    state = {name: parameter for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())
    return state | {name: buffers[name] for name in model.state_dict() if name in buffers}


def _set(model: Any, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = tensor.to(getattr(module, last).dtype)
    setattr(module, last, nn.Parameter(tensor, requires_grad=False) if last in module._parameters else tensor)


def _finish(model: Any, device: Any) -> None:
    """Makes what no file holds: rotary frequencies, which their module computes, and tied weights."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            fresh = type(module)(config=module.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    model.tie_weights()
    if left := [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise TrainingStopped("bad_base_model", f"{left[0]} is in no file of the staged model")
    model.config.use_cache = False
    model.eval()


def _shape(shape: Any) -> str:
    return "missing" if shape is None else str(tuple(shape))
