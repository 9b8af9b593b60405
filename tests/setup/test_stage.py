"""Staging a base model: the right files, resumable, never where room is short, and every byte checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from scripts.errors import Conflict, InputError, NotFound, Refused, VerificationFailed
from scripts.model_manifest import ModelManifest, folder_name, read_manifest, verify_model
from scripts.models import model_folder, model_problem
from scripts.stage import SPARE_BYTES, Staging, require_known_volume, stage
from scripts.store import open_store
from tests.setup.model_copy import MODEL, NAME, SHARDS, STAGED, make_copy, write_shard

REVISION = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
NOW = 1_790_000_000.0


@pytest.fixture
def copy(tmp_path):
    return make_copy(tmp_path / "copy")


@pytest.fixture
def models(tmp_path):
    """An empty models folder."""
    return tmp_path / "models"


def staging(models, copy=None, store=None, **named):
    return Staging(MODEL, store or open_store(models.as_uri()), models, copy, **named)


def test_a_copy_is_staged_whole_and_without_code_or_pickles(copy, models):
    manifest = stage(staging(models, copy, revision=REVISION), now=NOW)
    folder = model_folder(models, MODEL)
    assert sorted(path.name for path in folder.glob("[!.]*")) == sorted([*STAGED, "manifest.json"])
    assert model_problem(folder) is None
    assert sorted(manifest.files) == STAGED
    assert (manifest.revision, manifest.source, manifest.staged_at) == (REVISION, "folder", NOW)
    assert manifest.total_bytes == sum((folder / name).stat().st_size for name in STAGED)
    assert verify_model(open_store(models.as_uri()), MODEL) == manifest


def test_staging_again_changes_nothing(copy, models):
    first = stage(staging(models, copy), now=NOW)
    before = {path.name: path.stat().st_mtime_ns for path in model_folder(models, MODEL).glob("*.safetensors")}
    assert stage(staging(models), now=NOW + 9) == first, "without a source it only looks"
    again = stage(staging(models, copy), now=NOW + 9)
    assert again.files == first.files
    assert {path.name: path.stat().st_mtime_ns for path in model_folder(models, MODEL).glob("*.safetensors")} == before


def test_a_folder_of_files_is_adopted_where_it_lies(models):
    folder = make_copy(models / NAME)
    stage(staging(models, folder), now=NOW)
    assert verify_model(open_store(models.as_uri()), MODEL).total_bytes > 10_000


@pytest.mark.parametrize("given", ["snapshot", "model", "cache"])
def test_a_hugging_face_cache_of_symlinks_is_read_at_its_revision(given, tmp_path, models):
    cached = tmp_path / "hub" / "models--Qwen--Qwen3-8B"
    plain = make_copy(tmp_path / "plain")
    snapshot = cached / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (cached / "blobs").mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(cached / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    folder = {"snapshot": snapshot, "model": cached, "cache": tmp_path / "hub"}[given]
    manifest = stage(staging(models, folder), now=NOW)
    assert manifest.revision == REVISION
    assert sorted(manifest.files) == STAGED
    assert not any(path.is_symlink() for path in model_folder(models, MODEL).iterdir())

    (cached / "snapshots" / OTHER).mkdir()
    if given != "snapshot":
        with pytest.raises(InputError, match=f"it holds revisions {REVISION}, {OTHER}; name one with --revision"):
            stage(staging(models, folder), now=NOW)
    with pytest.raises((InputError, Conflict), match=REVISION):
        stage(staging(models, snapshot, revision=OTHER), now=NOW)


def test_a_broken_link_in_a_cache_is_a_missing_file(copy, models):
    (copy / SHARDS[1]).unlink()
    (copy / SHARDS[1]).symlink_to("nowhere")
    with pytest.raises(InputError, match=f"1 of 2 weight files are not whole, first {SHARDS[1]} .missing."):
        stage(staging(models, copy), now=NOW)


def test_pickled_weights_are_refused(copy, models):
    for path in [*copy.glob("*.safetensors"), *copy.glob("*.index.json")]:
        path.unlink()
    with pytest.raises(InputError, match=r"its weights are pickles \(pytorch_model.bin\), which can run code"):
        stage(staging(models, copy), now=NOW)


def test_a_pickle_under_the_name_of_weights_is_refused(copy, models):
    (copy / SHARDS[0]).write_bytes(b"\x80\x04" + b"x" * 100)
    with pytest.raises(InputError, match="not a safetensors file"):
        stage(staging(models, copy), now=NOW)
    assert read_manifest(open_store(models.as_uri()), MODEL) is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            '{"model_type": "mistral"}',
            "model_type is 'mistral'; the files of Qwen/Qwen3-8B, whose model_type is 'qwen3'",
        ),
        ("[]", "not the configuration of a model"),
        ("[" * 100_000, "not the configuration of a model"),
    ],
)
def test_another_models_files_are_refused(config, said, copy, models):
    (copy / "config.json").write_text(config)
    with pytest.raises(InputError) as caught:
        stage(staging(models, copy), now=NOW)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("qwen/qwen3-8b", "did you mean 'Qwen/Qwen3-8B'?"),
        ("zzz", "one of Qwen/Qwen3-Next-80B-A3B-Instruct,"),
        ("lorry/smoke", "is made where it is used; nothing needs to be staged"),
        ("../../etc", "is not in recipes/models.yaml"),
    ],
)
def test_a_model_that_cannot_be_staged_is_named(model, said, models):
    with pytest.raises(InputError) as caught:
        stage(Staging(model, open_store(models.as_uri()), models), now=NOW)
    assert said in str(caught.value)


def test_a_model_whose_experts_cannot_be_quantised_is_refused_before_a_byte_of_it_is_fetched(models):
    with pytest.raises(InputError, match="the experts of openai/gpt-oss-120b cannot be quantised here; leave it out"):
        stage(Staging("openai/gpt-oss-120b", open_store(models.as_uri()), models, quantize="nf4"), now=NOW)


def test_every_damage_is_found_and_repaired_from_a_sound_copy(copy, models):
    first = stage(staging(models, copy), now=NOW)
    folder, store = model_folder(models, MODEL), open_store(models.as_uri())
    data = bytearray((folder / SHARDS[0]).read_bytes())
    data[-1] ^= 1
    (folder / SHARDS[0]).write_bytes(data)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(VerificationFailed) as caught:
        verify_model(store, MODEL)
    assert [problem.got for problem in caught.value.problems] == [
        f"not the {len(data)} bytes of the manifest",
        "missing",
    ]
    with pytest.raises(VerificationFailed, match=r"tokenizer\.json: not the file that its manifest names"):
        stage(staging(models), now=NOW)
    stage(staging(models, copy), now=NOW)
    assert verify_model(store, MODEL).files == first.files


def test_a_staged_model_is_never_turned_into_another(copy, models):
    stage(staging(models, copy, revision=REVISION), now=NOW)
    with pytest.raises(Conflict, match=f"revision {REVISION} is staged, not {OTHER}"):
        stage(staging(models, copy, revision=OTHER), now=NOW)
    write_shard(copy / SHARDS[0], "t0", 5000, fill=2)
    with pytest.raises(Conflict, match="it holds other files than"):
        stage(staging(models, copy), now=NOW)
    assert verify_model(open_store(models.as_uri()), MODEL).revision == REVISION


def test_a_revision_is_learnt_from_an_equal_copy_and_never_forgotten(copy, models):
    stage(staging(models, copy), now=NOW)
    with pytest.raises(Conflict, match=f"revision unknown is staged, not {REVISION}"):
        stage(staging(models, revision=REVISION), now=NOW)
    assert stage(staging(models, copy, revision=REVISION), now=NOW).revision == REVISION
    assert stage(staging(models, copy), now=NOW).revision == REVISION


def test_what_is_no_manifest_is_named(copy, models):
    stage(staging(models, copy), now=NOW)
    path = model_folder(models, MODEL) / "manifest.json"
    path.write_text('{"model": "x"}')
    with pytest.raises(InputError, match="not a manifest"):
        verify_model(open_store(models.as_uri()), MODEL)
    path.unlink()
    with pytest.raises(NotFound, match=f"no manifest; run `lorry stage {MODEL}`"):
        verify_model(open_store(models.as_uri()), MODEL)


def test_a_disk_that_is_too_small_is_left_alone(copy, models, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, SPARE_BYTES + 9_000))
    with pytest.raises(Refused) as caught:
        stage(staging(models, copy), now=NOW)
    assert "1.0 GB are free, 0.0 GB are needed and 1 GB kept free; make the disk or volume larger" in str(caught.value)
    assert list(model_folder(models, MODEL).glob("[!.]*")) == []
    shutil.copy(copy / SHARDS[0], model_folder(models, MODEL))
    assert stage(staging(models, copy), now=NOW).total_bytes > 9_000, "what is there already needs no room"


def test_a_download_is_refused_before_it_begins_where_room_is_short(models, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10 * 10**9))
    with pytest.raises(Refused, match=r"10\.0 GB are free, 16\.4 GB are needed"):
        stage(staging(models), now=NOW)


def test_a_second_stager_of_the_same_folder_is_refused(copy, models):
    from scripts.job_lock import take_lock

    home = model_folder(models, MODEL)
    home.mkdir(parents=True)
    with take_lock(home, ".stage.lock"), pytest.raises(Conflict, match="another `lorry stage` is filling it"):
        stage(staging(models, copy), now=NOW)


def test_killed_in_the_middle_it_goes_on_and_leaves_nothing_behind(tmp_path, models):
    copy = make_copy(tmp_path / "copy", values=6_000_000)
    home = model_folder(models, MODEL)
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from scripts.stage import Staging, stage; from scripts.store import open_store\n"
        "models, copy, home = (Path(word) for word in sys.argv[1:])\n"
        "def progress(count):\n"
        "    if any(path.stat().st_size > 3_000_000 for path in home.glob('.*.tmp')):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"stage(Staging({MODEL!r}, open_store(models.as_uri()), models, copy), now=0.0, progress=progress)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(models), str(copy), str(home)], timeout=280)
    assert done.returncode == -signal.SIGKILL
    assert len(list(home.glob(".*.tmp"))) == 1, "it was killed while it wrote a shard"
    assert not (home / "manifest.json").exists()

    kept = {path.name: path.stat().st_mtime_ns for path in home.glob("*.json")}
    assert kept
    stage(staging(models, copy), now=NOW)
    assert model_problem(home) is None
    assert list(home.glob(".*.tmp")) == []
    assert {name: (home / name).stat().st_mtime_ns for name in kept} == kept, "what was there was kept"
    assert verify_model(open_store(models.as_uri()), MODEL).total_bytes > 12_000_000


def test_a_bucket_is_filled_verified_and_repaired(copy, models, s3):
    s3.create_bucket(Bucket="lorry-models")
    store = open_store("s3://lorry-models/models")
    manifest = stage(staging(models, copy, store), now=NOW)
    assert verify_model(store, MODEL) == manifest
    keys = [row["Key"] for row in s3.list_objects_v2(Bucket="lorry-models")["Contents"]]
    assert keys == sorted(f"models/{NAME}/{name}" for name in [*STAGED, "manifest.json"])

    s3.put_object(Bucket="lorry-models", Key=f"models/{NAME}/config.json", Body=b'{"model_type": "qwenX"}')
    s3.delete_object(Bucket="lorry-models", Key=f"models/{NAME}/{SHARDS[0]}")
    with pytest.raises(VerificationFailed) as caught:
        verify_model(store, MODEL)
    assert [problem.got for problem in caught.value.problems] == ["not the 23 bytes of the manifest", "missing"]
    stage(staging(models, copy, store), now=NOW)
    verify_model(store, MODEL)


def test_a_bucket_is_filled_from_what_is_staged_here_unless_that_went_bad(copy, models, s3):
    s3.create_bucket(Bucket="lorry-models")
    stage(staging(models, copy, revision=REVISION), now=NOW)
    shutil.rmtree(copy)
    store = open_store("s3://lorry-models/models")
    assert stage(staging(models, store=store), now=NOW).revision == REVISION
    s3.delete_object(Bucket="lorry-models", Key=f"models/{NAME}/manifest.json")
    with pytest.raises(Conflict, match=f"models/{NAME}: revision {REVISION} is staged, not {OTHER}"):
        stage(staging(models, store=store, revision=OTHER), now=NOW)
    (model_folder(models, MODEL) / "tokenizer.json").write_text("[]")
    with pytest.raises(VerificationFailed, match="run `lorry stage --verify` there"):
        stage(staging(models, store=store), now=NOW)


def test_a_runpod_volume_is_never_filled_beyond_its_size(copy, models, s3, api):
    volume = api.create("network-volumes", {"name": "v", "size": 10, "dataCenter": "US-KS-2"})["id"]
    s3.create_bucket(Bucket=volume)
    store = open_store(f"s3://{volume}/models")
    other = "Qwen/Qwen3-32B"
    taken = ModelManifest(
        model=other, revision=None, source="folder", staged_at=0.0,
        files={"model.safetensors": {"bytes": 9_000_000_000, "sha256": "0" * 64}},
    )  # fmt: skip
    s3.put_object(
        Bucket=volume, Key=f"models/{folder_name(other)}/manifest.json", Body=taken.model_dump_json().encode()
    )
    with pytest.raises(Refused, match=r"1\.0 GB are free"):
        stage(staging(models, copy, store, runpod=api), now=NOW)
    assert read_manifest(store, MODEL) is None
    api.change("network-volumes", volume, {"size": 20})
    stage(staging(models, copy, store, runpod=api), now=NOW)
    assert verify_model(store, MODEL).total_bytes > 10_000


def test_a_volume_is_not_filled_blindly(s3):
    store = open_store("s3://abc123def/models")
    with pytest.raises(InputError, match="RUNPOD_API_KEY: not set; set it: the volume's size is asked for"):
        require_known_volume(store, None, {"AWS_ENDPOINT_URL": "https://s3api-us-ks-2.runpod.io/"})
    require_known_volume(store, None, {"AWS_ENDPOINT_URL": "https://s3.example.org"})


def test_a_model_is_fetched_from_a_hub_at_the_revision_that_is_pinned_then(copy, tmp_path, models):
    with hub(copy) as (url, asked):
        done = download(models, tmp_path, url)
        manifest = ModelManifest.model_validate_json(done.stdout)
    assert (manifest.revision, manifest.source) == (REVISION, "hub")
    assert sorted(manifest.files) == STAGED
    assert verify_model(open_store(models.as_uri()), MODEL) == manifest
    fetched = {path.rpartition("/")[2] for path in asked if "/resolve/" in path}
    assert fetched == set(STAGED), "no code, no pickle and no second copy of the weights was even asked for"
    assert all(REVISION in path for path in asked if "/resolve/" in path)


def test_a_hub_that_does_not_answer_is_one_sentence(tmp_path, models):
    said = download(models, tmp_path, "http://127.0.0.1:9").stdout
    assert said.startswith(f"Hugging Face: {MODEL}: ConnectError")
    assert said.strip().endswith("run it again to go on, or give a copy with --from")
    assert len(said.splitlines()) == 1


def download(models, home, url):
    """Stages without a copy in a process of its own, since the library reads its environment when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
    code = (
        "import sys; from pathlib import Path; from scripts.errors import LorryError\n"
        "from scripts.stage import Staging, stage; from scripts.store import open_store\n"
        "models = Path(sys.argv[1])\n"
        f"staging = Staging({MODEL!r}, open_store(models.as_uri()), models)\n"
        "try: print(stage(staging, now=0.0).model_dump_json())\n"
        "except LorryError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(models)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done


@contextmanager
def hub(folder):
    """The part of a hub that a snapshot needs, over real HTTP; yields its URL and the paths asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def _go(self):
            path = urlsplit(self.path).path
            asked.append(path)
            names = sorted(path.name for path in folder.iterdir())
            if path.startswith("/api/models/") and "/tree/" not in path:
                self._answer(json.dumps({"id": MODEL, "sha": REVISION, "siblings": [{"rfilename": n} for n in names]}))
            elif "/tree/" in path:
                rows = [
                    {"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": "0" * 40} for n in names
                ]
                self._answer(json.dumps(rows))
            else:
                self._answer((folder / path.rpartition("/")[2]).read_bytes())

        do_GET = do_HEAD = _go  # noqa: N815

        def _answer(self, data):
            raw = data.encode() if isinstance(data, str) else data
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.send_header("etag", f'"{hashlib.sha1(raw).hexdigest()}"')
            self.send_header("x-repo-commit", REVISION)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(raw)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def test_the_command_stages_verifies_and_prints_the_manifest(copy, tmp_path, lorry):
    done = lorry("stage", MODEL, "--from", str(copy), "--revision", REVISION)
    where = (tmp_path / "models" / NAME).as_uri()
    assert (done.code, done.out) == (0, f"{where}: staged: {MODEL}, revision {REVISION}, 6 files, 0.0 GB\n")
    assert "every byte is right" in lorry("stage", MODEL, "--verify").out
    manifest = ModelManifest.model_validate_json(lorry("stage", MODEL, "--json").out)
    assert manifest.revision == REVISION
    (tmp_path / "models" / NAME / "tokenizer.json").write_text("no")
    bad = lorry("stage", MODEL, "--verify")
    assert (bad.code, bad.out) == (7, "")
    assert bad.error.endswith("not the 2 bytes of the manifest; stage Qwen/Qwen3-8B again: sound files are kept\n")


def test_a_revision_that_is_no_commit_is_refused(lorry, capsys):
    with pytest.raises(SystemExit):
        lorry("stage", MODEL, "--revision", "main")
    assert "'main' is not a full commit: 40 characters 0-9a-f" in capsys.readouterr().err
