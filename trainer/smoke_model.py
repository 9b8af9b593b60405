"""Makes the smoke model: the Qwen3-Next architecture at toy size with random weights, in the layout of a published one.

python -m trainer.smoke_model --out DIR     # does nothing when DIR already holds it
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "recipes" / "smoke" / "model"
WEIGHTS = "model.safetensors"
SEED = 0


def make_smoke_model(out: Path) -> bool:
    """Writes config, tokenizer and weights (one tensor per expert and projection) to `out`; False when they are there.

    The folder appears whole or not at all. Raises FileExistsError when `out` holds files that are not ours.
    """
    names = {path.name for path in SOURCE.iterdir()}
    if _is_complete(out):
        return False
    if out.exists() and (
        strange := {path.name for path in out.iterdir()} - names - {WEIGHTS, "generation_config.json"}
    ):
        raise FileExistsError(
            f"{out}: holds {sorted(strange)[0]}, which is not of the smoke model; name another folder"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        built = Path(temporary) / "new"
        _write_weights(built)
        for name in names:
            shutil.copyfile(SOURCE / name, built / name)
        if _is_complete(out):  # another node made it on the same volume
            return False
        if out.exists():
            os.rename(out, Path(temporary) / "old")
        os.rename(built, out)
    return True


def main() -> None:
    """Makes the model and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    made = make_smoke_model(out)
    print(f"{'made' if made else 'found'} the smoke model in {out}")


def _is_complete(out: Path) -> bool:
    if not (out / WEIGHTS).is_file():
        return False
    return all((out / p.name).is_file() and (out / p.name).read_bytes() == p.read_bytes() for p in SOURCE.iterdir())


def _write_weights(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(SOURCE), dtype=torch.float32)
    model.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors creates its files readable by their owner alone


if __name__ == "__main__":
    main()
