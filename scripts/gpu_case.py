"""One life of the engine for `gpu_check.py`, in a process of its own: what it measures.

    python scripts/gpu_case.py NAME --checkpoint DIR --out OUT [--beside NAME,NAME]

Writes OUT/NAME.json. Cases that run beside each other start together, wait until all are up, and
then measure one at a time on each GPU, so that compilation overlaps and timings do not.
"""

from __future__ import annotations

import argparse
import bisect
import fcntl
import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from scripts import jit_workers  # noqa: E402
from serve.allreduce_tier import FUSION_OFF, OTHERS_OFF  # noqa: E402

SCHEMA_VERSION = 1
PROMPT_TOKENS = (1, 127, 128, 129, 600, 2300)  # around the window, and beyond the indexer's top-k
OUTPUT_TOKENS = 48
STREAMS = (1, 2, 4, 8)
STREAM_PROMPT_TOKENS, STREAM_OUTPUT_TOKENS, REPEATS = 256, 128, 3
LONG_PROMPT_TOKENS, LONG_OUTPUT_TOKENS = 65_536, 32
HELDOUT_OUTPUT_TOKENS = 64
PROFILE_STEPS = 16
KV_CACHE_BYTES = 2 << 30  # fixed: what is free is not ours alone
LAYER_KINDS = {0: "window", 4: "csa", 128: "hca"}


@dataclass(frozen=True)
class Case:
    """One life of the engine.

    Attributes:
        k: speculative tokens.
        tiny: the trained checkpoint instead.
        moe_backend: of the experts, as vLLM names it.
        ranks: of tensor parallelism, a GPU each.
        tier: of our all-reduce; "" leaves it to vLLM.
    """

    k: int
    eager: bool = False
    long_prompt: bool = False
    profile: bool = False
    tiny: bool = False
    # What vLLM takes on sm_120 without us; on sm_90 it would take Humming, which unpacks a layer to
    # int32.
    moe_backend: str = "marlin"
    ranks: int = 1
    tier: str = ""


OURS = "external"  # moe_backend of our experts
CASES: dict[str, Case] = {
    "graphs-k0": Case(0, long_prompt=True, profile=True),
    "graphs-k1": Case(1, long_prompt=True, profile=True),
    # The same with our experts: what they change.
    "ours-k0": Case(0, long_prompt=True, profile=True, moe_backend=OURS),
    "ours-k1": Case(1, long_prompt=True, profile=True, moe_backend=OURS),
    "graphs-k2": Case(2),
    "graphs-k3": Case(3),
    "eager-k0": Case(0, eager=True, profile=True),
    "eager-k1": Case(1, eager=True, profile=True),
    "tiny-k0": Case(0, eager=True, tiny=True, moe_backend="auto"),
    "tiny-k1": Case(1, eager=True, tiny=True, moe_backend="auto"),
    # Two GPUs: our experts and our all-reduce; and NCCL in its place.
    "pinned-k1": Case(1, moe_backend=OURS, ranks=2, tier="host-pinned"),
    "push-k1": Case(1, moe_backend=OURS, ranks=2, tier="peer-push"),
    "nccl-k1": Case(1, moe_backend=OURS, ranks=2),
}


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
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        moe_backend=case.moe_backend,
        enable_prefix_caching=False,
        speculative_config=speculative,
        disable_log_stats=False,
        # The hooks of `scopes` need the model in this process.
        distributed_executor_backend="uni" if case.ranks == 1 else "mp",
        tensor_parallel_size=case.ranks,
        disable_custom_all_reduce=True,
        compilation_config=FUSION_OFF,
        worker_cls="kernels.nvidia.worker.Worker" if case.tier else "auto",
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


def profile_steps(llm: Any, case: Case, vocab_size: int) -> dict[str, Any]:
    """GPU time in decode steps of one request: of the slowest kernels, and by kind of layer when
    eager, of what CUDA graphs launched when not. `steps` counts those that decode."""
    from torch.profiler import ProfilerActivity, profile

    k, prompts = case.k, [prompt_ids(2300, 7, vocab_size)]
    generate(llm, prompts, 8)
    # Hooks do not run inside graphs.
    by_kind = (
        scopes(llm.collective_rpc(models_of)[0], decode_tokens=(1 + k) * 2)
        if case.eager
        else nullcontext()
    )
    before = counters(llm) if k else {}
    with by_kind, profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        generate(llm, prompts, PROFILE_STEPS * (1 + k))
    steps = accepted(before, counters(llm))["num_drafts"] if k else PROFILE_STEPS - 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        text = path.read_text(errors="replace")
    return {"steps": steps, **read_trace(json.loads(text, strict=False)["traceEvents"])}


def read_trace(events: list[dict[str, Any]]) -> dict[str, Any]:
    """GPU time of each scope by the moment at which its kernels were launched, and in graphs.

    `key_averages` would leave out what no operator of PyTorch launched: Triton, TileLang, DeepGEMM.

    Args:
        events: `traceEvents` of a Chrome trace, times in microseconds.
    Raises:
        RuntimeError: no kernel was recorded.
    """
    launched_at: dict[int, float] = {}
    graph_launches: set[int] = set()
    kernels, spans = [], defaultdict(list)
    graph_ends: dict[int, tuple[float, float]] = {}
    for event in events:
        category, arguments = event.get("cat"), event.get("args", {})
        if category in ("cuda_runtime", "cuda_driver") and "correlation" in arguments:
            launched_at.setdefault(arguments["correlation"], event["ts"])
            if "GraphLaunch" in event["name"]:
                graph_launches.add(arguments["correlation"])
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            correlation = arguments.get("correlation")
            kernels.append((event["name"], event["dur"], correlation))
            begin, end = graph_ends.get(correlation, (math.inf, -math.inf))
            ended = max(end, event["ts"] + event["dur"])
            graph_ends[correlation] = (min(begin, event["ts"]), ended)
        elif category == "user_annotation":
            kind, _, part = event["name"].partition("/")
            if part and kind in (*LAYER_KINDS.values(), "mtp"):
                spans[part].append((event["ts"], event["ts"] + event["dur"], event["name"]))
    if not kernels:
        raise RuntimeError("the profiler recorded no kernel")
    calls = Counter(name for rows in spans.values() for _, _, name in rows)
    inside: Counter[str] = Counter()
    by_kernel: dict[str, list[float]] = defaultdict(list)
    in_graphs: Counter[str] = Counter()
    starts = {part: [start for start, _, _ in sorted(rows)] for part, rows in spans.items()}
    ordered = {part: sorted(rows) for part, rows in spans.items()}
    unplaced = 0.0
    for name, duration, correlation in kernels:
        by_kernel[name].append(duration)
        if correlation in graph_launches:
            in_graphs[name[:160]] += duration
        launch = launched_at.get(correlation)
        if launch is None:
            unplaced += duration
            continue
        for part, rows in ordered.items():
            row = bisect.bisect_right(starts[part], launch) - 1
            if row >= 0 and launch <= rows[row][1]:
                inside[rows[row][2]] += duration
    slowest = sorted(by_kernel.items(), key=lambda item: -sum(item[1]))[:40]
    return {
        "kinds": {
            name: {"calls": count, "us_per_call": inside[name] / count}
            for name, count in calls.items()
        },
        "us_total": sum(duration for _, duration, _ in kernels),
        "us_of_unknown_launch": unplaced,
        "kernels": [
            {"name": name[:160], "calls": len(times), "us": sum(times)} for name, times in slowest
        ],
        "us_in_graphs": dict(in_graphs.most_common()),
        "us_spanned_by_graphs": sum(
            end - begin for launch, (begin, end) in graph_ends.items() if launch in graph_launches
        ),
    }


def measure_texts(llm: Any, k: int, vocab_size: int) -> dict[str, Any]:
    """Greedy texts with what separated the two best tokens, and what the drafts were worth."""
    prompts = [prompt_ids(length, length, vocab_size) for length in PROMPT_TOKENS]
    before = counters(llm) if k else {}
    together, _ = generate(llm, prompts, OUTPUT_TOKENS, top=2)
    result: dict[str, Any] = {
        "prompt_tokens": PROMPT_TOKENS,
        "together": [text_of(completion) for completion in together],
        "speculation": accepted(before, counters(llm)) if k else None,
    }
    if not k:
        alone = [generate(llm, [prompt], OUTPUT_TOKENS, top=2)[0][0] for prompt in prompts]
        result["alone"] = [text_of(completion) for completion in alone]
    return result


def measure_long(llm: Any, vocab_size: int) -> dict[str, Any]:
    """One long prompt."""
    ids = prompt_ids(LONG_PROMPT_TOKENS, 9, vocab_size)
    _, first_s = generate(llm, [ids], 1)
    completions, seconds = generate(llm, [ids], LONG_OUTPUT_TOKENS, top=2)
    return {
        "prompt_tokens": len(ids),
        "seconds_first_token": first_s,
        "seconds": seconds,
        **text_of(completions[0]),
    }


def measure_heldout(llm: Any, k: int, checkpoint: Path) -> dict[str, Any]:
    """The trained model's acceptance on the prompts kept from its training."""
    from tiny import data, tokenizer

    prompts = data.read_prompts(ROOT / "tiny" / "heldout.jsonl", tokenizer.load(checkpoint))
    before = counters(llm) if k else {}
    # Without drafts one token more: what the last draft of the others is compared with.
    completions, _ = generate(llm, prompts, HELDOUT_OUTPUT_TOKENS + (k == 0))
    return {
        "num_prompts": len(prompts),
        "tokens": [list(completion.token_ids) for completion in completions],
        "speculation": accepted(before, counters(llm)) if k else None,
    }


def wait_for(names: list[str], out: Path) -> None:
    """Until each of these cases is up, or has ended."""
    while not all((out / f"{n}.ready").exists() or (out / f"{n}.json").exists() for n in names):
        time.sleep(0.2)


def run_case(
    name: str, checkpoint: Path, out: Path, beside: list[str], save: Callable[[Any], None]
) -> None:
    """Everything that one engine life measures; `save` takes what is known after each part.

    A part that fails does not take the others with it: its error is the result's error.
    """
    import torch
    import vllm

    case = CASES[name]
    start = time.perf_counter()
    jit_workers.install(max(1, (os.cpu_count() or 1) // (1 + len(beside))))
    llm = start_engine(case, checkpoint)
    result: dict[str, Any] = {
        "error": None,
        "start_s": time.perf_counter() - start,
        "started_beside": beside,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "vllm": vllm.__version__,
        "load": json.loads((out / f"{name}.load.json").read_text()),
    }
    vocab_size = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "texts": lambda: measure_texts(llm, case.k, vocab_size)
    }
    if case.tiny:
        parts["heldout"] = lambda: {"heldout": measure_heldout(llm, case.k, checkpoint)}
    else:
        parts["streams"] = lambda: {"streams": measure_streams(llm, case.k, vocab_size)}
    if case.long_prompt:
        parts["long"] = lambda: {"long": measure_long(llm, vocab_size)}
    if case.profile:
        parts["profile"] = lambda: {"profile": profile_steps(llm, case, vocab_size)}
    (out / f"{name}.ready").touch()
    wait_for(beside, out)
    with (out / f"measuring-{os.environ.get('CUDA_VISIBLE_DEVICES')}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for part, measure in parts.items():
            part_start = time.perf_counter()
            try:
                result |= measure()
            except Exception as error:  # noqa: BLE001 - the error is the case's result
                traceback.print_exc()
                result["error"] = f"{part}: {type(error).__name__}: {error}"
            print(f"gpu_case: {name}: {part}: {time.perf_counter() - part_start:.1f} s", flush=True)
            if torch.cuda.is_available() and case.ranks == 1:  # else the ranks hold it
                result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
            save(result)


def main(argv: list[str] | None = None) -> int:
    """Run one case and write its file, whatever happens; returns the exit status."""
    parser = argparse.ArgumentParser(prog="gpu_case", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=CASES)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beside", default="", help="cases started together with this one")
    args = parser.parse_args(argv)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # hooks and memory are of this process
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # of two ranks
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # all is greedy; it takes 140 s to build
    os.environ["DSV4_ALLREDUCE_TIER"] = CASES[args.name].tier
    os.environ |= OTHERS_OFF
    os.environ["DSV4_LOAD_RECORD"] = str(args.out / f"{args.name}.load.json")
    saved: dict[str, Any] = {}

    def save(result: dict[str, Any]) -> None:
        saved.update(result)
        body = {"schema_version": SCHEMA_VERSION, "case": args.name, **result}
        path = args.out / f"{args.name}.json"
        path.with_suffix(".partial").write_text(json.dumps(body, indent=1))

    try:
        beside = [name for name in args.beside.split(",") if name]
        run_case(args.name, args.checkpoint, args.out, beside, save)
    except Exception as error:  # noqa: BLE001 - the error is the case's result
        traceback.print_exc()
        save(saved | {"error": f"{type(error).__name__}: {error}"})
    (args.out / f"{args.name}.partial").rename(args.out / f"{args.name}.json")
    return 1 if saved["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
