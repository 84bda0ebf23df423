"""Scores as one HTML file, with the report machinery of `bench.load`."""

from __future__ import annotations

from html import escape
from typing import Any

from bench.eval import markdown
from bench.load.html import page, table
from bench.load.svg import Series, chart


def render(result: dict[str, Any]) -> str:
    """One scored result."""
    parts = [f'<p class="warning">{escape(w)}</p>' for w in markdown.warnings(result)]
    parts.append(table(markdown.HEAD, markdown.rows(result)))
    parts += [f"<p>{escape(line)}</p>" for line in (*markdown.more_lines(result), markdown.NOTE)]
    parts.append(_figures([scores(result), verdicts(result)]))
    for entry in result["tasks"]:
        if entry["groups"]:
            parts += [f"<h2>{escape(entry['task'])}</h2>"]
            parts.append(table(["group", "right"], markdown.groups(entry)))
    parts += [f"<p>{escape(line)}</p>" for line in markdown.data_lines(result)]
    parts.append(f"<p>{escape(markdown.provenance_line(result))}</p>")
    parts.append(f"<p><code>{escape(result['provenance']['command'])}</code></p>")
    return page(markdown.title(result), parts)


def scores(result: dict[str, Any]) -> tuple[str, str]:
    """A dot with its interval for each task."""
    series = [
        Series(
            entry["task"],
            [(place, 100 * entry["score"])],
            line=False,
            bars=[(100 * entry["interval"][0], 100 * entry["interval"][1])],
            labels=[entry["task"]],
        )
        for place, entry in enumerate(result["tasks"], 1)
        if entry["n"]
    ]
    title = "Score and Wilson 95 % interval, %"
    return title, chart(title, "task", "score, %", series)


def verdicts(result: dict[str, Any]) -> tuple[str, str]:
    """Shares of what is neither right nor wrong."""
    names = ("invalid", "truncated", "failed")
    series = [
        Series(
            name,
            [(i, 100 * e["shares"][name]) for i, e in enumerate(result["tasks"], 1) if e["n"]],
            line=False,
        )
        for name in names
    ]
    title = "Answers that could not be judged, % (together above 5 % a score is not valid)"
    return title, chart(title, "task", "share, %", series)


def _figures(drawn: list[tuple[str, str]]) -> str:
    figures = [
        f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"
        for caption, drawing in drawn
        if drawing
    ]
    return '<div class="charts">' + "\n".join(figures) + "</div>"
