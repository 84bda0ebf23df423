"""Scores as Markdown."""

from __future__ import annotations

from typing import Any

from bench.load.markdown import number, provenance_line, table

NOTE = (
    "Score: share of all items asked that were right; in brackets Wilson's 95 % interval. Invalid: "
    "no answer, or several, could be read, or it was declined. Truncated: cut off, mostly at the "
    "limit of tokens, whatever it holds. Cannot see: a loss below this is found in less than 80 % "
    "of paired comparisons of this many items (exact McNemar test, 2 % of the items flip back)."
)
HEAD = ["task", "n", "score", "invalid", "truncated", "failed", "mean output tokens",
        "cannot see a loss below"]  # fmt: skip


def percent(share: float | None, digits: int = 1) -> str:
    """A share as per cent, `-` where there is none."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def title(result: dict[str, Any]) -> str:
    """Label, or model, and whether it reasoned."""
    config = result["config"]
    name = result["label"] or result["server"]["model"]
    return f"{name}: accuracy, reasoning {config['reasoning']}"


def score(entry: dict[str, Any]) -> str:
    """The score with its interval, or that it is not valid, with what was counted."""
    if entry["interval"] is None:
        return "-"
    low, high = (f"{100 * end:.1f}" for end in entry["interval"])
    text = f"{percent(entry['score'])} [{low}, {high}]"
    return f"not valid ({text})" if entry["problems"] else text


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One for each task."""
    return [
        [entry["task"], f"{entry['n']:,} of {entry['num_available']:,}", score(entry)]
        + [percent(entry["shares"][name]) for name in ("invalid", "truncated", "failed")]
        + [number(entry["mean_output_tokens"], 0)]
        + [_points(entry["detectable_loss"])]
        for entry in result["tasks"]
    ]


def groups(entry: dict[str, Any]) -> list[list[str]]:
    """A task's subjects or contexts: name, right of how many."""
    return [[g["group"], f"{g['num_correct']} / {g['n']}"] for g in entry["groups"]]


def warnings(result: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    found = [
        f"{entry['task']} is not valid: {'; '.join(entry['problems'])}"
        for entry in result["tasks"]
        if entry["problems"]
    ]
    for entry in result["tasks"]:
        if entry["n"] <= 100 and entry["task"] != "long":
            found.append(
                f"{entry['task']}: {entry['n']} items are a smoke test; a loss of less than "
                f"{_points(entry['detectable_loss'])} cannot be seen"
            )
    return found + result["notes"]


def data_lines(result: dict[str, Any]) -> list[str]:
    """Where each task's items are from."""
    return [
        f"{e['task']}: {e['data']['source']} ({e['data']['licence']}"
        + (f"; SHA-256 {e['data']['sha256'][:12]}" if e["data"]["sha256"] else "")
        + ")"
        for e in result["tasks"]
    ]


def more_lines(result: dict[str, Any]) -> list[str]:
    """What some tasks have on top."""
    found = []
    for entry in result["tasks"]:
        if entry["syntactic_share"] is not None:
            found.append(
                f"{entry['task']}: {percent(entry['syntactic_share'])} of the programs that were "
                f"run parse; that is not pass@1. Sandbox: {result['sandbox']}"
            )
    return found


def render(result: dict[str, Any]) -> str:
    """The whole result."""
    parts = [f"## {title(result)}", table(HEAD, rows(result))]
    parts += [f"**{warning}**" for warning in warnings(result)]
    for entry in result["tasks"]:
        if entry["task"] == "long":
            parts.append(table(["long", "right"], groups(entry)))
    parts += more_lines(result)
    parts += [NOTE, "Data: " + "; ".join(data_lines(result)), provenance_line(result)]
    parts.append(f"`{result['provenance']['command']}`")
    return "\n\n".join(parts) + "\n"


def _points(loss: float | None) -> str:
    return "-" if loss is None else f"{100 * loss:.1f} points"
