"""What vouches for an adapter: the manifest is written only from proofs, and verification finds every change."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.adapter import verify_adapter
from scripts.errors import NotFound, VerificationFailed

TENSORS = "adapter_model.safetensors"


def test_the_manifest_says_what_the_trainer_proved(job: Any) -> None:
    manifest = job.vouch()
    assert manifest.files == job.result.adapter_sha256
    assert (manifest.base_model, manifest.base_sha256) == ("lorry/smoke", "6" * 64)
    assert (manifest.training_set_sha256, manifest.recipe_sha256) == ("2" * 64, "1" * 64)
    assert (manifest.effect, manifest.cost_usd, manifest.created_at) == (0.5, 1.25, 1_700_000_000.0)
    assert verify_adapter(job.adapter, base_sha256="6" * 64, base_model="lorry/smoke") == manifest


def test_writing_the_manifest_again_leaves_it_alone(job: Any) -> None:
    first = job.vouch()
    before = (job.adapter / "manifest.json").stat()
    assert job.vouch(result=job.result.model_copy(update={"wall_seconds": 99.0})) == first
    assert (job.adapter / "manifest.json").stat() == before


@pytest.mark.parametrize(
    ("record", "change", "sentence"),
    [
        ("result", {"outcome": "cancelled", "exit_code": 27}, "outcome cancelled with exit code 27; only a completed"),
        ("result", {"exit_code": 1}, "outcome completed with exit code 1"),
        ("result", {"job_id": "job-2"}, r"result\.json: of job job-2; the file of job job-1"),
        ("proof", {"job_id": "job-2"}, r"proof\.json: of job job-2"),
        ("proof", {"passed": False, "sentence": "no effect"}, r"not passed \(no effect\); only a proved adapter"),
        ("proof", {"adapter_sha256": {}}, r"proved other bytes than result\.json names \(adapter_config\.json, adap"),
        ("result", {"adapter_sha256": {}}, r"result\.json: does not name adapter_config\.json"),
        ("result", {"adapter_sha256": {TENSORS: "0" * 64}}, r"but result\.json says 000000000000\.\.\.; train again"),
    ],
)
def test_an_unproved_adapter_gets_no_manifest(job: Any, record: str, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(VerificationFailed, match=sentence):
        job.vouch(**{record: getattr(job, record).model_copy(update=change)})
    assert not (job.adapter / "manifest.json").exists()


@pytest.mark.parametrize("fault", ["missing", "extra"])
def test_missing_and_extra_files_get_no_manifest(job: Any, fault: str) -> None:
    if fault == "missing":
        (job.adapter / TENSORS).unlink()
    else:
        (job.adapter / "README.md").write_text("hello")
    with pytest.raises(VerificationFailed, match="missing" if fault == "missing" else r"not named in result\.json"):
        job.vouch()
    assert not (job.adapter / "manifest.json").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", TENSORS])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_one_flipped_bit_is_found(job: Any, name: str, place: int) -> None:
    job.vouch()
    data = bytearray((job.adapter / name).read_bytes())
    data[place] ^= 1
    (job.adapter / name).write_bytes(data)
    with pytest.raises(VerificationFailed, match=rf"{name}: SHA-256 \w{{12}}\.\.\., but manifest\.json says \w{{12}}"):
        verify_adapter(job.adapter)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_bit_flipped_in_the_manifest_changes_no_claim_unseen(job: Any, data: st.DataObject) -> None:
    """Either it is refused, or files and hashes stand as they were: the rest is what push compares with the store."""
    manifest = job.vouch()
    path = job.adapter / "manifest.json"
    good = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
    try:
        assert verify_adapter(job.adapter).files == manifest.files
    except VerificationFailed:
        return
    finally:
        path.write_bytes(good)


def test_every_fault_is_said_at_once(job: Any) -> None:
    job.vouch()
    (job.adapter / "adapter_config.json").write_text("{ }")
    os.rename(job.adapter / TENSORS, job.adapter / "renamed.safetensors")
    with pytest.raises(VerificationFailed) as caught:
        verify_adapter(job.adapter, base_sha256="7" * 64, base_model="other/base")
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    wanted = [
        f"{TENSORS}: missing; pull the adapter again",
        "renamed.safetensors: not named in manifest.json; remove it",
        "adapter_config.json: SHA-256",
        "an adapter of lorry/smoke; use it on that model, not other/base",
        "with hash 666666666666..., not 777777777777...; stage lorry/smoke",
    ]
    assert all(want in line for want, line in zip(wanted, lines, strict=True)), lines


def test_no_manifest_is_no_adapter(job: Any) -> None:
    with pytest.raises(NotFound, match=r"manifest\.json: no such file; without it there is no adapter"):
        verify_adapter(job.adapter)
    (job.adapter / "manifest.json").write_text("{}")
    with pytest.raises(VerificationFailed, match="not a manifest"):
        verify_adapter(job.adapter)


def _vouch_for(job: Any, name: str, data: bytes) -> None:
    """Lets the records name the file as if the trainer had written it, so that only its content can be refused."""
    (job.adapter / name).write_bytes(data)
    hashes = job.result.adapter_sha256 | {name: hashlib.sha256(data).hexdigest()}
    result = job.result.model_copy(update={"adapter_sha256": hashes})
    job.vouch(result=result, proof=job.proof.model_copy(update={"adapter_sha256": hashes}))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("adapter_model.bin", b"anything"),
        ("optimizer.PT", b"anything"),
        ("training_args.json", pickle.dumps({"a": 1})),
        ("notes.txt", b"PK\x03\x04 the archive that torch.save writes"),
    ],
)
def test_a_pickle_is_refused_under_any_name(job: Any, name: str, data: bytes) -> None:
    with pytest.raises(VerificationFailed, match=f"{name}: a pickle, which can run code when it is loaded"):
        _vouch_for(job, name, data)


def test_a_link_is_refused(job: Any) -> None:
    job.vouch()
    target = job.folder / "elsewhere"
    os.rename(job.adapter / TENSORS, target)
    (job.adapter / TENSORS).symlink_to(target)
    with pytest.raises(VerificationFailed, match="not a plain file"):
        verify_adapter(job.adapter)


def _header(text: bytes, data: int = 0) -> bytes:
    return len(text).to_bytes(8, "little") + text + bytes(data)


F32 = '"dtype": "F32"'
BAD_FILES = {
    "empty file": (b"", "0 bytes with a header of 0"),
    "short": (b"\x08\x00", "2 bytes with a header of 0"),
    "header past the end": (_header(b"{}")[:9], "with a header of 2"),
    "huge header": (b"\xff" * 16, "with a header of"),
    "not JSON": (_header(b"{]"), "a header that is not plain JSON"),
    "not UTF-8": (_header(b'{"\xff": 1}'), "a header that is not plain JSON"),
    "too deep": (_header(b"[" * 100_000), "a header that is not plain JSON"),
    "a list": (_header(b"[]"), "not a mapping of tensors"),
    "no tensors": (_header(b'{"__metadata__": {"format": "pt"}}'), "no tensors"),
    "twice": (_header(b'{"a": 1, "a": 2}'), "a header that is not plain JSON"),
    "no dtype": (_header(b'{"a": {"shape": [1], "data_offsets": [0, 4]}}', 4), "tensor a has no known dtype"),
    "list as dtype": (_header(b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}', 4), "no known dtype"),
    "empty": (_header(f'{{"a": {{{F32}, "shape": [0, 4], "data_offsets": [0, 0]}}}}'.encode()), "tensor a is empty"),
    "negative": (_header(f'{{"a": {{{F32}, "shape": [-1], "data_offsets": [0, 4]}}}}'.encode(), 4), "no proper shape"),
    "wrong size": (_header(f'{{"a": {{{F32}, "shape": [2], "data_offsets": [0, 4]}}}}'.encode(), 4), "has 4 bytes for"),
    "cut off": (
        _header(f'{{"a": {{{F32}, "shape": [2], "data_offsets": [0, 8]}}}}'.encode(), 4),
        "4 bytes of data for 8",
    ),
    "gap": (
        _header(f'{{"a": {{{F32}, "shape": [1], "data_offsets": [4, 8]}}}}'.encode(), 8),
        "begins at byte 4, not 0",
    ),
    "overlap": (
        _header(
            f'{{"a": {{{F32}, "shape": [2], "data_offsets": [0, 8]}}, '
            f'"b": {{{F32}, "shape": [1], "data_offsets": [4, 8]}}}}'.encode(),
            8,
        ),
        "tensor b begins at byte 4, not 8",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_set_of_tensors_is_refused(job: Any, case: str) -> None:
    data, sentence = BAD_FILES[case]
    with pytest.raises(VerificationFailed, match=sentence):
        _vouch_for(job, TENSORS, data)
    assert not (job.adapter / "manifest.json").exists()


def test_every_kind_of_tensor_an_adapter_may_hold_is_accepted(job: Any, make_safetensors: Callable[..., bytes]) -> None:
    tensors = {"a": ("BF16", [3, 2], 12), "b": ("F16", [1], 2), "c": ("F32", [2, 2, 2], 32), "scalar": ("F64", [], 8)}
    _vouch_for(job, TENSORS, make_safetensors(tensors))
    verify_adapter(job.adapter)


def test_the_manifest_is_json_that_a_person_can_read(job: Any) -> None:
    job.vouch()
    text = (job.adapter / "manifest.json").read_text()
    assert text.startswith('{\n  "format": 1,\n  "job_id": "job-1",\n')
    assert json.loads(text)["files"] == job.result.adapter_sha256
