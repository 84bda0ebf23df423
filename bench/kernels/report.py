"""The result as a table that fits a screen, and as a plot."""

from __future__ import annotations

import math
from typing import Any

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 40, 44
COLOURS = {"uniform": "#4063d8", "mtp": "#cb3c33"}
LABELS = {"uniform": "uniform routing", "mtp": "MTP-like routing (adjacent tokens share experts)"}

_COLUMNS = (
    ("tokens", "{tokens}"),
    ("routing", "{routing}"),
    ("experts", "{experts:.1f}"),
    ("MB", "{mb:.1f}"),
    ("ours us", "{ours:.1f}"),
    ("Marlin us", "{marlin:.1f}"),
    ("x Marlin", "{ratio:.2f}"),
    ("95 %", "{low:.2f}-{high:.2f}"),
    ("GB/s", "{gb_s:.0f}"),
    ("share", "{share:.0%}"),
    ("warm us", "{warm}"),
    ("warm x", "{warm_ratio}"),
    ("serves", "{serves}"),
    ("then x", "{dispatched:.2f}"),
)


def render(result: dict[str, Any]) -> str:
    """Return the table with a head that says what it is of and a foot with what to know."""
    where, shape, layers = result["provenance"], result["shape"], result["layers"]
    rows = [[title for title, _ in _COLUMNS]]
    for case in result["cases"]:
        rows.append([form.format(**_cells(case)) for _, form in _COLUMNS])
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        f"{where['device']} ({where['capability']}), copy {result['copy_gb_s']['before']:.0f} GB/s "
        f"before, {result['copy_gb_s']['after']:.0f} after; hidden {shape['hidden_size']}, inter "
        f"{shape['inter_size']} (TP {result['config']['tp']}), {shape['num_experts']} experts, top "
        f"{shape['top_k']}",
        f"cold L2: {layers['count']} layers by turns, {layers['rotation_bytes'] / 1e6:.0f} MB "
        f"between two visits of one, L2 {where['l2_bytes'] / 1e6:.0f} MB; microseconds per layer, "
        "helpers included",
        "",
    ]
    lines += ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.append("")
    lines += [f"{launch_line(name, parts)}" for name, parts in _breakdowns(result)]
    lines += [f"{name}: {text}" for name, text in result["notes"].items()]
    for target in result["targets"]:
        mark = "met" if target["met"] else "MISSED"
        lines.append(f"target: {target['what']}: {target['reached']:.2f}, {mark}")
    return "\n".join(lines)


def _cells(case: dict[str, Any]) -> dict[str, Any]:
    ours, marlin = case["arms"]["ours"], case["arms"]["marlin"]
    warm = case["warm"]
    return {
        "tokens": case["tokens"],
        "routing": case["routing"],
        "experts": case["experts"],
        "mb": case["bytes"] / 1e6,
        "ours": ours["us"],
        "marlin": marlin["us"],
        **case["ratios"]["marlin"],
        "gb_s": ours["gb_s"],
        "share": ours["share_of_copy"],
        "warm": f"{warm['ours']:.1f}" if warm else "-",
        "warm_ratio": f"{warm['marlin'] / warm['ours']:.2f}" if warm else "-",
        "serves": case["serves"],
        "dispatched": case["dispatched_ratio"],
    }


def _breakdowns(result: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [
        (f"{entry['arm']}, {entry['tokens']} tokens", entry["launches"])
        for entry in result["breakdown"]
    ]


def launch_line(name: str, launches: list[dict[str, Any]]) -> str:
    """One arm's launches: what each adds to the layer, and in brackets how long it runs."""
    parts = (
        f"{launch['kernel']} {launch['added_us']:.1f} ({launch['duration_us']:.1f})"
        for launch in launches
    )
    return f"{name}: " + ", ".join(parts)


def plot(result: dict[str, Any]) -> str:
    """Return an SVG of the speed-up over Marlin by tokens, with its intervals."""
    cases = result["cases"]
    tokens = sorted({case["tokens"] for case in cases})
    top = max([1.2, *(case["ratios"]["marlin"]["high"] for case in cases)])
    top = math.ceil(top * 5) / 5
    last = max(math.log2(tokens[-1]), 1)

    def x(size: float) -> float:
        return LEFT + math.log2(size) / last * (WIDTH - LEFT - RIGHT)

    def y(ratio: float) -> float:
        return HEIGHT - BOTTOM - ratio / top * (HEIGHT - TOP - BOTTOM)

    where = result["provenance"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="16">W4A16 MoE layer, times as fast as vLLM\'s Marlin, cold L2: '
        f"{_escape(where['device'])}, inter {result['shape']['inter_size']}</text>",
    ]
    for i in range(round(top * 5) + 1):
        parts.append(_grid_line(y(i / 5), f"{i / 5:.1f}", strong=i == 5))
    shown = -math.inf
    for size in tokens:
        if x(size) - shown >= 24:  # room for four digits
            shown = x(size)
            parts.append(
                f'<text x="{x(size):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
                f"{size}</text>"
            )
    for i, (routing, colour) in enumerate(COLOURS.items()):
        rows = [case for case in cases if case["routing"] == routing]
        if not rows:
            continue
        points = [(x(case["tokens"]), case["ratios"]["marlin"]) for case in rows]
        line = " ".join(f"{at:.1f},{y(ratio['ratio']):.1f}" for at, ratio in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        for at, ratio in points:
            parts.append(
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(ratio["low"]):.1f}" '
                f'y2="{y(ratio["high"]):.1f}" stroke="{colour}" stroke-width="3" opacity="0.4"/>'
                f'<circle cx="{at:.1f}" cy="{y(ratio["ratio"]):.1f}" r="2.5" fill="{colour}"/>'
            )
        parts.append(f'<text x="{LEFT + 130 * i}" y="32" fill="{colour}">{LABELS[routing]}</text>')
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end">tokens in the batch</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _grid_line(y: float, label: str, strong: bool) -> str:
    colour = "#888" if strong else "#ddd"
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
