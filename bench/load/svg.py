"""Small charts as SVG text: axes with round ticks, lines, dots, error bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 620, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 46
COLOURS = ("#2f6fb0", "#c8553d", "#3a8f5c", "#8a5fb0", "#b0892f", "#4a4a4a")
TICKS = 5


@dataclass(frozen=True)
class Series:
    """Points (x, y) in order. bars: (low, high) of each y, or None. line: joined."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    bars: Sequence[tuple[float, float] | None] | None = None
    labels: Sequence[str] | None = None


def ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """About `count` round numbers that cover the range."""
    if high <= low:
        high = low + (abs(low) or 1)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def chart(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """One chart; `y` starts at 0. An empty text where there is no point."""
    series = [s for s in series if s.points]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    ys += [bar[1] for s in series for bar in s.bars or () if bar]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(0, max(ys))

    def x(value: float) -> float:
        span = x_ticks[-1] - x_ticks[0]
        return LEFT + (value - x_ticks[0]) / span * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / y_ticks[-1] * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="12"><title>{escape(title)}</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in y_ticks:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            f'stroke="#ddd"/>' + _text(LEFT - 6, y(tick) + 4, f"{tick:g}", "end")
        )
    parts += [_text(x(t), HEIGHT - BOTTOM + 16, f"{t:g}", "middle") for t in x_ticks]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = _text(0, 0, y_label, "middle")
    parts.append(f'<g transform="translate(14 {middle:.0f}) rotate(-90)">{turned}</g>')
    for i, one in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        parts.append(_drawn(one, colour, x, y))
        parts.append(_text(LEFT + 4 + 140 * (i % 4), 12 + 14 * (i // 4), one.name, "start", colour))
    return "\n".join([*parts, "</svg>"])


def _drawn(one: Series, colour: str, x, y) -> str:  # noqa: ANN001 - the chart's two scales
    at = [(x(a), y(b)) for a, b in one.points]
    parts = []
    if one.line:
        joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
        parts.append(
            f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
    else:
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b in at]
    for (a, _), bar in zip(at, one.bars or (), strict=False):
        if bar:
            parts.append(
                f'<line x1="{a:.1f}" x2="{a:.1f}" y1="{y(bar[0]):.1f}" y2="{y(bar[1]):.1f}" '
                f'stroke="{colour}"/>'
            )
    for (a, b), label in zip(at, one.labels or (), strict=False):
        anchor = "start" if a < WIDTH * 0.7 else "end"
        parts.append(_text(a + (7 if anchor == "start" else -7), b - 6, label, anchor, colour))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(text)}</text>"
