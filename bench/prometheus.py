"""Read the counters we report from vLLM's /metrics page."""

import re
from dataclasses import dataclass, fields

_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{.*\})?\s+(\S+)(?:\s+-?\d+)?$")

_METRIC_NAMES = {
    "num_passes": "vllm:iteration_tokens_total_count",
    "generation_tokens": "vllm:generation_tokens_total",
    "num_drafts": "vllm:spec_decode_num_drafts_total",
    "num_draft_tokens": "vllm:spec_decode_num_draft_tokens_total",
    "num_accepted_tokens": "vllm:spec_decode_num_accepted_tokens_total",
}


@dataclass(frozen=True)
class EngineCounters:
    """Counters since the engine started; None where the engine does not export one.

    num_passes: engine steps that returned tokens or ran a prefill, each one forward pass.
    """

    num_passes: int | None
    generation_tokens: int | None
    num_drafts: int | None
    num_draft_tokens: int | None
    num_accepted_tokens: int | None

    def since(self, earlier: "EngineCounters") -> "EngineCounters":
        """Return the difference to an earlier reading, None where either is None.

        Raises:
            ValueError: a counter went backwards, so the engine restarted in between.
        """
        differences: dict[str, int | None] = {}
        for field in fields(self):
            now, then = getattr(self, field.name), getattr(earlier, field.name)
            differences[field.name] = None if now is None or then is None else now - then
            if (differences[field.name] or 0) < 0:
                raise ValueError(f"counter {field.name}: {then}, then {now}; the engine restarted")
        return EngineCounters(**differences)


def parse_samples(text: str) -> dict[str, float]:
    """Return metric name -> value, summed over label sets (vLLM has one set per engine).

    Raises:
        ValueError: a line is neither a comment nor a sample.
    """
    samples: dict[str, float] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        found = _SAMPLE.match(line)
        if not found:
            raise ValueError(f"metrics page: not a sample: {line!r}")
        samples[found[1]] = samples.get(found[1], 0.0) + float(found[2])
    return samples


def read_counters(text: str) -> EngineCounters:
    """Return the counters in the text of a /metrics page."""
    samples = parse_samples(text)
    values = {name: samples.get(metric) for name, metric in _METRIC_NAMES.items()}
    return EngineCounters(**{k: None if v is None else int(v) for k, v in values.items()})
