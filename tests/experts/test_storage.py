"""Frozen storages: what they hold, how they travel, and how little memory building them takes."""

from __future__ import annotations

import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.experts import quantised
from trainer.experts.quantised import Int8, Nf4, storage_from_tensors
from trainer.experts.storage import Dense

EXPERTS, ROWS, WIDTH = 6, 96, 128


def _stack(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (EXPERTS, ROWS, WIDTH), generator=torch.Generator().manual_seed(seed))


KINDS = {
    "dense": Dense,
    "dense with columns": lambda w: Dense(w, columns=8),
    "int8": lambda w: Int8.quantise(w, len(w)),
    "int8 rows": lambda w: Int8.quantise(w, len(w), grouped=False),
    "nf4": lambda w: Nf4.quantise(w, len(w)),
    "nf4 fp32 scales": lambda w: Nf4.quantise(w, len(w), double=False),
}
ERRORS = {
    "dense": 0,
    "dense with columns": 0,
    "int8": 0.006,
    "int8 rows": 0.008,
    "nf4": 0.094,
    "nf4 fp32 scales": 0.094,
}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def test_weights_come_back_within_the_error_of_their_kind(kind) -> None:
    stack = _stack()
    read = KINDS[kind](stack).dequantise(0, EXPERTS, torch.float32)
    assert (read - stack).norm() / stack.norm() <= ERRORS[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_span_of_experts_reads_the_same_in_place_or_not(kind, dtype) -> None:
    storage = KINDS[kind](_stack().to(dtype))
    whole = storage.dequantise(0, EXPERTS, dtype)
    assert whole.shape == (EXPERTS, ROWS, WIDTH)
    assert whole.dtype == dtype
    wide = torch.zeros(2, ROWS, WIDTH + 8, dtype=dtype)
    read = storage.dequantise(3, 5, dtype, out=wide[:, :, :WIDTH])
    assert read.data_ptr() == wide.data_ptr()
    assert torch.equal(wide[:, :, :WIDTH], whole[3:5])
    assert not wide[:, :, WIDTH:].any()
    assert torch.equal(storage.dequantise(2, 3, dtype), whole[2:3])


def test_files_give_back_the_same_storage_to_the_bit(kind, tmp_path) -> None:
    storage = KINDS[kind](_stack())
    save_file(storage.tensors(), tmp_path / "stack.safetensors")
    again = storage_from_tensors(load_file(tmp_path / "stack.safetensors"))
    assert type(again) is type(storage)
    assert torch.equal(again.dequantise(0, EXPERTS, torch.bfloat16), storage.dequantise(0, EXPERTS, torch.bfloat16))
    assert {n: t.dtype for n, t in again.tensors().items()} == {n: t.dtype for n, t in storage.tensors().items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("int8", 1 + 1 / 64), ("int8 rows", 1 + 4 / 2048), ("nf4", 0.5 + 1 / 64), ("nf4 fp32 scales", 0.5 + 4 / 64)],
)
def test_bytes_per_weight_at_true_width(name, expected) -> None:
    held = KINDS[name](_stack(0, 1, 1024, 2048)).bytes_per_parameter
    assert expected <= held <= expected + 0.0003


def test_columns_take_room_in_memory_but_not_in_files() -> None:
    storage = Dense(_stack(), columns=8)
    assert storage.bytes_per_parameter == 4 * (WIDTH + 8) / WIDTH
    assert storage.tensors()["weight"].shape == (EXPERTS, ROWS, WIDTH)


def test_casting_the_model_does_not_touch_storages() -> None:
    model = torch.nn.ModuleList([KINDS["int8"](_stack()), KINDS["nf4"](_stack())])
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in model.named_buffers()}
    for name, tensor in model.to(torch.bfloat16).named_buffers():
        assert tensor.dtype == before[name][0]
        assert torch.equal(tensor, before[name][1])


@pytest.mark.parametrize("quantise", [Int8.quantise, Nf4.quantise], ids=["int8", "nf4"])
def test_building_holds_one_matrix_at_a_time(quantise) -> None:
    alive: list[weakref.ref] = []

    def matrices():
        for e in range(EXPERTS):
            matrix = _stack(e, ROWS, WIDTH)
            alive.append(weakref.ref(matrix))
            yield matrix
            del matrix
            assert sum(ref() is not None for ref in alive) <= 1

    built = quantise(matrices(), EXPERTS)
    assert len(alive) == EXPERTS
    last = _stack(EXPERTS - 1, ROWS, WIDTH)
    assert (built.dequantise(EXPERTS - 1, EXPERTS, torch.float32)[0] - last).norm() / last.norm() < 0.1


def test_nf4_decoded_in_steps_reads_as_at_once(monkeypatch) -> None:
    storage = KINDS["nf4"](_stack())
    whole = storage.dequantise(0, EXPERTS, torch.bfloat16)
    monkeypatch.setattr(quantised, "LOOKUPS", 2 * ROWS * WIDTH // 2)
    assert torch.equal(storage.dequantise(0, EXPERTS, torch.bfloat16), whole)
    assert torch.equal(storage.dequantise(1, 6, torch.bfloat16), whole[1:6])


@pytest.mark.parametrize("name", ["int8", "int8 rows", "nf4", "nf4 fp32 scales"])
def test_zeros_stay_zero_and_outliers_spoil_their_group_alone(name) -> None:
    stack = _stack(0, 2, 8, 128)
    stack[0], stack[1, 0, 5] = 0, 1000.0
    read = KINDS[name](stack).dequantise(0, 2, torch.float32)
    assert not read[0].any()
    assert abs(read[1, 0, 5] - 1000) <= 6
    unspoilt = read[1, 1:] - stack[1, 1:]
    assert unspoilt.norm() / stack[1, 1:].norm() < {"int8": 0.2, "nf4": 0.5}.get(name, 0.1)


def test_rows_that_64_does_not_divide_take_a_smaller_group() -> None:
    stack = _stack(0, 2, 16, 96)
    for name in ("int8", "nf4"):
        storage = KINDS[name](stack)
        assert storage.group == 32
        again = storage_from_tensors(storage.tensors())
        assert torch.equal(again.dequantise(0, 2, torch.float32), storage.dequantise(0, 2, torch.float32))


def test_bad_input_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="Nf4: rows of 33 inputs; the width must be even"):
        Nf4.quantise(_stack(0, 1, 4, 33), 1)
    for few in (0, 2):
        with pytest.raises(ValueError, match=f"Int8: {few} experts; give 3 matrices"):
            Int8.quantise(iter(_stack()[:few]), 3)
    with pytest.raises(ValueError, match=r"expert storage of codes torch\.int8; weight, or codes"):
        storage_from_tensors({"codes": torch.zeros(1, 1, 1, dtype=torch.int8)})
