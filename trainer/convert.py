"""Writes an adapter in a layout vLLM reads: a matrix per expert and projection, or one shared by all experts.

python -m trainer.convert --adapter DIR --to DIR --form vllm     # exact: the same numbers, laid out otherwise
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from recipes.catalog import load_catalog
from trainer.experts.layouts import PEFT_KEYS, PREFIX, from_peft, to_shared, to_vllm
from trainer.export import CONFIG, WEIGHTS

FORMS = {"vllm": to_vllm, "shared": to_shared}


def convert(adapter: Path, to: Path, form: str = "vllm") -> int:
    """The adapter for vLLM in the new folder `to`, which appears whole or not at all; the number of its tensors.

    Raises ValueError for an adapter of a base model nobody knows, one whose tensors are not PEFT's layout, or one whose
    experts share nothing where the form needs it.
    """
    config: dict[str, Any] = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    facts = load_catalog().models.get(str(config.get("base_model_name_or_path")))
    if facts is None:
        raise ValueError(
            f"{adapter / CONFIG}: base model {config.get('base_model_name_or_path')!r} is not in the catalog"
        )
    tensors = load_file(adapter / WEIGHTS)
    layers = from_peft(tensors, facts.shape.experts) if facts.shape.experts else {}
    fused = {f"{PREFIX}{name}.{key}.weight" for name in layers for key in PEFT_KEYS}
    written = {name: tensor for name, tensor in tensors.items() if name not in fused} | FORMS[form](layers)
    temporary = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(written, temporary / WEIGHTS, metadata={"format": "pt"})
    (temporary / WEIGHTS).chmod(0o644)  # safetensors creates its files readable by their owner alone
    (temporary / CONFIG).write_text(_config(config, written), encoding="utf-8")
    os.replace(temporary, to)
    return len(written)


def _config(config: dict[str, Any], written: dict[str, Any]) -> str:
    """adapter_config.json: what was reached as a parameter is a module like any other to vLLM."""
    modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in written}
    values = config | {"target_modules": sorted(modules), "target_parameters": None}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def main() -> int:
    """Exit code 0, or 1 with a sentence."""
    parser = argparse.ArgumentParser(description="Writes an adapter in the layout vLLM reads.")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--form", choices=sorted(FORMS), default="vllm")
    arguments = parser.parse_args()
    try:
        print(f"wrote {convert(arguments.adapter, arguments.to, arguments.form)} tensors")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
