"""Frozen expert stacks in int8 and NF4: a code per weight, a scale per row or per group of inputs.

Int8.quantise((stack[e] for e in range(512)), 512)      # one matrix (out, in) in memory at a time
| storage | bytes per weight | error, Gaussian weights |
|---|---|---|
| Int8, scale per row (fp32) | 1 + 4/in | 0.8 % |
| Int8 grouped | 1 + 1/64 + 4/(64*256) = 1.016 | 0.57 % |
| Nf4 (fp32 scales) | 0.5 + 4/64 = 0.5625 | 9.2 % |
| Nf4 double | 0.5 + 1/64 + 4/(64*256) = 0.516 | 9.2 % |
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainer.experts.storage import Dense, FrozenStack

GROUP = 64
"Inputs that share a scale, where 64 divides the row; else their greatest common divisor."
SCALE_GROUP = 256
"Scales that share a step when they are quantised themselves."
LOOKUPS = 2**25
"Bytes of NF4 decoded at a time."
# The 16 quantiles of a standard normal that QLoRA (arXiv 2305.14314, appendix E) defines, scaled to [-1, 1].
# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


class Scaled(FrozenStack):
    """Codes (E, out, in / codes per element) and their scales.

    Scales are fp32 (E, out, groups), or doubly quantised: int8 codes around the expert's mean, an fp32 step per 256.
    """

    codes_per_element = 1
    largest_code = 1.0
    "The decoded value of the largest code."
    neighbours = 0
    "How many codes up and down are tried for each doubly quantised scale."
    code_dtype = torch.int8

    def __init__(self, codes: Tensor, **scales: Tensor):
        super().__init__()
        self.experts, self.out_features, held = codes.shape
        self.in_features = held * self.codes_per_element
        self.register_buffer("codes", codes)
        for name, tensor in scales.items():
            self.register_buffer(name, tensor)
        self.double = "scale_codes" in scales
        self.group = math.gcd(GROUP, self.in_features) if self.double else self.in_features // scales["scales"].shape[2]

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int], *, grouped: bool = True, double: bool = True, device: Any = None
    ) -> Any:
        """Storage for `shape` (experts, out, in) without numbers yet; on the meta device its layout alone.

        Raises ValueError when the width does not suit the codes.
        """
        count, rows, width = shape
        group = math.gcd(GROUP, width) if grouped else width
        if group % cls.codes_per_element:
            raise ValueError(f"{cls.__name__}: rows of {width} inputs; the width must be even")
        codes = torch.empty((count, rows, width // cls.codes_per_element), dtype=cls.code_dtype, device=device)
        return cls(codes, **_empty_scales(count, rows, width // group, double, device))

    @classmethod
    def _build(cls, experts: Iterable[Tensor], count: int, per_group: bool, double: bool) -> Any:
        built: Any = None
        made = 0
        for e, matrix in enumerate(experts):
            if built is None:
                shape = (count, *matrix.shape)
                built = cls.empty(shape, grouped=per_group, double=double, device=matrix.device)
            built._put(e, matrix.detach().float().reshape(-1, built.group))
            made = e + 1
        if made != count:
            raise ValueError(f"{cls.__name__}: {made} experts; give {count} matrices")
        return built

    def _put(self, e: int, groups: Tensor) -> None:
        """Quantises expert e, given as (groups, inputs per group) in fp32."""
        scales = groups.abs().amax(1) / self.largest_code
        if not self.double:
            self.scales[e] = scales.view(self.out_features, -1)
            codes = self._encode(groups / _nonzero(scales)[:, None])
        else:
            start = self._put_scales(e, scales)
            codes = self._with_best_scales(e, groups, start)
        self.codes[e] = self._packed(codes.view(self.out_features, -1))

    def _put_scales(self, e: int, scales: Tensor) -> Tensor:
        """Sets mean and steps of expert e; the nearest scale codes (scale groups, 256) in fp32."""
        mean, like = scales.mean(), self.scale_codes[e]
        centred = pad(scales - mean, (0, like.numel() - len(scales))).view(like.shape)
        steps = _nonzero(centred.abs().amax(1) / 127)
        self.scale_means[e], self.scale_steps[e] = mean, steps
        return torch.round(centred / steps[:, None])

    def _with_best_scales(self, e: int, groups: Tensor, start: Tensor) -> Tensor:
        """The weights' codes under the scale code near `start` that leaves each group the least squared error."""
        count = len(groups)
        for number in range(2 * self.neighbours + 1):
            shift = (number + 1) // 2 * (1 - 2 * (number % 2))  # 0, -1, 1, -2, 2, ...
            tried = (start + shift).clamp_(-127, 127)
            self.scale_codes[e] = tried
            scales = self._scales(e, e + 1).view(-1, 1)
            codes = self._encode(groups / _nonzero(scales))
            error = (self._decode(codes) * scales).sub_(groups).square_().sum(1)
            if number == 0:
                best, best_error, best_codes = tried.flatten(), error, codes
            else:
                better = error < best_error
                best_error = torch.minimum(error, best_error)
                best_codes = torch.where(better[:, None], codes, best_codes)
                best[:count] = torch.where(better, tried.flatten()[:count], best[:count])
        self.scale_codes[e] = best.view(start.shape)
        return best_codes

    def _scales(self, first: int, last: int) -> Tensor:
        """(experts, out, groups) fp32."""
        if not self.double:
            return self.scales[first:last]
        centred = (self.scale_codes[first:last] * self.scale_steps[first:last, :, None]).flatten(1)
        groups = self.in_features // self.group
        values = centred[:, : self.out_features * groups] + self.scale_means[first:last, None]
        return values.view(-1, self.out_features, groups)

    def _encode(self, values: Tensor) -> Tensor:
        raise TypeError(type(self).__name__)

    def _decode(self, codes: Tensor) -> Tensor:
        raise TypeError(type(self).__name__)

    def _packed(self, codes: Tensor) -> Tensor:
        return codes


class Int8(Scaled):
    """Signed bytes, -127 to 127."""

    largest_code = 127.0
    neighbours = 4

    @classmethod
    def quantise(cls, experts: Iterable[Tensor], count: int, grouped: bool = True) -> Int8:
        """Of `count` matrices (out, in). `grouped` takes doubly quantised scales per 64 inputs; else one per row."""
        return cls._build(experts, count, per_group=grouped, double=grouped)

    def dequantise(self, first: int, last: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """codes * scale, multiplied in fp32 and rounded once."""
        codes, scales = self.codes[first:last].unflatten(2, (-1, self.group)), self._scales(first, last)[..., None]
        if out is None:
            shape = (last - first, self.out_features, self.in_features)
            out = torch.empty(shape, dtype=dtype, device=codes.device)
        target = out.unflatten(2, (-1, self.group))
        if dtype == torch.float32:
            target.copy_(codes).mul_(scales)
        else:
            torch.mul(codes, scales, out=target)
        return out

    def _encode(self, values: Tensor) -> Tensor:
        return values.round_().clamp_(-127, 127)

    def _decode(self, codes: Tensor) -> Tensor:
        return codes


class Nf4(Scaled):
    """Four-bit codes of a normal's quantiles, two to a byte, the first in the high half; a scale per 64 inputs."""

    codes_per_element = 2
    code_dtype = torch.uint8

    def __init__(self, codes: Tensor, **scales: Tensor):
        super().__init__(codes, **scales)
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @classmethod
    def quantise(cls, experts: Iterable[Tensor], count: int, double: bool = True) -> Nf4:
        """Of `count` matrices (out, in). `double` quantises the scales too. Raises ValueError when `in` is odd."""
        return cls._build(experts, count, per_group=True, double=double)

    def dequantise(self, first: int, last: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Code value * scale, both rounded to `dtype` first."""
        if out is None:
            shape = (last - first, self.out_features, self.in_features)
            out = torch.empty(shape, dtype=dtype, device=self.codes.device)
        table, scales = self._byte_table(dtype), self._scales(first, last).to(dtype)
        # A few experts at a time: the lookup's index takes four bytes per code.
        step = max(1, LOOKUPS // self.codes[0].numel())
        for begin in range(0, last - first, step):
            codes = self.codes[first + begin : min(first + begin + step, last)]
            values = torch.index_select(table, 0, codes.flatten().int()).view(dtype)
            span = slice(begin, begin + step)
            target = out[span].unflatten(2, (-1, self.group))
            torch.mul(values.view(target.shape), scales[span, :, :, None], out=target)
        return out

    def _encode(self, values: Tensor) -> Tensor:
        book = torch.tensor(NF4, device=values.device)
        return torch.bucketize(values, (book[1:] + book[:-1]) / 2)

    def _decode(self, codes: Tensor) -> Tensor:
        return torch.tensor(NF4, device=codes.device)[codes]

    def _byte_table(self, dtype: torch.dtype) -> Tensor:
        """All 256 bytes decoded, the two weights of a byte as one element: one lookup gives both."""
        key = dtype, self.codes.device
        if key not in self._tables:
            book, byte = torch.tensor(NF4, device=key[1]), torch.arange(256, device=key[1])
            pairs = torch.stack([book[byte >> 4], book[byte & 15]], 1).to(dtype)
            element = {2: torch.int32, 4: torch.int64, 8: torch.complex128}[dtype.itemsize]
            self._tables[key] = pairs.view(element).flatten()
        return self._tables[key]

    def _packed(self, codes: Tensor) -> Tensor:
        high, low = codes.to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
        return high << 4 | low


def storage_from_tensors(tensors: dict[str, Tensor]) -> FrozenStack:
    """The storage whose `tensors()` these are. Raises ValueError when they are none's."""
    names = set(tensors)
    if names == {"weight"}:
        return Dense(tensors["weight"])
    if names in ({"codes", "scales"}, {"codes", "scale_codes", "scale_steps", "scale_means"}):
        for kind in (Int8, Nf4):
            if tensors["codes"].dtype == kind.code_dtype:
                return kind(**tensors)
    found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in sorted(tensors.items()))
    raise ValueError(f"expert storage of {found or 'nothing'}; weight, or codes in int8 or uint8 with their scales")


def _empty_scales(count: int, rows: int, groups: int, double: bool, device: Any) -> dict[str, Tensor]:
    if not double:
        return {"scales": torch.empty(count, rows, groups, device=device)}
    steps = -(-rows * groups // SCALE_GROUP)
    return {
        "scale_codes": torch.empty(count, steps, min(SCALE_GROUP, rows * groups), dtype=torch.int8, device=device),
        "scale_steps": torch.empty(count, steps, device=device),
        "scale_means": torch.empty(count, device=device),
    }


def _nonzero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, torch.finfo(scales.dtype).tiny, scales)
