"""The loss curve of a training record as an SVG, without a plotting library."""

from __future__ import annotations

import math

WIDTH, HEIGHT, LEFT, TOP = 640, 300, 44, 24
SERIES = (
    ("loss", "#4063d8", "next token, training"),
    ("heldout_loss", "#cb3c33", "next token, held out"),
    ("mtp_loss", "#389826", "MTP, training"),
)


def loss_curve(curve: list[dict[str, float]]) -> str:
    """SVG text of the three losses over steps; series without points are left out.

    Args:
        curve: entries with `step` and any of `loss`, `heldout_loss`, `mtp_loss`.
    Raises:
        ValueError: no entry has a loss.
    """
    drawn = {
        key: [(e["step"], e[key]) for e in curve if key in e and math.isfinite(e[key])]
        for key, _, _ in SERIES
    }
    everything = [point for points in drawn.values() for point in points]
    if not everything:
        raise ValueError(f"plot: none of the {len(curve)} entries has a loss")
    last = max(step for step, _ in everything)
    low = math.floor(min(v for _, v in everything))
    high = max(math.ceil(max(v for _, v in everything)), low + 1)

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - 12)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - 32)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in range(low, high + 1):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            f'stroke="#ddd"/><text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">'
            f"{tick}</text>"
        )
    for i, (key, colour, label) in enumerate(SERIES):
        if drawn[key]:
            points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in drawn[key])
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
            parts.append(f'<text x="{LEFT + 170 * i}" y="14" fill="{colour}">{label}</text>')
    parts.append(f'<text x="{WIDTH - 12}" y="{HEIGHT - 8}" text-anchor="end">step {last}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 8}">nats per token</text></svg>')
    return "\n".join(parts) + "\n"
