"""What leaves Lorry: adapters that vLLM would use to the last tensor, and recipes that other trainers can read."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.catalog import load_catalog
from recipes.job import LaunchSpec, read_record
from recipes.recipe import Adapter, Recipe
from recipes.served import served_families
from scripts.dry_load import Server, dry_load, expert_buffer_gib
from scripts.errors import InputError, Refused
from scripts.foreign_recipes import foreign_files
from scripts.plan.parameters import targeted
from scripts.store.base import sha256_of
from trainer.convert import convert

BASE = "lorry/smoke"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def converted(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "vllm"
    convert(made.job("good-1") / "adapter", folder)
    return folder


@pytest.fixture
def adapter(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "adapter"))


def _with_header(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrites the header alone: the dry loader looks at nothing else."""
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _with_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_export_for_vllm_holds_the_same_numbers_and_every_tensor_would_act(desk: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from trainer.experts.layouts import from_vllm, to_peft

    done = desk.lorry("export", "good-1", "--for", "vllm", "--to", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "would use all" in done.stdout
    assert dry_load(tmp_path / "out", BASE, Server(max_lora_rank=8)) == []
    original = load_file(desk.job("good-1") / "adapter" / WEIGHTS)
    written = load_file(tmp_path / "out" / WEIGHTS)
    back = {k: t for k, t in written.items() if ".mlp.experts." not in k} | to_peft(from_vllm(written, 8))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], original[key]) for key in original)


def test_shared_experts_act_on_a_server_that_shares_them_and_nowhere_else(
    desk: Any, tmp_path: Path, converted: Path
) -> None:
    refused = desk.lorry("export", "good-1", "--for", "shared", "--to", str(tmp_path / "none"))
    assert refused.returncode == 3
    assert "a factor of the hidden dimension differs between experts" in refused.stderr
    assert not (tmp_path / "none").exists()
    _share_factors(desk.job("good-1") / "adapter")
    done = desk.lorry("export", "good-1", "--for", "shared", "--to", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "--max-lora-rank 8 --enable-moe-shared-loras" in done.stdout
    shares, does_not = Server(max_lora_rank=8, shared_experts=True), Server(max_lora_rank=8)
    assert dry_load(tmp_path / "out", BASE, shares) == []
    assert "24 of" in dry_load(tmp_path / "out", BASE, does_not)[0].got
    assert "without --enable-moe-shared-loras" in dry_load(tmp_path / "out", BASE, does_not)[0].got
    assert "runs with --enable-moe-shared-loras" in dry_load(converted, BASE, shares)[0].got


def _share_factors(adapter: Path) -> None:
    """What training with expert_layout: shared_outer leaves: the hidden side of every expert is that of the first."""
    from safetensors.torch import load_file, save_file

    from trainer.experts.layouts import from_peft, to_peft

    tensors = load_file(adapter / WEIGHTS)
    layers = {
        name: f._replace(gate_up_a=f.gate_up_a[:1].expand_as(f.gate_up_a), down_b=f.down_b[:1].expand_as(f.down_b))
        for name, f in from_peft(tensors, 8).items()
    }
    save_file(tensors | to_peft(layers), adapter / WEIGHTS, metadata={"format": "pt"})
    manifest = json.loads((adapter / "manifest.json").read_text())
    manifest["files"][WEIGHTS] = sha256_of(adapter / WEIGHTS)
    (adapter / "manifest.json").write_text(json.dumps(manifest))


def test_the_adapter_as_trained_comes_out_verified_but_vllm_would_ignore_its_experts(desk: Any, tmp_path: Path) -> None:
    done = desk.lorry("export", "good-1", "--for", "peft", "--to", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert desk.lorry("verify", str(tmp_path / "out")).returncode == 0
    (problem,) = dry_load(tmp_path / "out", BASE, Server())
    assert "16 of" in problem.got
    assert "would be ignored: fused experts" in problem.got
    assert "--for vllm" in problem.want


@pytest.mark.parametrize(
    ("damage", "server", "sentence"),
    [
        (lambda f: _with_config(f, r=64), Server(max_lora_rank=64), "would be refused: shape"),
        (lambda f: None, Server(max_lora_rank=1), "rank 8, above the server's 1"),
        (lambda f: None, Server(max_lora_rank=10), "one of 1, 8, 16"),
        (lambda f: _with_config(f, base_model_name_or_path="Qwen/Qwen3-8B"), Server(), "letter by letter"),
        (lambda f: None, Server(served_name="my-model"), "letter by letter"),
        (lambda f: _with_config(f, use_dora=True), Server(), "use_dora is True, which vLLM refuses"),
        (lambda f: _with_config(f, modules_to_save=["lm_head"]), Server(), "modules_to_save"),
        (lambda f: _with_config(f, rank_pattern={"q_proj": 32}), Server(), "rank 32, above the server's 16"),
        (lambda f: _with_config(f, init_lora_weights="pissa"), Server(), "changed the base's own weights"),
        (
            lambda f: _with_header(f, lambda h: {k.replace("in_proj_qkvz", "in_proj_zqkv"): v for k, v in h.items()}),
            Server(),
            "would be refused: vLLM knows no such module",
        ),
        (
            lambda f: _with_header(f, lambda h: {k.replace("layers.3.", "layers.9."): v for k, v in h.items()}),
            Server(),
            "would be ignored: the model has no such layer",
        ),
        (
            lambda f: _with_header(f, lambda h: {k.replace("layers.3.self", "layers.2.self"): v for k, v in h.items()}),
            Server(),
            "would be ignored: this layer has no such module",
        ),
        (
            lambda f: _with_header(f, lambda h: {k: v for k, v in h.items() if "experts.5.up_proj.lora_A" not in k}),
            Server(),
            "the other half of the pair is missing",
        ),
        (
            lambda f: _with_header(f, lambda h: {k.replace("experts.7.", "experts.8."): v for k, v in h.items()}),
            Server(),
            "the model has no such expert",
        ),
        (
            lambda f: _with_header(f, lambda h: {k.replace("base_model.model.", ""): v for k, v in h.items()}),
            Server(),
            "would be refused: not a LoRA matrix",
        ),
    ],
)
def test_what_vllm_would_refuse_or_ignore_is_named_beforehand(
    damage: Callable[[Path], None], server: Server, sentence: str, adapter: Path
) -> None:
    assert dry_load(adapter, BASE, Server()) == []
    damage(adapter)
    assert any(sentence in str(problem) for problem in dry_load(adapter, BASE, server))


@pytest.mark.parametrize(("rank", "gb"), [(8, 3.0), (16, 6.0), (32, 12.1)])
def test_memory_of_expert_buffers_on_the_80b_is_the_known_number(rank: int, gb: float) -> None:
    shape = load_catalog().models["Qwen/Qwen3-Next-80B-A3B-Instruct"].shape
    assert expert_buffer_gib(shape, rank) * 2**30 / 1e9 == pytest.approx(gb, abs=0.05)


def test_the_serving_module_starts_with_as_many_adapters_as_fit_beside_the_80b() -> None:
    """One H200 has 141 GB: the 80B's 163 GB need two, and leave some 100 for buffers, cache and graphs."""
    text = (Path(__file__).parents[2] / "infra/modules/runpod-serving/variables.tf").read_text()
    defaults = [int(number) for number in re.findall(r"(?:active|max_rank) += optional\(number, (\d+)\)", text)]
    active, rank = defaults
    shape = load_catalog().models["Qwen/Qwen3-Next-80B-A3B-Instruct"].shape
    assert f"{active} x rank {rank} are {expert_buffer_gib(shape, rank, active):.0f} GiB" in text
    assert f"4 x rank 64 would be {expert_buffer_gib(shape, 64, 4):.0f}" in text


def test_too_little_memory_for_expert_buffers_is_refused_with_the_number(adapter: Path) -> None:
    (problem,) = dry_load(adapter, BASE, Server(expert_gib=0.001, max_loras=4, max_lora_rank=16))
    assert "4 x rank 16 takes" in problem.got
    assert "there are 0.0 GiB" in problem.got


def test_every_family_of_the_catalog_is_in_the_table_of_served_ones() -> None:
    families = {family.model_type for family in load_catalog().families.values()}
    not_read_yet = {"gpt_oss"}  # in vLLM's code; its adapters are refused for vLLM until then
    assert families - set(served_families()) == not_read_yet


def _header_of(folder: Path, base: str, targets: list[str], rank: int = 8) -> None:
    """The names and shapes of an adapter of a large model as `--for vllm` writes them, and no numbers."""
    model = load_catalog().models[base]
    shape, family = model.shape, load_catalog().family_of(base)
    header: dict[str, Any] = {}
    for matrix in targeted(shape, family, Adapter.model_validate({"rank": rank, "alpha": rank, "targets": targets})):
        name = matrix.name.removesuffix(".weight")
        sides = {"A": [rank, matrix.inputs], "B": [matrix.outputs, rank]}
        if matrix.is_expert:  # two experts stand for all
            halves = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
            names = [f"mlp.experts.{e}.{half}" for e in (0, shape.experts - 1) for half in halves]
            sides["B"] = [matrix.outputs // len(halves), rank]
        else:
            names = [name if name.startswith("mlp.") else f"self_attn.{name}"]
        first = shape.dense_layers if name.startswith("mlp.") else 0
        for key in (
            f"layers.{layer}.{n}.lora_{side}" for layer in (first, shape.layers - 1) for n in names for side in "AB"
        ):
            entry = {"dtype": "BF16", "shape": sides[key[-1]], "data_offsets": [0, 0]}
            header[f"base_model.model.model.{key}.weight"] = entry
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)
    (folder / CONFIG).write_text(json.dumps({"r": rank, "base_model_name_or_path": base, "lora_alpha": rank}))


GLM, DEEPSEEK = "zai-org/GLM-4.5-Air", "deepseek-ai/DeepSeek-V3"


@pytest.mark.parametrize(
    ("base", "targets"),
    [(GLM, ["attention", "shared_expert", "experts"]), (DEEPSEEK, ["shared_expert", "experts"])],
)
def test_adapters_of_models_with_dense_first_layers_act_to_the_last_tensor(
    base: str, targets: list[str], tmp_path: Path
) -> None:
    _header_of(tmp_path / "out", base, targets)
    assert dry_load(tmp_path / "out", base, Server(max_lora_rank=8)) == []
    first_sparse = load_catalog().models[base].shape.dense_layers
    dense = f"layers.{first_sparse - 1}.mlp"
    _with_header(tmp_path / "out", lambda h: {k.replace(f"layers.{first_sparse}.mlp", dense): v for k, v in h.items()})
    (problem,) = dry_load(tmp_path / "out", base, Server(max_lora_rank=8))
    assert "would be ignored: this layer has no such module" in problem.got


def test_deepseeks_adapter_is_refused_for_the_one_projection_that_vllm_computes_without_it(tmp_path: Path) -> None:
    _header_of(tmp_path / "out", DEEPSEEK, ["attention"])
    (problem,) = dry_load(tmp_path / "out", DEEPSEEK, Server(max_lora_rank=8))
    assert problem.got.startswith("4 of 20 tensors would be ignored, loaded or not: vLLM computes this module without")
    assert "kv_b_proj" in problem.got
    assert "merged" in problem.want


def test_a_folder_that_holds_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not the configuration"):
        dry_load(tmp_path, BASE, Server())
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / WEIGHTS).write_bytes(b"PK\x03\x04 not tensors")
    with pytest.raises(InputError, match="not a safetensors file"):
        dry_load(tmp_path, BASE, Server())


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("good-1", "--for", "gguf"), 2, "one of peft, vllm"),
        (("nobody-1", "--for", "peft"), 4, "no such job"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing_behind(
    words: tuple[str, ...], code: int, sentence: str, desk: Any, tmp_path: Path
) -> None:
    done = desk.lorry("export", *words, "--to", str(tmp_path / "out"))
    assert done.returncode == code
    assert sentence in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_merged_model_says_what_the_trained_one_said(desk: Any, tmp_path: Path) -> None:
    words = ("export", "good-1", "--for", "merged", "--to", str(tmp_path / "out"))
    elsewhere = desk.lorry(*words, LORRY_MODELS=str(tmp_path / "none"))
    assert elsewhere.returncode == 3
    assert "lorry merge good-1 --base DIR" in elsewhere.stderr
    assert not (tmp_path / "out").exists()
    done = desk.lorry(*words)
    assert done.returncode == 0, done.stderr
    assert "it says what the trained model said: off by" in done.stdout
    assert (tmp_path / "out" / "config.json").is_file()
    assert "merged, bf16" in desk.lorry("audit").stdout


@pytest.fixture
def spec(made: Any) -> LaunchSpec:
    found = read_record(LaunchSpec, made.job("good-1") / "launch.json")
    assert found is not None
    return found


def _of(spec: LaunchSpec, model: str, **sections: Any) -> LaunchSpec:
    values = spec.recipe.model_dump() | {"base": {"id": model}} | sections
    return spec.model_copy(update={"recipe": Recipe.model_validate(values), "offer": "runpod-h100-sxm-4", "gpus": 4})


# The part of each tool's schema that we write, as of the versions named, read in their sources and docs: the tools
# themselves bring torch and several gigabytes, so their own parsers run only where they are installed.
AXOLOTL_0_21 = {
    "base_model": str, "revision_of_model": str, "trust_remote_code": bool, "adapter": str, "load_in_4bit": bool,
    "load_in_8bit": bool, "quantize_moe_experts": bool, "lora_r": int, "lora_alpha": int, "lora_dropout": float,
    "lora_target_modules": list, "lora_target_parameters": list, "datasets": list, "test_datasets": list,
    "sequence_len": int, "sample_packing": bool, "micro_batch_size": int, "gradient_accumulation_steps": int,
    "num_epochs": int, "max_steps": int, "optimizer": str, "learning_rate": float, "lr_scheduler": str,
    "warmup_ratio": float, "weight_decay": float, "max_grad_norm": float, "seed": int, "bf16": bool,
    "gradient_checkpointing": bool, "deepspeed": str, "output_dir": str,
}  # fmt: skip
LLAMAFACTORY_0_9_5 = {
    "model_name_or_path": str, "model_revision": str, "trust_remote_code": bool, "stage": str, "do_train": bool,
    "finetuning_type": str, "lora_rank": int, "lora_alpha": int, "lora_dropout": float, "lora_target": str,
    "dataset_dir": str, "dataset": str, "eval_dataset": str, "template": str, "cutoff_len": int, "packing": bool,
    "per_device_train_batch_size": int, "gradient_accumulation_steps": int, "num_train_epochs": float, "max_steps": int,
    "learning_rate": float, "lr_scheduler_type": str, "warmup_ratio": float, "weight_decay": float,
    "max_grad_norm": float, "seed": int, "bf16": bool, "deepspeed": str, "logging_steps": int, "output_dir": str,
}  # fmt: skip


@pytest.mark.parametrize(
    ("tool", "schema", "model", "targets"),
    [
        ("axolotl", AXOLOTL_0_21, "Qwen/Qwen3-Next-80B-A3B-Instruct", ["attention", "shared_expert", "experts"]),
        ("axolotl", AXOLOTL_0_21, "Qwen/Qwen3-8B", ["attention", "mlp"]),
        ("llamafactory", LLAMAFACTORY_0_9_5, "Qwen/Qwen3-Next-80B-A3B-Instruct", ["attention", "linear_attention"]),
        ("llamafactory", LLAMAFACTORY_0_9_5, "Qwen/Qwen3-8B", ["attention", "mlp"]),
    ],
)
def test_a_recipe_is_written_with_keys_and_types_the_tool_knows(
    tool: str, schema: dict[str, type], model: str, targets: list[str], spec: LaunchSpec
) -> None:
    of = _of(spec, model, adapter={"rank": 16, "alpha": 32, "targets": targets})
    values = yaml.safe_load(foreign_files(of, tool)[f"{tool}.yaml"])
    assert set(values) <= set(schema)
    assert {name: type(value) for name, value in values.items()} == {name: schema[name] for name in values}
    training = of.recipe.training
    batch = {"axolotl": "micro_batch_size", "llamafactory": "per_device_train_batch_size"}[tool]
    assert values[batch] * values["gradient_accumulation_steps"] * spec.gpus == training.global_batch
    assert values["learning_rate"] == training.learning_rate


def test_a_target_that_a_tool_cannot_reach_is_refused_and_not_dropped(spec: LaunchSpec) -> None:
    of = _of(spec, "Qwen/Qwen3-Next-80B-A3B-Instruct", adapter={"rank": 4, "alpha": 8, "targets": ["experts"]})
    with pytest.raises(Refused, match=r"no setting for adapter\.targets \['experts'\]"):
        foreign_files(of, "llamafactory")


def test_the_data_comes_along_and_says_which_turns_are_trained(desk: Any, tmp_path: Path) -> None:
    done = desk.lorry("export", "good-1", "--for", "axolotl", "--to", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    values = yaml.safe_load((tmp_path / "out" / "axolotl.yaml").read_text())
    (train,) = values["datasets"]
    row = json.loads((tmp_path / "out" / train["path"]).read_text().splitlines()[0])
    turns = row[train["field_messages"]]
    assert any(turn.get(train["message_field_training"]) for turn in turns)


SKYPILOT = "0.14.1"


@pytest.fixture(scope="session")
def skypilot() -> Path:
    """Python of an environment that holds SkyPilot, made on first use: LORRY_CACHE or ~/.cache/lorry."""
    cache = Path(os.environ.get("LORRY_CACHE") or Path.home() / ".cache" / "lorry")
    folder = cache / f"skypilot-{SKYPILOT}"
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True, symlinks=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"skypilot=={SKYPILOT}"], check=True)
        done.touch()
    return python


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_skypilots_own_parser_takes_the_exported_job(skypilot: Path, spec: LaunchSpec, tmp_path: Path) -> None:
    of = _of(spec, "Qwen/Qwen3-8B", adapter={"rank": 16, "alpha": 32, "targets": ["attention"]})
    (tmp_path / "skypilot.yaml").write_text(foreign_files(of, "skypilot")["skypilot.yaml"])
    code = (
        "import sky, sys; task = sky.Task.from_yaml(sys.argv[1]);"
        "r = list(task.resources)[0]; print(task.name, task.num_nodes, r.accelerators, r.use_spot)"
    )
    done = subprocess.run(
        [skypilot, "-c", code, str(tmp_path / "skypilot.yaml")],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split("\n")[-2] == "good-1 1 {'H100': 4} False", done.stderr
