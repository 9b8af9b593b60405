"""The loss of a run as an SVG picture: each step, its trend, and the held-out loss. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from recipes.job import Metric

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 110, 14, 34
Point = tuple[float, float]


def loss_chart(metrics: Sequence[Metric]) -> str:
    """An inline SVG; a sentence instead while there is nothing to draw. Colours are CSS variables of the page."""
    train = _finite((m.step, m.training_loss) for m in metrics)
    valid = _finite((m.step, m.validation_loss) for m in metrics)
    values = [y for _, y in train + valid]
    if not values:
        return "<p class='soft'>No step was finished.</p>"
    top_step = max(1.0, *(x for x, _ in train + valid))
    ticks = _ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def place(point: Point) -> Point:
        x, y = point
        across = (_WIDTH - _LEFT - _RIGHT) * x / top_step
        return _LEFT + across, _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - y) / (high - low)

    parts = [_grid(ticks, top_step, place((0, low))[1], lambda y: place((0, y))[1])]
    if train:
        parts.append(_line([place(p) for p in train], "var(--train)", 1.5))
        parts.append(_line([place(p) for p in _trend(train)], "var(--trend)", 2.5))
    for point in valid:
        x, y = place(point)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="var(--valid)"/>')
    if len(valid) > 1:
        parts.append(_line([place(p) for p in valid], "var(--valid)", 2, dashed=True))
    parts.append(_labels(train, valid, place))
    label = f"training loss over {int(top_step)} steps, and held-out loss before and after"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _finite(points: Iterable[tuple[int, float | None]]) -> list[Point]:
    return [(float(x), y) for x, y in points if y is not None and math.isfinite(y)]


def _trend(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a tenth of the run, corrected for its start:
    sum of memory^k x loss over the sum of memory^k."""
    memory = min(0.95, max(0.5, 1 - 10 / len(points)))
    total = weight = 0.0
    smooth = []
    for x, y in points:
        total, weight = memory * total + y, memory * weight + 1.0
        smooth.append((x, total / weight))
    return smooth


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round values that enclose [low, high]."""
    reach = max(high - low, 1e-3)
    step = 10 ** math.floor(math.log10(reach / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if reach / (step * factor) <= 6)
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step))
    return [round(n * step, 9) for n in range(first, last + 1)]


def _grid(ticks: Sequence[float], top_step: float, floor: float, height_of: Callable[[float], float]) -> str:
    parts = []
    for tick in ticks:
        y = height_of(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    right = _WIDTH - _RIGHT
    parts.append(f'<text x="{_LEFT}" y="{floor + 20:.1f}">step 0</text>')
    parts.append(f'<text x="{right}" y="{floor + 20:.1f}" text-anchor="end">{int(top_step)}</text>')
    return "".join(parts)


def _line(points: Sequence[Point], colour: str, width: float, dashed: bool = False) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 5"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>'


def _labels(train: Sequence[Point], valid: Sequence[Point], place: Callable[[Point], Point]) -> str:
    """The name of each line beside its last point, moved apart when they would touch."""
    wanted = []
    if train:
        wanted.append((place(_trend(train)[-1])[1], "training", "var(--trend)"))
    if valid:
        wanted.append((place(valid[-1])[1], "held out", "var(--valid)"))
    wanted.sort()
    parts, last = [], -100.0
    for y, name, colour in wanted:
        y = max(y, last + 16)
        last = y
        parts.append(f'<text x="{_WIDTH - _RIGHT + 10}" y="{y + 4:.1f}" style="fill: {colour}">{name}</text>')
    return "".join(parts)
