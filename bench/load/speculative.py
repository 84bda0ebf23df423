"""`bench run --compare-speculative`: one profile without MTP and with it, at each k asked for.

Two engines do not fit on the cards together, so each arm is one life of the server: the arms are
not interleaved, and the machine may drift between them. The same text is asked of all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.load import compare, html, markdown, result
from bench.load import config as config_module
from bench.load import run as run_module
from bench.load.config import LoadConfig, Speculation
from bench.load.errors import LoadError
from bench.load.intervals import Estimate, ratio_of_medians
from bench.load.progress import say
from bench.report import write_result
from bench.server import free_port, running_server

NOTE = (
    "Delta: MTP over no MTP, medians over repeats, with bootstrap 95 % intervals over repeats that "
    "asked the same text. Each arm is one life of the server; the arms are not interleaved."
)
SCHEMA_VERSION = 1
SUFFIX = ".arms.json"  # of the file that says what was begun
Launch = Callable[["Arm"], AbstractContextManager[None]]


@dataclass(frozen=True)
class Plan:
    """What is compared. num_speculative_tokens: of each arm with MTP; empty is the profile's own.

    checkpoint: None is the profile's own. start_timeout_s: of each server.
    """

    profile: str
    checkpoint: Path | None = None
    num_speculative_tokens: tuple[int, ...] = ()
    start_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        counts = self.num_speculative_tokens
        if any(k < 1 for k in counts) or len(set(counts)) != len(counts):
            raise ValueError(
                f"num_speculative_tokens = {counts}; each at least 1, and once: an arm without "
                "MTP is always there"
            )

    def arms(self) -> list[tuple[str, int | None]]:
        """Name and number of speculative tokens of each; None is the profile's own."""
        counts = self.num_speculative_tokens
        return [("no-mtp", 0), *([(f"mtp-k{k}", k) for k in counts] or [("mtp", None)])]


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


def begun(output: Path) -> Path:
    """The file that says what was begun; it is there until all arms are measured."""
    return output.with_name(output.stem + SUFFIX)


def run(
    config: LoadConfig,
    output: Path,
    plan: Plan,
    api_key: str | None = None,
    start: Launch = launch,
) -> str:
    """Measure every arm, write a result for each, and the table; returns the table.

    Files: `<output>-<arm>.json`, `<output>.md`, `<output>.html`.

    Raises:
        LoadError, ServerError: of any arm. What the others wrote stays, and `resume` goes on.
    """
    for path in (begun(output), *(_target(output, name) for name, _ in plan.arms())):
        if path.exists():
            raise LoadError(f"{path}: exists; go on with --resume {begun(output)}, or remove it")
    record = asdict(plan) | {
        "schema_version": SCHEMA_VERSION,
        "config": config_module.to_json(config),
        "checkpoint": plan.checkpoint and str(plan.checkpoint),
        "tokenizer": config.tokenizer and str(config.tokenizer),
    }
    write_result(begun(output), record)
    return _measure(config, output, plan, api_key, start)


def resume(
    path: Path,
    api_key: str | None = None,
    start: Launch = launch,
    *,
    given: LoadConfig | None = None,
) -> str:
    """Go on with what `run` began: arms that are measured stay, one that was cut short goes on.

    Args:
        given: what stands beside --resume.
    Raises:
        LoadError: no such file, not one of `run`, other settings, or an arm that must not be
            believed.
    """
    config, plan = _read(path)
    if given is not None:
        config_module.check_kept(path, config, given)
    output = path.with_name(path.name.removesuffix(SUFFIX) + ".json")
    return _measure(config, output, plan, api_key, start)


def _read(path: Path) -> tuple[LoadConfig, Plan]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["schema_version"]
        if version != SCHEMA_VERSION:
            raise LoadError(f"{path}: schema version {version}; this program has {SCHEMA_VERSION}")
        tokenizer = record["tokenizer"] and Path(record["tokenizer"])
        plan = Plan(
            record["profile"],
            record["checkpoint"] and Path(record["checkpoint"]),
            tuple(record["num_speculative_tokens"]),
            record["start_timeout_s"],
        )
        return config_module.from_json(record["config"], tokenizer), plan
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path}: not what --compare-speculative began: {error!r}") from error


def _measure(
    config: LoadConfig, output: Path, plan: Plan, api_key: str | None, start: Launch
) -> str:
    try:
        results = [_arm(config, output, plan, arm, api_key, start) for arm in plan.arms()]
    except BaseException:
        say(f"go on with: python -m bench run --resume {begun(output)}")
        raise
    text = render(plan.profile, results)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    output.with_suffix(".html").write_text(page(plan.profile, results), encoding="utf-8")
    begun(output).unlink()
    print(text)
    return text


def _arm(
    config: LoadConfig,
    output: Path,
    plan: Plan,
    named: tuple[str, int | None],
    api_key: str | None,
    start: Launch,
) -> dict[str, Any]:
    """The arm's result: read where it was measured before, else measured."""
    name, tokens = named
    target = _target(output, name)
    if target.exists():
        known = result.read(target)
        if found := result.problems(known):
            raise LoadError(
                f"{target}: not to be believed: {'; '.join(found)}; remove it to measure it again"
            )
        say(f"{name}: measured before, {target}")
        return known
    journal = run_module.Files(target).journal
    log = output.with_name(f"{output.stem}-{name}.log")
    arm = Arm(name, plan.profile, plan.checkpoint, tokens, free_port(), log, plan.start_timeout_s)
    say(f"{name}: starting the server, its log is {log}")
    with start(arm):
        armed = replace(
            config,
            url=arm.url,
            speculation=Speculation.ON if tokens != 0 else Speculation.OFF,
            label=f"{plan.profile}-{name}",
        )
        return run_module.run(
            armed, target, api_key, journal if journal.exists() else None, go_on=begun(output)
        )


def _target(output: Path, name: str) -> Path:
    return output.with_name(f"{output.stem}-{name}.json")


def rows(profile: str, results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The reference table's rows: of each cell one without MTP, then one for each arm with it.

    Raises:
        LoadError: the results are not of the same workload.
    """
    base, *others = results
    for other in others:
        compare.check_same_workload(base, other)
    found = []
    for arms in zip(*(one["cells"] for one in results), strict=True):
        first = arms[0]
        condition = f"{first['window']:,} / {first['depth']:,} / {first['max_concurrency']}"
        for number, cell in enumerate(arms):
            deltas = [
                _delta(ratio_of_medians(*_paired(first, cell, figure))) if number else "-"
                for figure in ("decode_tok_s", "ttft_ms")
            ]
            found.append(
                [f"{profile} {_name(cell)}", condition]
                + [markdown.estimate(cell["decode_tok_s"], 1), deltas[0]]
                + [markdown.estimate(cell["ttft_ms"], 0), deltas[1]]
                + [markdown.estimate(cell["output_throughput"], 1)]
                + [markdown.number((cell["acceptance"] or {}).get("length"), 3)]
            )
    return found


HEAD = ["profile", "window / depth / streams", "decode tok/s per stream", "delta", "TTFT ms",
        "delta", "aggregate tok/s", "acceptance length"]  # fmt: skip


def render(profile: str, results: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    table = markdown.table(HEAD, rows(profile, results))
    return "\n\n".join([f"## {profile}: with and without MTP", table, NOTE,
                        markdown.provenance_line(results[-1])]) + "\n"  # fmt: skip


def page(profile: str, results: Sequence[dict[str, Any]]) -> str:
    """The table, all arms in one plot, and each result's charts as HTML."""
    named = [(_name(one["cells"][0]), one) for one in results]
    parts = [html.table(HEAD, rows(profile, results)), f"<p>{NOTE}</p>"]
    parts.append(html.figures(html.pareto(named)))
    for name, one in named:
        parts += [f"<h2>{name}</h2>", *html.section(one)]
    return html.page(f"{profile}: with and without MTP", parts)


def _name(cell: dict[str, Any]) -> str:
    if cell["acceptance"] is None:
        return "(no MTP)"
    return f"MTP k={cell['acceptance']['num_speculative_tokens']}"


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
