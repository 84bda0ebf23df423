"""Results for people and for files: summary, table, sample, JSON."""

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import metrics
from bench.client import Completion
from bench.measurement import Measurement, Prompt

COLUMNS = (
    ("decode tok/s", "decode_tok_s", "{:.1f}"),
    ("TTFT ms", "ttft_ms", "{:.0f}"),
    ("passes/token", "passes_per_token", "{:.3f}"),
    ("acceptance rate", "acceptance_rate", "{:.3f}"),
    ("acceptance length", "acceptance_length", "{:.3f}"),
)


def summarize(measurement: Measurement) -> dict[str, Any]:
    """Return one profile's entry in the result: medians over requests, counters, raw requests."""
    done, counters = measurement.completions, measurement.counters
    rates = [metrics.decode_tok_s(c.e2el_ms, c.ttft_ms, c.output_tokens) for c in done]
    return {
        "name": measurement.name,
        "num_speculative_tokens": measurement.num_speculative_tokens,
        "max_concurrency": 1,
        "decode_tok_s": metrics.median(rates),
        "ttft_ms": metrics.median([c.ttft_ms for c in done]),
        "passes_per_token": metrics.passes_per_token(
            counters.num_passes, counters.generation_tokens
        ),
        "acceptance_rate": metrics.acceptance_rate(
            counters.num_accepted_tokens, counters.num_draft_tokens
        ),
        "acceptance_length": metrics.acceptance_length(
            counters.num_accepted_tokens, counters.num_drafts
        ),
        "counters": asdict(counters),
        "requests": [
            {key: value for key, value in asdict(c).items() if key not in ("text", "token_ids")}
            for c in done
        ],
    }


def render_table(profiles: list[dict[str, Any]]) -> str:
    """Return the results as a table, one profile a row, `-` where nothing was measured."""
    width = max(len("profile"), *(len(profile["name"]) for profile in profiles))
    lines = ["  ".join(["profile".ljust(width), *(title for title, _, _ in COLUMNS)])]
    for profile in profiles:
        cells = [profile["name"].ljust(width)]
        for title, key, form in COLUMNS:
            value = profile[key]
            cells.append(("-" if value is None else form.format(value)).rjust(len(title)))
        lines.append("  ".join(cells))
    return "\n".join(lines)


def render_sample(prompt: Prompt, completion: Completion) -> str:
    """Return one prompt's end and its answer, wrapped for a terminal."""
    fill = {"width": 96, "initial_indent": "    ", "subsequent_indent": "    "}
    asked = "... " + prompt.text[-180:] if len(prompt.text) > 180 else prompt.text
    return "\n".join(
        [f"prompt {prompt.id}:", textwrap.fill(asked, **fill)]
        + ["answer:", textwrap.fill(completion.text[:400] or "(empty)", **fill)]
    )


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write JSON to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
