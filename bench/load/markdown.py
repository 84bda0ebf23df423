"""Results as Markdown."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    ("TTFT ms", "ttft_ms", 0),
    ("TPOT ms", "tpot_ms", 2),
    ("decode tok/s per stream", "decode_tok_s", 1),
    ("overlap tok/s", "overlap_tok_s", 1),
    ("aggregate tok/s", "output_throughput", 1),
    ("prefill tok/s", "prefill_tok_s", 0),
)
NOTE = (
    "Medians over repeats, with bootstrap 95 % intervals. Aggregate: all output tokens over first "
    "request sent to last token, prefill included; overlap: of all streams while all decode. "
    "Window: the server's; depth: prompt tokens sent."
)


def number(value: float | None, digits: int) -> str:
    """A number, `-` where nothing was measured."""
    return "-" if value is None else f"{value:,.{digits}f}"


def estimate(entry: dict[str, Any] | None, digits: int) -> str:
    """A median with its interval where it has one."""
    if entry is None:
        return "-"
    text = number(entry["value"], digits)
    if entry["low"] is None:
        return text
    return f"{text} [{number(entry['low'], digits)}, {number(entry['high'], digits)}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def title(result: dict[str, Any]) -> str:
    """Label, or model, and the mode."""
    config = result["config"]
    name = result["label"] or result["server"]["model"]
    return f"{name}, {config['mode']} cache, {config['output']} output tokens"


def cells_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, one per cell."""
    head = ["window / depth / streams", *(name for name, _, _ in COLUMNS)]
    head += ["acceptance length (rate, k)", "failed / sent", "repeats"]
    rows = [
        [f"{cell['window']:,} / {cell['depth']:,} / {cell['max_concurrency']}"]
        + [estimate(cell[key], digits) for _, key, digits in COLUMNS]
        + [acceptance(cell["acceptance"])]
        + [f"{cell['num_failed']} / {cell['num_requests']}", str(cell["num_repeats"])]
        for cell in result["cells"]
    ]
    return head, rows


def acceptance(measured: dict[str, Any] | None) -> str:
    """Length, and the rate with its number of speculative tokens."""
    if measured is None or measured["length"] is None:
        return "-"
    k = measured["num_speculative_tokens"]
    return f"{measured['length']:.3f} ({number(measured['rate'], 3)}, k={k})"


def provenance_line(result: dict[str, Any]) -> str:
    """Where it was measured, in one line."""
    origin, gpus = result["provenance"], result["provenance"]["gpus"]
    device = origin["device"] or "device not known"
    if gpus:
        device = f"{len(gpus)} x {gpus[0]['name']}, driver {gpus[0]['driver']}"
    commit = (origin["commit"] or "unknown")[:12] + (", dirty" if origin["dirty"] else "")
    version = origin["vllm"] or "unknown"
    return f"{device}; vLLM {version}; commit {commit}; {origin['date'][:10]}"


def warnings(result: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    problems = [p for cell in result["cells"] for p in cell["problems"]]
    found = ["Not to be believed: " + "; ".join(dict.fromkeys(problems))] if problems else []
    if result["config"]["text"] == "random":
        found.append("Prompts are random tokens: acceptance and routing are not those of text.")
    if any(w["settled"] is False for w in result["warm_up"]):
        found.append("TPOT was still moving after the warm-up.")
    if any(cell["cache"]["contaminated"] is None for cell in result["cells"]):
        found.append("The server does not tell what came from its prefix cache.")
    if preempted := sum(c["counters"].get("num_preemptions") or 0 for c in result["cells"]):
        found.append(f"The engine preempted requests {preempted} times: its cache was full.")
    if limits := sorted({r for c in result["cells"] for r in c["throttle_reasons"] or ()}):
        found.append(f"GPU clocks were held down: {', '.join(limits)}.")
    return found


def render(result: dict[str, Any]) -> str:
    """The whole result."""
    parts = [f"## {title(result)}", table(*cells_table(result))]
    parts += [f"**{warning}**" for warning in warnings(result)]
    parts += [NOTE, provenance_line(result), f"`{result['provenance']['command']}`"]
    return "\n\n".join(parts) + "\n"
