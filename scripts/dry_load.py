"""Loads an adapter the way vLLM would, without vLLM, torch or a GPU: names and shapes against its rules.

problems = dry_load(Path("adapter"), "Qwen/Qwen3-8B", Server(max_lora_rank=32))      # [] when every tensor acts

vLLM skips some tensors without a word: those whose module it does not have, and fused expert tensors on a model whose
experts it reads one by one (their names hold `base_layer`, which its name check passes over). Each is named here.
Rules: vLLM 0.33.0 lora/lora_model.py, peft_helper.py and layers/fused_moe.py, read 2026-11.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.catalog import BaseModelFacts, Shape, load_catalog
from recipes.served import ServedFamily, served_families
from scripts.errors import InputError, Problem
from scripts.plan.parameters import matrices

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"What --max-lora-rank may be."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<kind>[AB])\.weight")
_LAYER = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_EXPERT = re.compile(r"mlp\.experts\.(?P<expert>\d+)\.(?P<projection>gate_proj|up_proj|down_proj)")
_SHARED = re.compile(r"mlp\.experts\.(w[123])")
_FUSED = {"mlp.experts.base_layer": "mlp.experts.gate_up_proj", "mlp.experts": "mlp.experts.down_proj"}
_REFUSED = {  # field of adapter_config.json -> its only value that vLLM takes
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
}
_BYTES = 2  # adapters are held in bf16


@dataclass(frozen=True)
class Server:
    """How a vLLM server was started. expert_gib: GPU memory left for LoRA buffers of experts, where that is known."""

    max_lora_rank: int = 16
    max_loras: int = 1
    served_name: str | None = None
    "The name of the base model there; None is the model's own."
    mixed_expert_formats: bool = False
    "--enable-mixed-moe-lora-format."
    shared_experts: bool = False
    "--enable-moe-shared-loras: the factors on the hidden dimension are one for all experts of a layer."
    expert_gib: float | None = None


def dry_load(folder: Path, base: str, server: Server) -> list[Problem]:
    """Everything for which vLLM would refuse the adapter, or load it and ignore a part; empty when all of it acts.

    Raises InputError for a base model that is not in the catalog or no adapter folder.
    """
    facts, served = _facts(base)
    config = _config(folder / "adapter_config.json")
    shapes = tensor_shapes(folder / "adapter_model.safetensors")
    problems = [*_config_problems(folder, config, base, server), *_memory(folder, facts.shape, server)]
    rank = config.get("r")
    where = str(folder / "adapter_model.safetensors")
    grouped = sorted(_tensor_faults(shapes, facts.shape, served, server, rank if isinstance(rank, int) else 0))
    for fault, names in _by_fault(grouped).items():
        first = f"{len(names)} of {len(shapes)} tensors {fault}, first {names[0]}"
        problems.append(Problem(where, first, _CURES.get(fault.partition(":")[0], "train and export it again")))
    return problems


def expert_buffer_gib(shape: Shape, max_lora_rank: int, max_loras: int = 1, *, shared: bool = False) -> float:
    """GPU memory in GiB that vLLM takes for LoRA of experts, at its largest rank, even for adapters without any.

    Per layer, expert and unit of rank: gate and up (in + out each) and down (in + out); 48 layers x 512 experts x
    7,680 x 2 bytes are 0.35 GiB per unit of rank on Qwen3-Next-80B; 0.07 where the hidden side is `shared`.
    """
    hidden = 3 * shape.hidden * (1 if shared else shape.experts)
    inner = 3 * shape.expert_intermediate * shape.experts
    return shape.expert_layers * (hidden + inner) * max_lora_rank * max_loras * _BYTES / 2**30


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape, from the header of a safetensors file. Raises InputError when it is none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= min(10**8, path.stat().st_size) else {}
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        shapes = {}
    if not shapes:
        raise InputError(Problem(str(path), "not a safetensors file", "the folder of an adapter"))
    return shapes


_CURES = {
    "would be ignored, loaded or not": "serve it merged (`lorry merge`), or train the other targets alone",
    "would be ignored": "export it with `lorry export --for vllm`",
    "would be refused": "export it with `lorry export --for vllm`",
}


def _facts(base: str) -> tuple[BaseModelFacts, ServedFamily]:
    catalog = load_catalog()
    facts = catalog.models.get(base)
    if facts is None:
        raise InputError(Problem("base model", f"'{base[:120]}' is not in recipes/models.yaml", "one that is"))
    model_type = catalog.families[facts.family].model_type
    served = served_families().get(model_type)
    if served is None:
        known = ", ".join(served_families())
        raise InputError(Problem("base model", f"nobody has checked how vLLM serves {model_type}", f"one of {known}"))
    return facts, served


def _config(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise InputError(Problem(str(path), "not the configuration of an adapter", "the folder of an adapter"))
    return value


def _config_problems(folder: Path, config: Mapping[str, Any], base: str, server: Server) -> Iterator[Problem]:
    where = str(folder / "adapter_config.json")
    for name, allowed in _REFUSED.items():
        if config.get(name) not in (allowed, None, []):
            yield Problem(where, f"{name} is {config[name]!r}, which vLLM refuses", f"train with {name}: {allowed}")
    if config.get("init_lora_weights") not in (True, False, None, "gaussian"):
        got = f"init_lora_weights {config['init_lora_weights']!r} changed the base's own weights"
        yield Problem(where, got, "convert it to a plain LoRA first")
    if server.max_lora_rank not in RANKS:
        yield Problem("--max-lora-rank", str(server.max_lora_rank), f"one of {', '.join(map(str, RANKS))}")
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        yield Problem(where, f"rank {config.get('r')!r}", "a whole number above 0")
    elif max(ranks) > server.max_lora_rank:
        want = f"start the server with --max-lora-rank {next((r for r in RANKS if r >= max(ranks)), RANKS[-1])}"
        yield Problem(where, f"rank {max(ranks)}, above the server's {server.max_lora_rank}", want)
    named, wanted = config.get("base_model_name_or_path"), server.served_name or base
    if named != wanted:
        want = f"{wanted}: the server's filesystem resolver compares the names letter by letter"
        yield Problem(where, f"base_model_name_or_path is {named!r}", want)


def _memory(folder: Path, shape: Shape, server: Server) -> Iterator[Problem]:
    if shape.experts and server.expert_gib is not None:
        needed = expert_buffer_gib(shape, server.max_lora_rank, server.max_loras, shared=server.shared_experts)
        if needed > server.expert_gib:
            got = (
                f"{server.max_loras} x rank {server.max_lora_rank} takes {needed:.1f} GiB for {shape.experts} experts"
                f" in {shape.layers} layers, and there are {server.expert_gib:.1f} GiB"
            )
            yield Problem("GPU memory", got, "a lower --max-lora-rank, or a GPU with more memory")


def _tensor_faults(
    shapes: Mapping[str, tuple[int, ...]], shape: Shape, served: ServedFamily, server: Server, rank: int
) -> Iterator[tuple[str, str]]:
    """(fault, tensor) of every tensor that would not act."""
    sizes = _sizes(shape)
    for name, found in shapes.items():
        match = _KEY.fullmatch(name)
        if match is None:
            yield "would be refused: not a LoRA matrix", name
            continue
        other = name.replace(".lora_A.", ".lora_B.") if match["kind"] == "A" else name.replace(".lora_B.", ".lora_A.")
        if other not in shapes:
            yield "would be ignored: the other half of the pair is missing", name
        elif fault := _fault(match["module"], match["kind"], found, sizes, shape, served, server, rank):
            yield fault, name


def _fault(
    module: str,
    kind: str,
    found: tuple[int, ...],
    sizes: Mapping[str, tuple[int, int]],
    shape: Shape,
    served: ServedFamily,
    server: Server,
    rank: int,
) -> str:
    """Why one matrix would not act; empty when it would."""
    at = _LAYER.fullmatch(module)
    if at is None or int(at["layer"]) >= shape.layers:
        return "would be ignored: the model has no such layer"
    rest, experts = at["rest"], 1
    if shared := _SHARED.fullmatch(rest):
        return _shared_fault(shared[1], kind, found, shape, server, rank)
    if rest in _FUSED:
        if served.experts == "one_by_one" and not server.mixed_expert_formats:
            return "would be ignored: fused experts, and vLLM reads this model's experts one by one"
        rest, experts = _FUSED[rest], shape.experts
    elif expert := _EXPERT.fullmatch(rest):
        if server.shared_experts:
            return "would be refused: single experts, and the server runs with --enable-moe-shared-loras"
        if served.experts != "one_by_one":
            return "would be refused: single experts, and vLLM reads this model's experts fused"
        if int(expert["expert"]) >= shape.experts:
            return "would be ignored: the model has no such expert"
        rest = f"mlp.experts.*.{expert['projection']}"
    elif rest.rpartition(".")[2] in served.ignored:
        return "would be ignored, loaded or not: vLLM computes this module without LoRA"  # served.yaml says why
    elif rest.rpartition(".")[2] not in served.modules:
        return "would be refused: vLLM knows no such module"
    if rest not in sizes or not _in_layer(rest, int(at["layer"]), shape):
        return "would be ignored: this layer has no such module"
    outputs, inputs = sizes[rest]
    wanted = (experts * rank, inputs) if kind == "A" else (outputs, experts * rank)
    return "" if found == wanted else f"would be refused: shape {list(found)} where {list(wanted)} fits"


def _shared_fault(part: str, kind: str, found: tuple[int, ...], shape: Shape, server: Server, rank: int) -> str:
    """The same of a shared-outer matrix: w1 gate and w3 up share their A, w2 down its B."""
    if not shape.experts:
        return "would be ignored: this layer has no such module"
    if not server.shared_experts:
        return "would be refused: shared experts, and the server runs without --enable-moe-shared-loras"
    outer = (kind == "A") == (part != "w2")
    width = shape.hidden if outer else shape.expert_intermediate
    wanted = (1 if outer else shape.experts, *((rank, width) if kind == "A" else (width, rank)))
    return "" if found == wanted else f"would be refused: shape {list(found)} where {list(wanted)} fits"


def _sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Module inside a layer -> (outputs, inputs) of its weight."""
    places = {"attention": "self_attn.", "linear_attention": "linear_attn.", "mlp": "mlp."}
    sizes = {
        places.get(group, "") + matrix.name.removesuffix(".weight"): (matrix.outputs, matrix.inputs)
        for group, found in matrices(shape).items()
        for matrix in found
    }
    width, hidden = shape.expert_intermediate, shape.hidden
    single = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return sizes | ({f"mlp.experts.*.{name}": size for name, size in single.items()} if shape.experts else {})


def _in_layer(rest: str, layer: int, shape: Shape) -> bool:
    """Every so many layers the hybrids have softmax attention, the others linear attention; the first may be dense."""
    if shape.experts and rest.startswith("mlp."):
        return rest.startswith(("mlp.experts.", "mlp.shared_expert")) == (layer >= shape.dense_layers)
    is_attention = (layer + 1) % (shape.layers // shape.attention_layers) == 0
    return is_attention if rest.startswith("self_attn.") else not (is_attention and rest.startswith("linear_attn."))


def _by_fault(faults: list[tuple[str, str]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for fault, name in faults:
        grouped.setdefault(fault, []).append(name)
    return grouped
