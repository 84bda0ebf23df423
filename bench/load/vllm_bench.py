"""`bench run --engine vllm`: vLLM's own Rust bench on the same plan, as a cross-check.

Taken from it: TTFT, TPOT, E2EL and output throughput, which it defines as we do. Not taken: its
steady-state and peak rates, which count chunks as tokens. Its prompts are random tokens, so what it
says of acceptance is not that of text. Each invocation gets a seed of its own, as it sends the same
prompts for one seed, warm-up included.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.load import config as config_module
from bench.load import intervals, markdown, origin
from bench.load import run as run_module
from bench.load.config import Api, Cell, LoadConfig, Mode
from bench.load.errors import LoadError, ServerUnusable, Unbelievable
from bench.load.progress import cell_name, say
from bench.load.server import Server, ServerFacts, base_url
from bench.load.telemetry import Telemetry
from bench.report import write_result

SCHEMA_VERSION = 1
KIND = "vllm-bench"
NAME = "vllm-rs"
# Our name, and that of vLLM's JSON: medians over the requests of one invocation.
FIGURES = (
    ("ttft_ms", "median_ttft_ms", 0),
    ("tpot_ms", "median_tpot_ms", 2),
    ("e2el_ms", "median_e2el_ms", 0),
    ("output_throughput", "output_throughput", 1),
)


def find_binary(given: Path | None) -> Path:
    """The given one, else that of the installed vLLM.

    Raises:
        LoadError: none; the CPU wheel has none.
    """
    if given is not None:
        if not given.is_file():
            raise LoadError(f"--vllm-rs {given}: no such file")
        return given
    spec = importlib.util.find_spec("vllm")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / NAME).is_file():
            return Path(folder) / NAME
    raise LoadError(f"--engine vllm: the installed vLLM has no {NAME}; name one with --vllm-rs")


def command(
    binary: Path, config: LoadConfig, facts: ServerFacts, cell: Cell, seed: int, folder: Path
) -> list[str]:
    """One invocation: as many requests as streams, all at once."""
    tokenizer = config.tokenizer or (Path(facts.root) if facts.root else None)
    if tokenizer is None or not tokenizer.exists():
        raise LoadError("--engine vllm needs --tokenizer: it makes its prompts itself")
    asked = {
        "backend": "openai",
        "base-url": base_url(config.url),
        "model": facts.model,
        "tokenizer": tokenizer,
        "random-input-len": cell.depth,
        "random-output-len": config.output,
        "num-prompts": cell.streams,
        "max-concurrency": cell.streams,
        "seed": seed,
        "extra-body": json.dumps({"temperature": 0}),
        "percentile-metrics": "ttft,tpot,itl,e2el",
        "result-dir": folder,
        "result-filename": "result.json",
    }
    options = [part for name, value in asked.items() for part in (f"--{name}", str(value))]
    flags = ["--prompt-token-ids", "--ignore-eos", "--save-result", "--save-detailed"]
    return [str(binary), "bench", "serve", *options, *flags, "--disable-tqdm", "--no-steady-state"]


def invoke(
    binary: Path, config: LoadConfig, facts: ServerFacts, cell: Cell, seed: int
) -> dict[str, Any]:
    """Run it once; returns its JSON.

    Raises:
        ServerUnusable: it failed or wrote nothing.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        done = subprocess.run(
            command(binary, config, facts, cell, seed, folder),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        written = folder / "result.json"
        if done.returncode or not written.exists():
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise ServerUnusable(f"{NAME}: exit status {done.returncode}: {''.join(last)[:300]}")
        return json.loads(written.read_text(encoding="utf-8"))


def summarize(cell: Cell, runs: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """One cell: medians over invocations with their intervals; a failed one has no figures."""
    good = [run for run in runs if not run["failed"] and run["completed"]]
    entry: dict[str, Any] = asdict(cell) | {
        "num_repeats": len(runs),
        "num_failed": sum(run["failed"] for run in runs),
        "failures": sorted({e for run in runs for e in run.get("errors", ()) if e}),
        "prompt_tokens": sorted({n for run in runs for n in run.get("input_lens", ())}),
    }
    for name, theirs, _ in FIGURES:
        estimate = intervals.median([run[theirs] for run in good], seed)
        entry[name] = estimate and asdict(estimate)
    return entry | {"runs": runs}


async def _facts(config: LoadConfig, api_key: str | None) -> ServerFacts:
    async with run_module.session(config.timeout_s, api_key) as opened:
        return await Server(opened, config.url).facts(config.model)


def run(
    config: LoadConfig, output: Path, binary: Path | None, api_key: str | None = None
) -> dict[str, Any]:
    """Measure every cell, interleaved, write the result, print the table.

    Raises:
        LoadError: bad input, no binary, no server.
        Unbelievable: requests failed; the result is written.
    """
    if config.mode is not Mode.COLD or config.api is not Api.COMPLETIONS:
        raise LoadError("--engine vllm measures mode cold over completions only")
    if output.exists():
        raise LoadError(f"{output}: exists; a result is written once")
    found = find_binary(binary)
    facts = asyncio.run(_facts(config, api_key))
    cells = config.cells(facts.window)
    first = config.seed * 1_000_000
    for number, cell in enumerate(cells):
        say(f"{NAME}: warm-up, {cell_name(cell)}")
        invoke(found, config, facts, cell, first + 999_000 + number)
    runs: list[list[dict[str, Any]]] = [[] for _ in cells]
    for number, repeat in run_module.plan(len(cells), config.repeats):
        say(f"{NAME}: repeat {repeat + 1}/{config.repeats}, {cell_name(cells[number])}")
        seed = first + number * 1000 + repeat
        runs[number].append(invoke(found, config, facts, cells[number], seed))
    result = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "config": config_module.to_json(config),
        "server": facts.to_json(),
        "provenance": origin.collect(facts, config.url, Telemetry.for_url(config.url)),
        "cells": [summarize(c, r, config.seed) for c, r in zip(cells, runs, strict=True)],
    }
    write_result(output, result)
    print(render(result))
    failed = sum(cell["num_failed"] for cell in result["cells"])
    if failed:
        told = "; ".join(sorted({e for cell in result["cells"] for e in cell["failures"]}))
        raise Unbelievable(f"{NAME}: {failed} requests failed: {told[:300]}")
    return result


def render(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    head = ["window / depth / streams", *(name for name, _, _ in FIGURES), "repeats"]
    rows = [
        [f"{cell['window']:,} / {cell['depth']:,} / {cell['streams']}"]
        + [markdown.estimate(cell[name], digits) for name, _, digits in FIGURES]
        + [str(cell["num_repeats"])]
        for cell in result["cells"]
    ]
    note = "Measured by vLLM's Rust bench, for comparison; prompts are random tokens."
    return f"{markdown.table(head, rows)}\n\n{note}\n"
