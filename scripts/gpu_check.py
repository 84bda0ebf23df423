#!/usr/bin/env python3
"""Run the patched engine on one GPU with a full-size checkpoint of few layers, and write JSON.

    python scripts/gpu_check.py prepare --plugin DIR          once; prints what to export
    python scripts/make_full_size.py --out CKPT --layers 4 --device cuda
    python scripts/gpu_check.py run --checkpoint CKPT --out OUT [--cases graphs-k0,graphs-k1]
    python scripts/gpu_check.py report --out OUT              exit 1 if a check failed

Each case is one life of the engine in a process of its own and writes OUT/CASE.json, so that the
cases may be spread over several commands; `report` judges what is there. Needs vLLM with the patch
series applied and this repository on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCHEMA_VERSION = 1
ENTRY_POINT = "[vllm.general_plugins]\ndsv4_maxq = kernels.plugin:register\n"
PROMPT_TOKENS = (1, 127, 128, 129, 600, 2300)  # around the window, and beyond the indexer's top-k
OUTPUT_TOKENS = 48
STREAMS = (1, 2, 4, 8)
STREAM_PROMPT_TOKENS, STREAM_OUTPUT_TOKENS, REPEATS = 256, 128, 3
LONG_PROMPT_TOKENS, LONG_OUTPUT_TOKENS = 65_536, 32
PROFILE_STEPS = 16
LAYER_KINDS = {0: "window", 4: "csa", 128: "hca"}


@dataclass(frozen=True)
class Case:
    """One life of the engine. k: speculative tokens; tiny: the trained checkpoint instead."""

    k: int
    eager: bool = False
    long_prompt: bool = False
    profile: bool = False
    tiny: bool = False


CASES: dict[str, Case] = {
    "graphs-k0": Case(0, long_prompt=True),
    "graphs-k1": Case(1, long_prompt=True),
    "graphs-k2": Case(2),
    "graphs-k3": Case(3),
    "eager-k0": Case(0, eager=True, profile=True),
    "eager-k1": Case(1, eager=True, profile=True),
    "tiny-k0": Case(0, eager=True, tiny=True),
    "tiny-k1": Case(1, eager=True, tiny=True),
}


# ------------------------------------------------------------------------- in the engine's process


def prompt_ids(length: int, seed: int, vocab_size: int) -> list[int]:
    """Random token ids; the same for every case."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(30, vocab_size, (length,), generator=generator).tolist()


def start_engine(case: Case, checkpoint: Path) -> Any:
    from vllm import LLM

    speculative = {"method": "mtp", "num_speculative_tokens": case.k} if case.k else None
    return LLM(
        str(checkpoint),
        skip_tokenizer_init=True,
        enforce_eager=case.eager,
        max_model_len=LONG_PROMPT_TOKENS + 256 if case.long_prompt else 4096,
        max_num_seqs=max(STREAMS),
        max_num_batched_tokens=4096,
        dtype="bfloat16",
        block_size=256,
        kv_cache_dtype="fp8",
        gpu_memory_utilization=0.6,
        enable_prefix_caching=False,
        speculative_config=speculative,
        disable_log_stats=False,
        distributed_executor_backend="uni",  # the hooks of `scopes` need the model in this process
    )


def generate(llm: Any, prompts: list[list[int]], max_tokens: int, top: int | None = None) -> Any:
    """(outputs, seconds); greedy, of exactly `max_tokens` tokens."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=top
    )
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    return [output.outputs[0] for output in outputs], time.perf_counter() - start


def text_of(completion: Any) -> dict[str, Any]:
    """Tokens, and how far the best was from the second best at each position."""
    gaps = []
    for row in completion.logprobs:
        best = sorted((entry.logprob for entry in row.values()), reverse=True)[:2]
        gaps.append(best[0] - best[1])
    return {"tokens": list(completion.token_ids), "gaps": gaps}


def counters(llm: Any) -> dict[str, Any]:
    """vLLM's speculation counters, summed over the engine's life."""
    return {
        metric.name.removeprefix("vllm:spec_decode_"): getattr(
            metric, "value", getattr(metric, "values", None)
        )
        for metric in llm.get_metrics()
        if "spec_decode" in metric.name
    }


def accepted(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Counters of the runs between two readings."""
    drafts = after["num_drafts"] - before["num_drafts"]
    drafted = after["num_draft_tokens"] - before["num_draft_tokens"]
    taken = after["num_accepted_tokens"] - before["num_accepted_tokens"]
    return {
        "num_drafts": drafts,
        "num_draft_tokens": drafted,
        "num_accepted_tokens": taken,
        "acceptance_rate": taken / drafted if drafted else None,
        "acceptance_length": 1 + taken / drafts if drafts else None,
    }


def measure_streams(llm: Any, k: int, vocab_size: int) -> dict[str, Any]:
    """Throughput of 1, 2, 4, 8 concurrent requests; seconds of each repeat."""
    rows = {}
    for streams in STREAMS:
        prompts = [prompt_ids(STREAM_PROMPT_TOKENS, 100 + i, vocab_size) for i in range(streams)]
        generate(llm, prompts, 8)  # warm-up
        first = [generate(llm, prompts, 1)[1] for _ in range(REPEATS)]
        before = counters(llm) if k else {}
        whole = [generate(llm, prompts, STREAM_OUTPUT_TOKENS)[1] for _ in range(REPEATS)]
        decode_s = statistics.median(whole) - statistics.median(first)
        rows[str(streams)] = {
            "seconds": whole,
            "seconds_first_token": first,
            "output_throughput": streams * STREAM_OUTPUT_TOKENS / statistics.median(whole),
            "tpot_ms": decode_s * 1000 / (STREAM_OUTPUT_TOKENS - 1),
            "speculation": accepted(before, counters(llm)) if k else None,
        }
    return rows


def models_of(worker: Any) -> list[Any]:
    """The target and, if there is one, the draft of a vLLM worker, for either model runner."""
    runner = worker.model_runner
    draft = getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
    return [runner.model, draft.model] if draft is not None else [runner.model]


@contextmanager
def scopes(models: list[Any], decode_tokens: int) -> Iterator[None]:
    """Name each decoder layer's attention and experts to the profiler, in decode steps."""
    import torch

    handles = []

    def name(module: Any, label: str) -> None:
        open_scopes: list[Any] = []

        def enter(_module: Any, args: Any, kwargs: Any) -> None:
            shapes = [a.shape for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            is_decode = min(shape[0] for shape in shapes if shape) <= decode_tokens
            scope = torch.profiler.record_function(label if is_decode else "prefill")
            scope.__enter__()
            open_scopes.append(scope)

        def leave(*_: Any) -> None:
            open_scopes.pop().__exit__(None, None, None)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))

    for model in models:
        ratios = model.config.compress_ratios
        for key, module in model.named_modules():
            if type(module).__name__ != "DeepseekV4DecoderLayer":
                continue
            number = int(next(part for part in key.split(".") if part.isdigit()))
            kind = LAYER_KINDS[ratios[number]] if "mtp_block" not in key else "mtp"
            for label, part in (("layer", module), ("attn", module.attn), ("ffn", module.ffn)):
                name(part, f"{kind}/{label}")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def profile_steps(llm: Any, k: int, vocab_size: int) -> dict[str, Any]:
    """GPU time by kind of layer, and of the slowest kernels, in decode steps of one request."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    prompts = [prompt_ids(2300, 7, vocab_size)]
    generate(llm, prompts, 8)
    with (
        scopes(llm.collective_rpc(models_of)[0], decode_tokens=(1 + k) * 2),
        profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler,
    ):
        generate(llm, prompts, PROFILE_STEPS * (1 + k))
    averages = profiler.key_averages()
    kinds = {
        event.key: {"calls": event.count, "us_per_call": event.device_time_total / event.count}
        for event in averages
        # The profiler has each scope on both sides; the CPU's sums the kernels that it started.
        if event.device_type == torch.autograd.DeviceType.CPU
        and event.key.partition("/")[0] in (*LAYER_KINDS.values(), "mtp")
    }
    kernels = sorted(averages, key=lambda event: -event.self_device_time_total)[:40]
    return {
        "kinds": kinds,
        "kernels": [
            {"name": e.key[:160], "calls": e.count, "us": e.self_device_time_total} for e in kernels
        ],
    }


def run_case(name: str, checkpoint: Path, out: Path) -> dict[str, Any]:
    """Everything that one engine life measures."""
    import torch
    import vllm

    case = CASES[name]
    start = time.perf_counter()
    llm = start_engine(case, checkpoint)
    result: dict[str, Any] = {
        "start_s": time.perf_counter() - start,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "vllm": vllm.__version__,
    }
    vocab_size = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    prompts = [prompt_ids(length, length, vocab_size) for length in PROMPT_TOKENS]
    before = counters(llm) if case.k else {}
    together, _ = generate(llm, prompts, OUTPUT_TOKENS, top=2)
    result["prompt_tokens"] = PROMPT_TOKENS
    result["together"] = [text_of(completion) for completion in together]
    result["speculation"] = accepted(before, counters(llm)) if case.k else None
    if not case.k:
        alone = [generate(llm, [prompt], OUTPUT_TOKENS, top=2)[0][0] for prompt in prompts]
        result["alone"] = [text_of(completion) for completion in alone]
    if not case.tiny:
        result["streams"] = measure_streams(llm, case.k, vocab_size)
    if case.long_prompt:
        ids = prompt_ids(LONG_PROMPT_TOKENS, 9, vocab_size)
        _, first_s = generate(llm, [ids], 1)
        completions, seconds = generate(llm, [ids], LONG_OUTPUT_TOKENS, top=2)
        result["long"] = {
            "prompt_tokens": len(ids),
            "seconds_first_token": first_s,
            "seconds": seconds,
            **text_of(completions[0]),
        }
    if case.profile:
        result["profile"] = profile_steps(llm, case.k, vocab_size)
    if torch.cuda.is_available():
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    result["load"] = json.loads((out / f"{name}.load.json").read_text())
    return result


def case_main(name: str, checkpoint: Path, out: Path) -> int:
    """Run one case and write its file, whatever happens."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # hooks and memory are of this process
    os.environ["DSV4_LOAD_RECORD"] = str(out / f"{name}.load.json")
    try:
        result: dict[str, Any] = {"error": None, **run_case(name, checkpoint, out)}
    except Exception as error:  # noqa: BLE001 - the error is the case's result
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    body = {"schema_version": SCHEMA_VERSION, "case": name, **result}
    (out / f"{name}.json").write_text(json.dumps(body, indent=1))
    return 1 if result["error"] else 0


# ------------------------------------------------------------------------------------- judging


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Index of the first token that differs, over the shorter of the two."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


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
        if case.k and not result["speculation"]["num_accepted_tokens"]:
            problems.append(f"{name}: no draft token was accepted")
        if case.long_prompt and result["long"]["prompt_tokens"] < 65_536:
            problems.append(f"{name}: the long prompt had {result['long']['prompt_tokens']} tokens")
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
    return "\n".join(lines) + "\n"


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


def run(names: list[str], checkpoint: Path, tiny: Path, out: Path, timeout_s: float) -> int:
    """Run cases one after another; 1 if one failed."""
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in names:
        folder = tiny if CASES[name].tiny else checkpoint
        command = [sys.executable, __file__, "case", name, "--checkpoint", str(folder),
                   "--out", str(out)]  # fmt: skip
        start = time.monotonic()
        with (out / f"{name}.log").open("w") as log:
            try:
                status = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, timeout=timeout_s, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                status = 124
        if not (out / f"{name}.json").exists():
            body = {"case": name, "error": f"ended with status {status} and no result"}
            (out / f"{name}.json").write_text(json.dumps(body))
        print(f"{name}: status {status}, {time.monotonic() - start:.0f} s", flush=True)
        failed |= status != 0
    return int(failed)


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
    case_parser = commands.add_parser("case")
    case_parser.add_argument("name", choices=CASES)
    case_parser.add_argument("--checkpoint", type=Path, required=True)
    case_parser.add_argument("--out", type=Path, required=True)
    report_parser = commands.add_parser("report")
    report_parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.command == "prepare":
        prepare(args.plugin)
        return 0
    if args.command == "case":
        return case_main(args.name, args.checkpoint, args.out)
    if args.command == "run":
        return run(args.cases, args.checkpoint, args.tiny, args.out, args.timeout)
    results = read_results(args.out)
    print(report(results))
    problems = judge(results)
    for problem in problems:
        print(f"gpu_check: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
