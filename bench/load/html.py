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
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid #ddd; padding: .5rem } figcaption { font-weight: 600 }
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
    drawn += [by_repeat(result, "ttft_ms", "TTFT, ms"), arrivals(result), pareto(result)]
    figures = [
        f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"
        for caption, drawing in drawn
        if drawing
    ]
    return '<div class="charts">' + "\n".join(figures) + "</div>"


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


def pareto(result: dict[str, Any]) -> tuple[str, str]:
    """Aggregate against per-stream speed, a dot for each cell; nothing for a single cell."""
    if len(result["cells"]) < 2:
        return "", ""
    by_depth: dict[int, list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        if cell["decode_tok_s"] and cell["output_throughput"]:
            by_depth.setdefault(cell["depth"], []).append(cell)
    series = [
        Series(
            f"depth {depth:,}",
            [(c["decode_tok_s"]["value"], c["output_throughput"]["value"]) for c in cells],
            line=False,
            labels=[f"{c['max_concurrency']} streams" for c in cells],
        )
        for depth, cells in by_depth.items()
    ]
    title = "Aggregate against per-stream speed"
    return title, chart(title, "decode, tok/s per stream", "aggregate, tok/s", series)


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
