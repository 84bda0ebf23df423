#!/usr/bin/env python3
"""Run the patched engine on one GPU with a full-size checkpoint of few layers, and write JSON.

    python scripts/gpu_check.py prepare --plugin DIR          once; prints what to export
    python scripts/make_full_size.py --out CKPT --layers 4 --device cuda
    python scripts/gpu_check.py run --checkpoint CKPT --out OUT [--cases NAMES] [--together N]
    python scripts/gpu_check.py report --out OUT [--cpu CPU_OUT]   exit 1 if a check failed

Each case is one life of the engine (`gpu_case.py`) and writes OUT/CASE.json, so that the cases may
be spread over several commands; `report` judges what is there. `--together 2` starts two engines at
a time; those on one GPU measure one after the other. `--devices 0,1` spreads them over GPUs, and
the cases of two ranks run last, alone, where there are two. The cases with graphs come first: their
warm-up fills TileLang's cache, without which the eager ones compile for minutes while they measure.
`ours-k0` and `ours-k1` are `graphs-k0` and `graphs-k1` with our experts in place of Marlin; they
need the library of `make kernels`, and the report compares them. CPU_OUT holds `tiny-k1` of a CPU,
to compare acceptance with. Needs vLLM with the patch series applied, and this repository on
PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.near_ties import first_difference  # noqa: E402
from scripts.gpu_case import CASES, LAYER_KINDS, LONG_PROMPT_TOKENS, OURS  # noqa: E402
from tiny.config import TinyConfig  # noqa: E402
from tiny.export import repeat_index_heads  # noqa: E402

CASE_SCRIPT = ROOT / "scripts" / "gpu_case.py"
ENTRY_POINT = "[vllm.general_plugins]\ndsv4_maxq = kernels.plugin:register\n"
CPU_TOLERANCE = 0.03  # of the acceptance rate, between two devices
DEADLINE_STATUS = 124
INDEX_HEADS = 64  # as the real model has: the kernels are made for it
OUR_EXPERTS = "Dsv4MaxqExperts"  # in the load record
COMPARED = {"ours-k0": "graphs-k0", "ours-k1": "graphs-k1"}  # with our experts: with Marlin
MOST_KERNELS = 12  # of a comparison


# ------------------------------------------------------------------------------------- judging


def noise(plain: dict[str, Any]) -> float:
    """How far the gap of the two best tokens moves between two batch shapes of one engine."""
    moved = [0.0]
    for a, b in zip(plain["together"], plain["alone"], strict=True):
        at = first_difference(a["tokens"], b["tokens"])
        end = len(a["tokens"]) if at is None else at + 1
        moved += [abs(x - y) for x, y in zip(a["gaps"][:end], b["gaps"][:end], strict=True)]
    return max(moved)


def parity_problems(plain: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Texts that part where the two best tokens were further apart than the noise."""
    limit = noise(plain)
    problems = []
    texts = zip(plain["prompt_tokens"], plain["together"], other["together"], strict=True)
    for length, a, b in texts:
        at = first_difference(a["tokens"], b["tokens"])
        if at is not None and a["gaps"][at] > limit:
            problems.append(
                f"prompt of {length} tokens parts at {at}: gap {a['gaps'][at]:.4f}, "
                f"noise {limit:.4f}"
            )
    return problems


def experts_problems(name: str, load: dict[str, Any]) -> list[str]:
    """Models of a case with our experts whose load record names others."""
    problems = []
    for part in load.keys() & {"target", "draft"}:
        routed = [
            m for m in load[part].get("modules", []) if m["module"].endswith("routed_experts")
        ]
        found = {module["kernel"] for module in routed}
        if found != {OUR_EXPERTS}:
            named = ", ".join(sorted(found)) or "none"
            problems.append(f"{name}: experts of the {part}: {named}; {OUR_EXPERTS} were asked for")
    return problems


def judge(results: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the cases that were run; no line means that all is well."""
    problems = []
    for name, result in results.items():
        if result["error"]:
            problems.append(f"{name}: {result['error']}")
    sound = {name: result for name, result in results.items() if not result["error"]}
    for name, result in sound.items():
        case = CASES[name]
        plain_name = "tiny-k0" if case.tiny else "graphs-k0"
        if plain_name not in sound:
            problems.append(f"{name}: nothing to compare with; run {plain_name}")
        elif name != plain_name:
            problems += [f"{name}: {text}" for text in parity_problems(sound[plain_name], result)]
        parts = {"target", "draft"} if case.k else {"target"}
        if missing := parts - result["load"].keys():
            problems.append(f"{name}: no load record of {', '.join(sorted(missing))}")
        if case.moe_backend == OURS:
            problems += experts_problems(name, result["load"])
        if case.k and not result["speculation"]["num_accepted_tokens"]:
            problems.append(f"{name}: no draft token was accepted")
        if case.long_prompt and result["long"]["prompt_tokens"] < LONG_PROMPT_TOKENS:
            problems.append(f"{name}: the long prompt had {result['long']['prompt_tokens']} tokens")
    return problems


def cpu_problems(cpu: dict[str, dict[str, Any]], gpu: dict[str, dict[str, Any]]) -> list[str]:
    """Acceptance of the trained head that differs between a CPU and this device."""
    problems = []
    for name in ("tiny-k1",):
        if missing := [label for label, run in (("CPU", cpu), ("GPU", gpu)) if name not in run]:
            problems.append(f"{name}: no result of the {' and the '.join(missing)}")
            continue
        rates = [run[name]["heldout"]["speculation"]["acceptance_rate"] for run in (cpu, gpu)]
        if abs(rates[0] - rates[1]) > CPU_TOLERANCE:
            problems.append(
                f"{name}: acceptance {rates[0]:.4f} on the CPU, {rates[1]:.4f} here; "
                f"at most {CPU_TOLERANCE} apart"
            )
    return problems


def report(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown tables."""
    lines = ["| case | start, s | acceptance | tok/s at 1, 2, 4, 8 streams | TPOT at 1, ms | 64k |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, result in results.items():
        if result["error"]:
            lines.append(f"| {name} | {result['error'].splitlines()[0][:120]} | | | | |")
            continue
        streams = result.get("streams", {})
        rates = ", ".join(f"{row['output_throughput']:.0f}" for row in streams.values()) or "-"
        tpot = f"{streams['1']['tpot_ms']:.2f}" if streams else "-"
        accepted_share = (result["speculation"] or {}).get("acceptance_rate")
        share = "-" if accepted_share is None else f"{accepted_share:.1%}"
        long = f"{result['long']['seconds_first_token']:.1f} s" if "long" in result else "-"
        lines.append(f"| {name} | {result['start_s']:.0f} | {share} | {rates} | {tpot} | {long} |")
    for name, result in results.items():
        if kinds := result.get("profile", {}).get("kinds"):
            lines += ["", f"{name}: GPU time of a decode step, by kind of layer, one request", ""]
            lines += ["| kind | layer, us | attention, us | experts, us |", "|---|---|---|---|"]
            for kind in (*LAYER_KINDS.values(), "mtp"):
                times = [kinds.get(f"{kind}/{part}") for part in ("layer", "attn", "ffn")]
                if any(times):
                    cells = ["-" if t is None else f"{t['us_per_call']:.1f}" for t in times]
                    lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    for ours, marlin in COMPARED.items():
        if all({"profile", "streams"} <= results.get(n, {}).keys() for n in (ours, marlin)):
            lines += comparison(marlin, results[marlin], ours, results[ours])
    return "\n".join(lines) + "\n"


def comparison(
    before_name: str, before: dict[str, Any], after_name: str, after: dict[str, Any]
) -> list[str]:
    """A decode step of one request before and after, and the kernels that make the difference."""

    def per_step(result: dict[str, Any]) -> dict[str, float]:
        profile = result["profile"]
        return {name: us / profile["steps"] for name, us in profile["us_in_graphs"].items()}

    def span(result: dict[str, Any]) -> float:
        profile = result["profile"]
        return profile.get("us_spanned_by_graphs", math.nan) / profile["steps"]

    old, new = per_step(before), per_step(after)
    tpot = [result["streams"]["1"]["tpot_ms"] for result in (before, after)]
    changes = {name: new.get(name, 0.0) - old.get(name, 0.0) for name in old | new}
    rows = [
        ("TPOT at 1 stream, ms", *tpot),
        # Kernels that start before the one ahead of them has ended count twice in the sum.
        ("decode step's graphs, from first to last kernel, us", span(before), span(after)),
        ("decode step's graphs, sum over kernels, us", sum(old.values()), sum(new.values())),
        *(
            (f"`{name[:60].replace('|', ' ')}`, us", old.get(name, 0.0), new.get(name, 0.0))
            for name in sorted(changes, key=lambda name: -abs(changes[name]))[:MOST_KERNELS]
        ),
    ]
    head = ["", f"| a decode step | {before_name} | {after_name} | less |", "|---|---|---|---|"]
    return head + [f"| {what} | {a:.2f} | {b:.2f} | {a - b:.2f} |" for what, a, b in rows]


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """The cases whose files are there, in the order of CASES."""
    paths = {name: out / f"{name}.json" for name in CASES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


# ------------------------------------------------------------------------------------- commands


def prepare(plugin: Path) -> None:
    """Make our vLLM entry point visible without installing anything."""
    info = plugin / "dsv4_maxq-0.1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dsv4-maxq\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINT)
    print(f"export PYTHONPATH={ROOT}:{plugin.resolve()}:$PYTHONPATH")


def run(
    names: list[str],
    checkpoint: Path,
    tiny: Path,
    out: Path,
    timeout_s: float,
    together: int,
    devices: list[str],
) -> int:
    """Run cases, `together` at a time and on one device after the other; 1 if one failed."""
    for name in names:
        if CASES[name].ranks > len(devices):
            print(f"{name}: left out, it needs {CASES[name].ranks} devices; see --devices")
    names = [name for name in names if CASES[name].ranks <= len(devices)]
    out.mkdir(parents=True, exist_ok=True)
    if any(CASES[name].tiny for name in names):
        tiny, source = out / "tiny", tiny
        repeat_index_heads(source, tiny, INDEX_HEADS // TinyConfig.load(source).index_n_heads)
    alone = [name for name in names if CASES[name].ranks == 1]
    groups = [alone[i : i + together] for i in range(0, len(alone), together)]
    groups += [[name] for name in names if CASES[name].ranks > 1]
    statuses = [
        status
        for group in groups
        for status in run_together(group, checkpoint, tiny, out, timeout_s, devices)
    ]
    return int(any(statuses))


def run_together(
    names: list[str],
    checkpoint: Path,
    tiny: Path,
    out: Path,
    timeout_s: float,
    devices: list[str],
) -> list[int]:
    """Start these cases at once; their exit statuses."""
    start = time.monotonic()
    running = {}
    for name in names:
        for suffix in ("json", "partial", "ready", "load.json"):
            (out / f"{name}.{suffix}").unlink(missing_ok=True)
    for i, name in enumerate(names):
        ranks = CASES[name].ranks
        seen = ",".join(devices[:ranks] if ranks > 1 else [devices[i % len(devices)]])
        folder = tiny if CASES[name].tiny else checkpoint
        command = [sys.executable, CASE_SCRIPT, name, "--checkpoint", folder, "--out", out,
                   "--beside", ",".join(other for other in names if other != name)]  # fmt: skip
        with (out / f"{name}.log").open("w") as log:
            env = os.environ | {"CUDA_VISIBLE_DEVICES": seen}
            running[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
    statuses = {}
    while running:
        for name, process in list(running.items()):
            status = process.poll()
            if status is None and time.monotonic() - start > timeout_s:
                os.killpg(process.pid, signal.SIGKILL)  # its ranks hold GPUs
                process.wait()
                status = DEADLINE_STATUS
            if status is not None:
                del running[name]
                statuses[name] = status
                close_case(name, status, out)
                print(f"{name}: status {status}, {time.monotonic() - start:.0f} s", flush=True)
        time.sleep(0.2)
    return [statuses[name] for name in names]


def close_case(name: str, status: int, out: Path) -> None:
    """Leave a result of a case that ended without one: what it had measured, and an error."""
    if (out / f"{name}.json").exists():
        return
    partial = out / f"{name}.partial"
    body = json.loads(partial.read_text()) if partial.exists() else {"case": name}
    body["error"] = f"ended with status {status} and no result"
    (out / f"{name}.json").write_text(json.dumps(body))


def case_names(text: str) -> list[str]:
    """Parse `--cases`."""
    names = text.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}; there are {', '.join(CASES)}")
    return names


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_parser = commands.add_parser("prepare")
    prepare_parser.add_argument("--plugin", type=Path, required=True)
    run_parser = commands.add_parser("run")
    run_parser.add_argument("--checkpoint", type=Path, required=True)
    run_parser.add_argument("--tiny", type=Path, default=ROOT / "tiny" / "checkpoint")
    run_parser.add_argument("--out", type=Path, required=True)
    run_parser.add_argument("--cases", type=case_names, default=list(CASES))
    run_parser.add_argument("--timeout", type=float, default=550, help="seconds for one case")
    run_parser.add_argument("--devices", default="0", help="GPUs to spread the engines over")
    run_parser.add_argument("--together", type=int, default=1, help="engines started at once")
    report_parser = commands.add_parser("report")
    report_parser.add_argument("--out", type=Path, required=True)
    report_parser.add_argument("--cpu", type=Path, help="results of the tiny cases on a CPU")
    args = parser.parse_args(argv)
    if args.command == "prepare":
        prepare(args.plugin)
        return 0
    if args.command == "run":
        return run(
            args.cases,
            args.checkpoint,
            args.tiny,
            args.out,
            args.timeout,
            max(args.together, 1),
            args.devices.split(","),
        )
    results = read_results(args.out)
    print(report(results))
    problems = judge(results)
    if args.cpu:
        problems += cpu_problems(read_results(args.cpu), results)
    for problem in problems:
        print(f"gpu_check: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
