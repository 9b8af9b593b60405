"""Takes an adapter or its recipe out of Lorry, in the form another program reads.

exported = export(store, "bicycle-care-1", "vllm", Path("bicycle"), os.environ)      # the folder, and what it holds
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from recipes.job import LaunchSpec
from scripts.errors import Conflict, NotFound, Problem, Refused, VerificationFailed
from scripts.foreign_recipes import foreign_files
from scripts.job_folder import read_job
from scripts.machine import trainer_environment
from scripts.pull import pull
from scripts.store import Store
from scripts.store.disk import disk_errors

Form = Literal["peft", "vllm", "shared", "merged", "axolotl", "llamafactory", "skypilot"]
FORMS: tuple[Form, ...] = get_args(Form)


def export(store: Store, job_id: str, form: Form, to: Path, environment: Mapping[str, str]) -> list[str]:
    """Writes the new folder `to`, whole or not at all; the names of its files.

    Raises NotFound for a job without what is asked for, Conflict when the folder exists, Refused for what the form
    cannot express, VerificationFailed when the adapter is not what its manifest says.
    """
    spec = read_job(store, job_id).launch
    if spec is None:
        raise NotFound(Problem(f"job {job_id}", f"no such job in {store.url}", "see what there is with `lorry jobs`"))
    if to.exists():
        raise Conflict(Problem(str(to), "it exists already", "name a new folder"))
    if form == "merged":
        want = f"`lorry merge {job_id} --base DIR --to {to}`"
        raise Refused(Problem("--for merged", "that needs the base model's own files", want))
    with disk_errors(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as temporary:
            built = Path(temporary) / "new"
            if form in ("peft", "vllm", "shared"):
                _write_adapter(store, job_id, form, built, environment)
            else:
                _write_recipe(store, spec, form, built)
            os.rename(built, to)
    return sorted(path.relative_to(to).as_posix() for path in to.rglob("*") if path.is_file())


def _write_adapter(store: Store, job_id: str, form: str, built: Path, environment: Mapping[str, str]) -> None:
    if form == "peft":
        pull(store, job_id, built)
        return
    with tempfile.TemporaryDirectory(prefix="lorry-export-") as temporary:
        adapter = Path(temporary) / "adapter"
        pull(store, job_id, adapter)
        command = [
            sys.executable,
            "-m",
            "trainer.convert",
            "--adapter",
            str(adapter),
            "--to",
            str(built),
            "--form",
            form,
        ]
        seen = trainer_environment(environment, on_cpu=True)
        done = subprocess.run(command, env=seen, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["no word"])[-1]
            kind = Refused if form == "shared" else VerificationFailed
            raise kind(Problem(f"job {job_id}", f"its adapter cannot be laid out as {form}: {said}"))
        shutil.copyfile(adapter / "manifest.json", built / "peft-manifest.json")


def _write_recipe(store: Store, spec: LaunchSpec, form: str, built: Path) -> None:
    files = foreign_files(spec, form)
    built.mkdir()
    for name, text in files.items():
        (built / name).write_text(text, encoding="utf-8")
    if form == "skypilot":  # our own container fetches the data itself
        return
    for name in ("train", "valid") if spec.valid_examples else ("train",):
        store.get_file(f"{spec.job_id}/data/{name}.jsonl", built / "data" / f"{name}.jsonl")
