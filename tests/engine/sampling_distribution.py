"""Samples of one engine life in several settings, and a test of whether two lives sample alike.

`sampling_distribution.py JOB.json RESULT.npz` is one life, in a process of its own.
JOB: {"model", "engine": vLLM arguments,
      "samples": [{"name", "settings": {setting: [prompt ids, parameters]}, "count": of samples in
                   each, "fault": a key of FAULTS or null}],
      "asked": [[[ids, parameters], ...], ...], requests together, each group after the one before}
RESULT: `NAME/SETTING`, int32 (count, TOKENS); `drafted` and `accepted`, tokens of the samples that
had no fault; `answers`, JSON, as `ask` returns them.

The test: the pooled samples are cut into cells by their beginnings, and Pearson's X2 of the two
samples over the cells is compared with its law when the same samples are dealt out anew. That law
is exact whatever the cells are, so no cell is too small for it.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

TOKENS = 3  # of a sample: with one draft the second is drafted, the third drafted or bonus
# Settings share every batch: a parameter that reaches its neighbour's rows is seen, too.
BATCH = 256
LEAST = 40  # samples of a cell, both lives together
DEALT = 1_000
DEALT_AGAIN = 200_000  # where the first law leaves a doubt
ANSWER_S = 300
DOUBT = 0.01
POWER = 0.8

Settings = dict[str, tuple[list[int], dict[str, Any]]]  # of each its prompt and its parameters


def settings(checkpoint: Path) -> Settings:
    """What both suites compare; all that vLLM lets drafts be verified with is in one of them."""
    from tiny import tokenizer

    encode = tokenizer.load(checkpoint).encode
    # What follows is " pass", and then one of few: all samples tell of the token that is drafted.
    clear = encode("And it came to").ids
    # Digits repeat each other: penalties, negative ones, have something to weigh.
    digits = encode("1").ids
    penalties = {"repetition_penalty": 0.7, "frequency_penalty": -2, "presence_penalty": -2}
    return {
        "temperature and top_p": (clear, {"temperature": 0.7, "top_p": 0.9}),
        "temperature and top_k": (clear, {"temperature": 1.5, "top_k": 4}),
        "penalties": (digits, penalties),
        # The third token may stop a sample, and often would.
        "min_tokens": (clear, {"min_tokens": 2, "stop_token_ids": encode(" when that").ids[1:]}),
    }


# ------------------------------------------------------------------------------------- the test


@dataclass(frozen=True)
class Comparison:
    """Of two samples.

    Attributes:
        p: probability of so large a statistic where both come from one distribution.
        statistic: Pearson's X2.
        score: the statistic as a normal score after Wilson and Hilferty: how far
            beyond the smallest p that can be dealt.
        num_cells: that the samples were cut into.
    """

    p: float
    statistic: float
    score: float
    num_cells: int


def cut(samples: np.ndarray, least: int = LEAST) -> np.ndarray:
    """The cell of each sample: the longest beginning that `least` samples share, or the rest of it.

    Args:
        samples: int (samples, tokens), of both lives: the cut must not know which is whose.
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
    p = 1.0
    for times in (DEALT, DEALT_AGAIN):
        dealt = pearson(generator.multivariate_hypergeometric(counts, len(a), times, "marginals"))
        # Rounding must not make an equal table larger or smaller than itself.
        p = (1 + int((dealt >= observed * (1 - 1e-9)).sum())) / (1 + times)
        if p > DOUBT:
            break
    spread = 2 / (9 * max(1, len(counts) - 1))
    score = ((observed / max(1, len(counts) - 1)) ** (1 / 3) - 1 + spread) / math.sqrt(spread)
    return Comparison(p, observed, score, len(counts))


def score_beyond(found: Comparison, counts: tuple[int, int], relative: float) -> float:
    """How far the statistic is beyond what arithmetic explains, in standard deviations.

    Two lives whose probabilities differ by `relative` in every cell make X2 noncentral by
    m relative^2, where m is half the harmonic mean of the counts; its law is taken as a normal one.
    """
    freedom = max(1, found.num_cells - 1)
    noncentral = counts[0] * counts[1] / sum(counts) * relative**2
    spread = math.sqrt(2 * (freedom + 2 * noncentral))
    return (found.statistic - freedom - noncentral) / spread


def detectable(num_cells: int, counts: tuple[int, int], alpha: float) -> float:
    """The total variation from which on any difference is found with probability POWER.

    Two distributions at a distance d over the cells make X2 noncentral by at least 4 d^2 m, where
    m is half the harmonic mean of the counts (Cauchy-Schwarz). The critical value is Wilson and
    Hilferty's; the noncentral law is taken as a normal one.
    """
    freedom = max(1, num_cells - 1)
    spread = 2 / (9 * freedom)
    critical = freedom * (1 - spread + NormalDist().inv_cdf(1 - alpha) * math.sqrt(spread)) ** 3
    low, high = 0.0, 100.0 * critical
    while high - low > 1e-3:
        middle = (low + high) / 2
        law = NormalDist(freedom + middle, math.sqrt(2 * (freedom + 2 * middle)))
        low, high = (low, middle) if 1 - law.cdf(critical) >= POWER else (middle, high)
    return math.sqrt(high / (4 * counts[0] * counts[1] / sum(counts)))


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


def sample(llm: Any, chosen: Settings, count: int) -> dict[str, np.ndarray]:
    """`count` continuations in each setting of its prompt, in batches that all settings share.

    Returns:
        For each setting int32 (count, TOKENS); after its end a sample is filled with -1.
    """
    from vllm import SamplingParams

    defaults = {"max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
    requests = {
        name: ({"prompt_token_ids": ids}, SamplingParams(**(defaults | given)))
        for name, (ids, given) in chosen.items()
    }
    order = list(chosen) * count
    prompts, parameters = zip(*(requests[name] for name in order), strict=True)
    outputs = llm.generate(list(prompts), list(parameters), use_tqdm=False)
    rows: dict[str, list[list[int]]] = {name: [] for name in chosen}
    for name, output in zip(order, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        rows[name].append(tokens + [-1] * (TOKENS - len(tokens)))
    return {name: np.array(found, dtype=np.int32) for name, found in rows.items()}


def plain(logprobs: Any) -> list[list[int] | None] | None:
    """The token ids of vLLM's log-probabilities, position by position."""
    return logprobs and [row and [int(token) for token in row] for row in logprobs]


def ask(llm: Any, group: list[list[Any]]) -> list[dict[str, Any]]:
    """Answers to requests that were sent together.

    Returns:
        Of each request its `outputs`, or all of them `refused` (the message) or `failed`: by an
        error that is no refusal, or for longer than ANSWER_S.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"no answer after {ANSWER_S} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(ANSWER_S)
    try:
        parameters = []
        for _, given in group:
            form = given.get("structured_outputs")
            form = form and StructuredOutputsParams(**form)
            bias = given.get("logit_bias")  # JSON has made its keys strings
            bias = bias and {int(id_): value for id_, value in bias.items()}
            changed = {"structured_outputs": form, "logit_bias": bias}
            parameters.append(SamplingParams(**(given | changed)))
        prompts = [{"prompt_token_ids": ids} for ids, _ in group]
        found = llm.generate(prompts, parameters, use_tqdm=False)
    except VLLMValidationError as error:
        return [{"refused": str(error)}] * len(group)
    except Exception as error:  # noqa: BLE001 - whatever ends the engine is the answer
        traceback.print_exc()
        return [{"failed": f"{type(error).__name__}: {error}"}] * len(group)
    finally:
        signal.alarm(0)
    return [
        {
            "prompt_logprobs": plain(answer.prompt_logprobs),
            "outputs": [
                {
                    "ids": list(one.token_ids),
                    "text": one.text,
                    "finish": one.finish_reason,
                    "logprobs": plain(one.logprobs),
                }
                for one in answer.outputs
            ],
        }
        for answer in found
    ]


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
    drafted = accepted = 0
    for part in job["samples"]:
        repair = FAULTS[part["fault"]]() if part.get("fault") else None
        before = counted(llm, "draft"), counted(llm, "accepted")
        found = sample(llm, part["settings"], part["count"])
        result |= {f"{part['name']}/{setting}": rows for setting, rows in found.items()}
        if repair:
            repair()
        else:
            drafted += counted(llm, "draft") - before[0]
            accepted += counted(llm, "accepted") - before[1]
    result["drafted"], result["accepted"] = np.array(drafted), np.array(accepted)
    answers = [ask(llm, group) for group in job.get("asked", [])]
    result["answers"] = np.array(json.dumps(answers))
    with Path(result_file).open("wb") as file:
        np.savez(file, **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
