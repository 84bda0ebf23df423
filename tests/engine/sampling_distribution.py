"""Samples of one engine life in several settings, and a test of whether two lives sample alike.

`sampling_distribution.py JOB.json RESULT.npz` is one life, in a process of its own.
JOB: {"model", "engine": vLLM arguments, "steps": [{"name", "settings": {setting: parameters},
      "count": samples per setting, "fault": a key of FAULTS or null}]}
RESULT: `NAME/SETTING`, int32 (count, TOKENS); `accepted`, the share of drafts taken; `drafted`.

The test: the pooled samples are cut into cells by their beginnings, and Pearson's X2 of the two
samples over the cells is compared with its law when the same pooled samples are dealt out anew. That
law is exact whatever the cells are, so no cell is too small for it.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

TOKENS = 4  # of a sample: with one draft the second is drafted, the others drafted or bonus
# Settings share every batch: a parameter that reaches its neighbour's rows is seen, too.
BATCH = 256
LEAST = 50  # samples of a cell, both lives together
DEALT = 1_000
DEALT_AGAIN = 200_000  # where the first law leaves a doubt
DOUBT = 0.01
POWER = 0.8


# ------------------------------------------------------------------------------------- the test


@dataclass(frozen=True)
class Comparison:
    """Of two samples.

    Attributes:
        p: probability of so large a statistic where both come from one distribution.
        statistic: Pearson's X2, and `dealt`, the largest of the samples dealt out anew.
        num_cells: that the samples were cut into.
    """

    p: float
    statistic: float
    dealt: float
    num_cells: int


def cut(samples: np.ndarray, least: int = LEAST) -> np.ndarray:
    """The cell of each sample: the longest beginning that `least` samples share, or the rest of it.

    Args:
        samples: int (samples, tokens), of both lives together: the cut must not know which is whose.
    Returns:
        int (samples,).
    """
    beginnings = Counter(
        tuple(row[:depth]) for row in samples.tolist() for depth in range(samples.shape[1] + 1)
    )
    cells: dict[tuple[int, ...], int] = {}
    found = np.empty(len(samples), dtype=np.int64)
    for i, row in enumerate(samples.tolist()):
        depth = 0
        while depth < len(row) and beginnings[tuple(row[: depth + 1])] >= least:
            depth += 1
        found[i] = cells.setdefault(tuple(row[:depth]), len(cells))
    return found


def compare(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Comparison:
    """Test whether two samples, int (samples, tokens) each, have one distribution."""
    cells = cut(np.concatenate([a, b]))
    counts = np.bincount(cells)
    of_a = np.bincount(cells[: len(a)], minlength=len(counts))
    share = len(a) / len(cells)
    expected = counts * share

    def pearson(counted: np.ndarray) -> np.ndarray:
        return ((counted - expected) ** 2 / (expected * (1 - share))).sum(axis=-1)

    observed = float(pearson(of_a))
    generator = np.random.default_rng(seed)
    p, largest = 1.0, 0.0
    for times in (DEALT, DEALT_AGAIN):
        dealt = pearson(generator.multivariate_hypergeometric(counts, len(a), times, "marginals"))
        # Rounding must not make an equal table larger or smaller than itself.
        p = (1 + int((dealt >= observed * (1 - 1e-9)).sum())) / (1 + times)
        largest = float(dealt.max())
        if p > DOUBT:
            break
    return Comparison(p, observed, largest, len(counts))


def detectable(num_cells: int, count: int, alpha: float) -> float:
    """The total variation from which on any difference is found with probability POWER.

    Of two samples of `count` each that differ by d over the cells, X2 is noncentral by at least
    2 count d^2 (Cauchy-Schwarz); its law and the critical value are taken as normal ones after
    Wilson and Hilferty, and of the same mean and variance.
    """
    freedom = max(1, num_cells - 1)
    spread = 2 / (9 * freedom)
    critical = freedom * (1 - spread + NormalDist().inv_cdf(1 - alpha) * math.sqrt(spread)) ** 3
    low, high = 0.0, 100.0 * critical
    while high - low > 1e-3:
        middle = (low + high) / 2
        law = NormalDist(freedom + middle, math.sqrt(2 * (freedom + 2 * middle)))
        low, high = (low, middle) if 1 - law.cdf(critical) >= POWER else (middle, high)
    return math.sqrt(high / (2 * count))


# ---------------------------------------------------------------------------- an engine's life


def trust_drafts() -> Callable[[], None]:
    """Every draft is taken, right or wrong; the way back."""
    from vllm.v1.sample import rejection_sampler

    verified = rejection_sampler.rejection_sample

    def trusting(drafts, num_drafts, most, ends, probabilities, logits, *rest, **named):
        logits = logits.scatter(1, drafts.long()[:, None], float("inf"))
        return verified(drafts, num_drafts, most, ends, probabilities, logits, *rest, **named)

    rejection_sampler.rejection_sample = trusting
    return lambda: setattr(rejection_sampler, "rejection_sample", verified)


def verify_without_constraints() -> Callable[[], None]:
    """Drafts are verified at temperature 1, without top_p and top_k; the way back."""
    from vllm.v1.sample import rejection_sampler

    constrained = rejection_sampler.apply_sampling_constraints
    rejection_sampler.apply_sampling_constraints = lambda logits, *_: logits
    return lambda: setattr(rejection_sampler, "apply_sampling_constraints", constrained)


def verify_without_penalties() -> Callable[[], None]:
    """Drafts are verified against logits without penalties; the way back."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    penalized = RejectionSampler.apply_penalties
    RejectionSampler.apply_penalties = staticmethod(lambda logits, *_: logits)
    return lambda: setattr(RejectionSampler, "apply_penalties", staticmethod(penalized))


FAULTS = {
    "trust": trust_drafts,
    "no constraints": verify_without_constraints,
    "no penalties": verify_without_penalties,
}


def sample(
    llm: Any, ids: list[int], settings: dict[str, dict[str, Any]], count: int
) -> dict[str, np.ndarray]:
    """`count` continuations of a prompt in each setting, in batches that all settings share.

    Returns:
        For each setting int32 (count, TOKENS); after its end a sample is filled with -1.
    """
    from vllm import SamplingParams

    defaults = {"max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
    parameters = {name: SamplingParams(**(defaults | given)) for name, given in settings.items()}
    order = list(settings) * count
    prompts = [{"prompt_token_ids": ids}] * len(order)
    outputs = llm.generate(prompts, [parameters[name] for name in order], use_tqdm=False)
    rows: dict[str, list[list[int]]] = {name: [] for name in settings}
    for name, output in zip(order, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        rows[name].append(tokens + [-1] * (TOKENS - len(tokens)))
    return {name: np.array(found, dtype=np.int32) for name, found in rows.items()}


def counted(llm: Any, name: str) -> int:
    """One of vLLM's counters of speculation; 0 where there is none."""
    names = {metric.name: metric for metric in llm.get_metrics()}
    metric = names.get(f"vllm:spec_decode_num_{name}_tokens")
    return metric.value if metric else 0


def main(job_file: str, result_file: str) -> None:
    from vllm import LLM

    job = json.loads(Path(job_file).read_text())
    llm = LLM(
        job["model"],
        enforce_eager=True,
        max_num_seqs=BATCH,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **job["engine"],
    )
    result: dict[str, np.ndarray] = {}
    for step in job["steps"]:
        repair = FAULTS[step["fault"]]() if step.get("fault") else None
        found = sample(llm, job["ids"], step["settings"], step["count"])
        result |= {f"{step['name']}/{setting}": rows for setting, rows in found.items()}
        if repair:
            repair()
    result["drafted"] = np.array(counted(llm, "draft"))
    result["accepted"] = np.array(counted(llm, "accepted"))
    with Path(result_file).open("wb") as file:
        np.savez(file, **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
