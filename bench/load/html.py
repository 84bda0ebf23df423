"""A result as one HTML file: tables and inline charts, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from bench.load import markdown
from bench.load.rounds import from_json as round_from_json
from bench.load.sizes import format_size
from bench.load.svg import Series, chart

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1400px; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: .82rem } .wide { overflow-x: auto }
th, td { border: 1px solid #ccc; padding: .35rem .6rem; text-align: right; white-space: nowrap }
th { background: #f2f4f6; white-space: normal } th:first-child, td:first-child { text-align: left }
.warning { background: #fdecea; border-left: 4px solid #c8553d; padding: .5rem 1rem }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(540px, 100%), 1fr)) }
svg { min-width: 480px; display: block }
figure { margin: 0; border: 1px solid #ddd; padding: .5rem; overflow-x: auto }
figcaption { font-weight: 600 }
code { background: #f2f4f6; padding: .1rem .3rem; overflow-wrap: anywhere }
"""


def render(result: dict[str, Any]) -> str:
    """One result."""
    return page(markdown.title(result), section(result))


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document."""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table that scrolls by itself where it is wide."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    joined = "\n".join(lines)
    return f'<div class="wide"><table><tr>{cells}</tr>\n{joined}</table></div>'


def charts(result: dict[str, Any]) -> str:
    """All charts of a result that have something to show."""
    drawn = [by_repeat(result, "decode_tok_s", "decode, tok/s per stream")]
    drawn += [by_repeat(result, "ttft_ms", "TTFT, ms"), arrivals(result)]
    return figures(drawn + pareto([("measured", result)]))


def figures(drawn: Sequence[tuple[str, str]]) -> str:
    """Captions and drawings side by side; those without a drawing are left out."""
    shown = [
        f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"
        for caption, drawing in drawn
        if drawing
    ]
    return '<div class="charts">' + "\n".join(shown) + "</div>"


def by_repeat(result: dict[str, Any], figure: str, label: str) -> tuple[str, str]:
    """A figure of every repeat, a line for each cell: drift and outliers show."""
    series = []
    for cell in result["cells"]:
        points = [
            (i + 1.0, repeat[figure])
            for i, repeat in enumerate(cell["repeats"])
            if repeat[figure] is not None
        ]
        series.append(Series(_name(cell), points))
    title = f"{label}, by repeat"
    return title, chart(title, "repeat", label, series)


def arrivals(result: dict[str, Any]) -> tuple[str, str]:
    """Tokens received over time: the first round of the last cell, a line for each stream."""
    if not result["cells"]:
        return "", ""
    cell = result["cells"][-1]
    series = []
    for number, sent in enumerate(round_from_json(cell["rounds"][0]).traces):
        total, points = 0, [(sent.sent_s, 0.0)]
        for chunk in sent.chunks:
            points.append((chunk.at_s, float(total)))
            total += chunk.num_tokens if chunk.num_tokens is not None else 1
            points.append((chunk.at_s, float(total)))
        series.append(Series(f"stream {number + 1}", points))
    counted = all(c[1] is not None for r in cell["rounds"][0]["requests"] for c in r["chunks"])
    title = f"First round of {_name(cell)}: {'tokens' if counted else 'chunks'} received"
    return title, chart(title, "s since the requests were sent", "received", series)


def pareto(named: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, str]]:
    """Aggregate against per-stream speed, a chart for each depth and a dot for each cell.

    The line joins what no other dot beats in both. A depth with one dot has no chart.

    Args:
        named: results and their names: one colour each.
    """
    by_depth: dict[int, dict[str, list[tuple[float, float, str]]]] = {}
    for name, one in named:
        for cell in one["cells"]:
            if cell["decode_tok_s"] and cell["output_throughput"]:
                at = (cell["decode_tok_s"]["value"], cell["output_throughput"]["value"])
                dots = by_depth.setdefault(cell["depth"], {}).setdefault(name, [])
                streams = cell["max_concurrency"]
                dots.append((*at, f"{streams} stream{'s' * (streams > 1)}"))
    return [_pareto_chart(depth, dots) for depth, dots in by_depth.items()]


def _pareto_chart(depth: int, dots: dict[str, list[tuple[float, float, str]]]) -> tuple[str, str]:
    title = f"Aggregate against per-stream speed, depth {depth:,}"
    points = [(x, y) for one in dots.values() for x, y, _ in one]
    if len(points) < 2:
        return title, ""
    series = [
        Series(name, [dot[:2] for dot in one], line=False, labels=[dot[2] for dot in one])
        for name, one in dots.items()
    ]
    series.append(Series("best", frontier(points)))
    return title, chart(title, "decode, tok/s per stream", "aggregate, tok/s", series)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other point beats in one figure without losing in the other, by x."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def section(result: dict[str, Any]) -> list[str]:
    """Warnings, table, charts and provenance of one result."""
    parts = [f'<p class="warning">{escape(w)}</p>' for w in markdown.warnings(result)]
    parts.append(table(*markdown.cells_table(result)))
    parts += [f"<p>{escape(markdown.NOTE)}</p>", charts(result)]
    parts.append(f"<p>{escape(markdown.provenance_line(result))}</p>")
    parts.append(f"<p><code>{escape(result['provenance']['command'])}</code></p>")
    return parts


def _name(cell: dict[str, Any]) -> str:
    return f"{format_size(cell['depth'])} x {cell['max_concurrency']}"
