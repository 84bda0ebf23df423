"""`bench run --compare-speculative`: one profile without and with MTP, each on a server of its own.

Two engines do not fit on the cards together, so each arm is one life of the server: the arms are
not interleaved, and the machine may drift between them. The same text is asked of both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.load import compare, html, markdown
from bench.load import run as run_module
from bench.load.config import LoadConfig, Speculation
from bench.load.intervals import Estimate, ratio_of_medians
from bench.load.progress import say
from bench.server import free_port, running_server

NOTE = (
    "Delta: MTP over no MTP, medians over repeats, with bootstrap 95 % intervals over repeats that "
    "asked the same text. Each arm is one life of the server; the arms are not interleaved."
)
Launch = Callable[["Arm"], AbstractContextManager[None]]


@dataclass(frozen=True)
class Arm:
    """One server. num_speculative_tokens: None is the profile's own."""

    name: str
    profile: str
    checkpoint: Path | None
    num_speculative_tokens: int | None
    port: int
    log: Path
    start_timeout_s: float

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


def launch(arm: Arm) -> AbstractContextManager[None]:
    """Run `python -m serve run` until the block ends."""
    command = [sys.executable, "-m", "serve", "run", "--profile", arm.profile]
    command += ["--port", str(arm.port)]
    if arm.checkpoint is not None:
        command += ["--model", str(arm.checkpoint)]
    if arm.num_speculative_tokens is not None:
        command += ["--num-speculative-tokens", str(arm.num_speculative_tokens)]
    return running_server(command, arm.url, arm.log, arm.start_timeout_s)


def run(
    config: LoadConfig,
    output: Path,
    profile: str,
    checkpoint: Path | None = None,
    num_speculative_tokens: int | None = None,
    start_timeout_s: float = 3600.0,
    start: Launch = launch,
) -> str:
    """Measure both arms, write a result for each, and the table; returns the table.

    Files: `<output>-no-mtp.json`, `<output>-mtp.json`, `<output>.md`, `<output>.html`.

    Raises:
        LoadError, ServerError: of either arm. What the first wrote stays.
    """
    arms = [("no-mtp", 0, Speculation.OFF), ("mtp", num_speculative_tokens, Speculation.ON)]
    results = []
    for name, tokens, speculation in arms:
        log = output.with_name(f"{output.stem}-{name}.log")
        arm = Arm(name, profile, checkpoint, tokens, free_port(), log, start_timeout_s)
        say(f"{name}: starting the server, its log is {log}")
        with start(arm):
            armed = replace(config, url=arm.url, speculation=speculation, label=f"{profile}-{name}")
            target = output.with_name(f"{output.stem}-{name}.json")
            results.append(run_module.run(armed, target))
    text = render(profile, *results)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    output.with_suffix(".html").write_text(page(profile, *results), encoding="utf-8")
    print(text)
    return text


def rows(profile: str, base: dict[str, Any], mtp: dict[str, Any]) -> list[list[str]]:
    """The reference table's rows: two for each cell.

    Raises:
        LoadError: the results are not of the same workload.
    """
    compare.check_same_workload(base, mtp)
    found = []
    for a, b in zip(base["cells"], mtp["cells"], strict=True):
        k = (b["acceptance"] or {}).get("num_speculative_tokens")
        condition = f"{a['window']:,} / {a['depth']:,} / {a['max_concurrency']}"
        for cell, name in ((a, f"{profile} (no MTP)"), (b, f"{profile} MTP k={k}")):
            deltas = [
                _delta(ratio_of_medians(*_paired(a, b, figure))) if cell is b else "-"
                for figure in ("decode_tok_s", "ttft_ms")
            ]
            found.append(
                [name, condition, markdown.estimate(cell["decode_tok_s"], 1), deltas[0]]
                + [markdown.estimate(cell["ttft_ms"], 0), deltas[1]]
                + [markdown.number((cell["acceptance"] or {}).get("length"), 3)]
            )
    return found


HEAD = ["profile", "window / depth / streams", "decode tok/s per stream", "delta", "TTFT ms",
        "delta", "acceptance length"]  # fmt: skip


def render(profile: str, base: dict[str, Any], mtp: dict[str, Any]) -> str:
    """The table as Markdown."""
    table = markdown.table(HEAD, rows(profile, base, mtp))
    return "\n\n".join([f"## {profile}: with and without MTP", table, NOTE,
                        markdown.provenance_line(mtp)]) + "\n"  # fmt: skip


def page(profile: str, base: dict[str, Any], mtp: dict[str, Any]) -> str:
    """The table and both results' charts as HTML."""
    parts = [html.table(HEAD, rows(profile, base, mtp)), f"<p>{NOTE}</p>"]
    for name, one in (("Without MTP", base), ("With MTP", mtp)):
        parts += [f"<h2>{name}</h2>", *html.section(one)]
    return html.page(f"{profile}: with and without MTP", parts)


def _paired(a: dict[str, Any], b: dict[str, Any], figure: str) -> list[list[float | None]]:
    size = min(a["num_repeats"], b["num_repeats"])
    return [[r[figure] for r in cell["repeats"][:size]] for cell in (a, b)]


def _delta(ratio: Estimate | None) -> str:
    if ratio is None:
        return "-"
    text = f"{ratio.value - 1:+.1%}"
    if ratio.low is None or ratio.high is None:
        return text
    return f"{text} [{ratio.low - 1:+.1%}, {ratio.high - 1:+.1%}]"
