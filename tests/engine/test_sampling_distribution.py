"""Speculation is lossless: what is sampled has one distribution with and without it.

And no combination of sampling parameters ends the engine that drafts, or changes what others get.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from tests.engine.engine import CHECKPOINT, ROOT, run_script
from tests.engine.sampling_distribution import compare, detectable, score_beyond, settings
from tiny import tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SETTINGS = settings(CHECKPOINT)
MINIMUM = {"min_tokens": SETTINGS.pop("min_tokens")}
DEPTHS = (1,)
# Without drafts a sample is the cheaper one.
COUNT, COUNT_DRAFTED, COUNT_FAULTY = 1350, 1000, 150
COUNT_MINIMUM = 300  # of 150 one run in 3,000 would not show the fault
# Of one false alarm among the comparisons: seeds repeat a run on one kind of CPU, not on the next.
CHANCE = 1e-4
ALPHA = CHANCE / (len(SETTINGS) * len(DEPTHS))
# Total variation over the cells of a comparison: a greater one is found.
DETECTABLE = 0.15
# The normal score of a fault: a p of 1e-9.
CLEARLY = 6.0
FAULTS = {
    "trust": ["penalties"],
    "no constraints": ["temperature and top_p", "temperature and top_k"],
    "no penalties": ["penalties"],
}

COMBINATIONS = 24
# These vLLM refuses with speculation.
REFUSED = {"min_p": 0.1, "logit_bias": {40: 1.0}, "logprob_token_ids": [40, 41]}
CHOICES = ["yes", "no", "perhaps"]
PATTERN = "[a-z]{2,4} [0-9]{1,3}"
BAD_WORDS = ["and", "of"]
BAD_IDS = {430, 284, 794, 286}  # each of them is one token, and one more after a space
STEP_TOKENS = 1024  # a longer prompt takes two steps
ENCODE = tokenizer.load(CHECKPOINT).encode
SHORT = [ids for ids, _ in SETTINGS.values()]
LONG = ENCODE((ROOT / "tiny" / "heldout.txt").read_text()).ids[: STEP_TOKENS + 200]
EOS = 1
# " unto him,": each of its tokens is more than twice as likely as the next best.
GREEDY = [ENCODE("Jesus answered and said").ids, {"temperature": 0, "max_tokens": 3}]


def combination(draw: random.Random) -> dict[str, Any]:
    """Sampling parameters of one request, each in its range; most are left out."""
    most = draw.choice((1, 4, 7))
    taken: dict[str, Any] = {"max_tokens": most, "temperature": draw.choice((0, 0.01, 0.8, 2))}
    options = {
        "top_p": (1e-6, 0.5, 0.95),
        "top_k": (-1, 1, 5, 5000),
        "repetition_penalty": (1e-3, 0.7, 1.3, 100.0),
        "frequency_penalty": (-2.0, 0.7, 2.0),
        "presence_penalty": (-2.0, 0.7, 2.0),
        "seed": (0, 7, 2**63 - 1),
        "min_tokens": range(most + 1),
        "stop_token_ids": [draw.sample(range(20, 400), 40)],
        "ignore_eos": (True,),
        "logprobs": (0, 3),
        "prompt_logprobs": (0, 3),
        "flat_logprobs": (True,),
    }
    if taken["temperature"]:
        options["n"] = (2, 3)
    for name, values in options.items():
        if draw.random() < 0.3:
            taken[name] = draw.choice(values)
    # Two of these might leave no token at all.
    limits = {
        "bad_words": BAD_WORDS,
        "allowed_token_ids": draw.sample(range(20, 2048), 300),
        "structured_outputs": draw.choice(({"choice": CHOICES}, {"regex": PATTERN})),
    }
    if draw.random() < 0.6:
        name = draw.choice(list(limits))
        taken[name] = limits[name]
    return taken


def requests() -> list[list[Any]]:
    """[prompt ids, parameters] of COMBINATIONS valid requests, the same in every run."""
    draw = random.Random(7)
    found = []
    for _ in range(COMBINATIONS):
        parameters = combination(draw)
        long = draw.random() < 0.15
        found.append([LONG if long else draw.choice(SHORT), parameters])
    return found


VALID = requests()
ASKED = [*VALID, *([SHORT[0], {"max_tokens": 4, name: value}] for name, value in REFUSED.items())]
SEEDED = [[SHORT[-1], {"temperature": 1, "max_tokens": 8, "seed": seed}] for seed in (1, 2, 3)]
SEEDED_LONG = [LONG, {"temperature": 1, "max_tokens": 2, "seed": 1}]
GROUPS = {
    "greedy": [GREEDY],
    "seeded": SEEDED,
    **{f"alone {i}": [request] for i, request in enumerate(ASKED)},
    # Neighbours in one batch; the prompts of more than one step were asked alone.
    "together": [GREEDY, *(request for request in VALID if request[0] is not LONG), GREEDY],
    "seeded again": SEEDED,
    "greedy again": [GREEDY],
    "seeded long": [SEEDED_LONG],
}


class Life:
    """What one life of the engine returned."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.answers = dict(zip(GROUPS, json.loads(str(arrays["answers"])), strict=False))

    def ids(self, group: str) -> list[list[int]]:
        return [answer["outputs"][0]["ids"] for answer in self.answers[group]]


def live(folder: Path, k: int, **job: Any) -> Life:
    """One life with k drafts; each has its own random numbers."""
    engine: dict[str, Any] = {"max_model_len": 2048, "max_num_batched_tokens": STEP_TOKENS}
    if k:
        engine["speculative_config"] = {"method": "mtp", "num_speculative_tokens": k}
    body = {"model": str(CHECKPOINT), "engine": engine | {"block_size": 256, "seed": k}, **job}
    job_file, result = folder / f"{k}.json", folder / f"{k}.npz"
    job_file.write_text(json.dumps(body))
    run_script("sampling_distribution.py", job_file, result, {})
    with np.load(result) as arrays:
        return Life(dict(arrays))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Life:
    samples = [
        {"name": "sound", "settings": SETTINGS, "count": COUNT},
        {"name": "minimum", "settings": MINIMUM, "count": COUNT_MINIMUM},
    ]
    return live(tmp_path_factory.mktemp("plain"), 0, samples=samples)


@pytest.fixture(scope="module")
def drafted(tmp_path_factory) -> dict[int, Life]:
    """By the number of drafts; the first life is also asked, and samples with each fault."""
    samples = [
        {"name": "sound", "settings": SETTINGS, "count": COUNT_DRAFTED},
        {"name": "minimum", "settings": MINIMUM, "count": COUNT_MINIMUM},
    ]
    faulty = [
        {
            "name": fault,
            "fault": fault,
            "settings": {name: SETTINGS[name] for name in names},
            "count": COUNT_FAULTY,
        }
        for fault, names in FAULTS.items()
    ]
    folder = tmp_path_factory.mktemp("drafted")
    first = {"samples": samples + faulty, "asked": list(GROUPS.values())}
    return {
        k: live(folder, k, **(first if k == DEPTHS[0] else {"samples": samples})) for k in DEPTHS
    }


@pytest.mark.parametrize("k", DEPTHS)
def test_drafts_were_taken_and_refused(drafted, k):
    arrays = drafted[k].arrays
    assert 0.1 * arrays["drafted"] < arrays["accepted"] < 0.9 * arrays["drafted"]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("k", DEPTHS)
def test_drafts_do_not_change_the_distribution(plain, drafted, k, setting):
    name = f"sound/{setting}"
    found = compare(plain.arrays[name], drafted[k].arrays[name])
    assert found.p > ALPHA, found
    assert detectable(found.num_cells, (COUNT, COUNT_DRAFTED), ALPHA) < DETECTABLE, found


@pytest.mark.xfail(
    strict=True,
    reason="the token after the drafts is held to the minimum as if there were no drafts",
)
@pytest.mark.parametrize("k", DEPTHS)
def test_drafts_do_not_change_where_min_tokens_ends(plain, drafted, k):
    name = "minimum/min_tokens"
    found = compare(plain.arrays[name], drafted[k].arrays[name])
    assert found.p > ALPHA, found


@pytest.mark.parametrize("name", [f"{fault}/{s}" for fault, found in FAULTS.items() for s in found])
def test_a_faulty_verification_is_seen(plain, drafted, name):
    setting = name.partition("/")[2]
    found = compare(plain.arrays[f"sound/{setting}"], drafted[DEPTHS[0]].arrays[name])
    assert found.p < ALPHA, found
    assert found.score > CLEARLY, found


def test_the_comparison_keeps_its_level(plain):
    """Halves of one sample: 5 % of the comparisons have a p of 0.05; 26 of 200 is 1e-6."""
    sample = plain.arrays["sound/penalties"].copy()
    generator = np.random.default_rng(0)
    p = []
    for seed in range(200):
        generator.shuffle(sample)
        p.append(compare(sample[: COUNT // 2], sample[COUNT // 2 :], seed).p)
    assert sum(value <= 0.05 for value in p) <= 26
    assert sum(value <= 0.5 for value in p) >= 60


@pytest.mark.parametrize(("relative", "low", "high"), [(0.0, -9, 0), (0.1, -9, 3), (0.4, 6, 99)])
def test_so_much_as_arithmetic_explains_is_not_counted(relative, low, high):
    """Of an eighth of each probability; no engine is asked."""
    generator = np.random.default_rng(1)
    moved = 1 + relative / 2 * np.where(np.arange(8) % 2, 1, -1)
    likely = np.array([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.05])
    both = [likely * way / (likely * way).sum() for way in (moved, 2 - moved)]
    a, b = (generator.choice(8, 4000, p=p)[:, None] for p in both)
    assert low < score_beyond(compare(a, b), (4000, 4000), 0.125) < high


def test_a_seed_repeats_the_text(drafted):
    life = drafted[DEPTHS[0]]
    first = life.ids("seeded")
    assert first == life.ids("seeded again")
    assert len({tuple(ids) for ids in first}) == len(SEEDED)


def test_each_combination_is_answered_or_refused(drafted):
    answers = drafted[DEPTHS[0]].answers
    problems = []
    for i, request in enumerate(ASKED):
        (answer,) = answers[f"alone {i}"]
        problems += [(i, request[1], problem) for problem in problems_of(request, answer)]
    together = answers["together"][1:-1]
    of_one_step = [request for request in VALID if request[0] is not LONG]
    for request, answer in zip(of_one_step, together, strict=True):
        problems += [("together", request[1], problem) for problem in problems_of(request, answer)]
    assert not problems


def test_the_engine_lives_and_answers_as_before(drafted):
    life = drafted[DEPTHS[0]]
    before = life.ids("greedy")
    assert life.ids("greedy again") == before
    neighbours = life.ids("together")
    assert [neighbours[0], neighbours[-1]] == before * 2


def test_a_seeded_prompt_of_two_steps_is_answered(drafted):
    (answer,) = drafted[DEPTHS[0]].answers["seeded long"]
    assert problems_of(SEEDED_LONG, answer) == []


def problems_of(request: list[Any], answer: dict[str, Any]) -> list[str]:
    """What is wrong with an answer."""
    prompt, asked = request
    if "failed" in answer:
        return [answer["failed"]]
    must_refuse = bool(REFUSED.keys() & asked.keys())
    if must_refuse or "refused" in answer:
        message = answer.get("refused", "answered")
        return [] if must_refuse and "speculative decoding" in message else [message]
    found = []
    if len(answer["outputs"]) != asked.get("n", 1):
        found.append(f"{len(answer['outputs'])} outputs")
    if "prompt_logprobs" in asked:
        first, *rest = answer["prompt_logprobs"]
        if first or not each_in(prompt[1:], rest):
            found.append("prompt_logprobs")
    for output in answer["outputs"]:
        found += problems_of_output(asked, output)
    return found


def each_in(ids: list[int], rows: list[list[int]]) -> bool:
    return len(ids) == len(rows) and all(id_ in row for id_, row in zip(ids, rows, strict=True))


def problems_of_output(asked: dict[str, Any], output: dict[str, Any]) -> list[str]:
    ids, most = output["ids"], asked["max_tokens"]
    stops = set(asked.get("stop_token_ids", ()))
    if not asked.get("ignore_eos"):
        stops.add(EOS)
    stopped = output["finish"] == "stop"
    wrong = {
        "length": not 1 <= len(ids) <= most,
        "finish": not stopped and (output["finish"] != "length" or len(ids) != most),
        "stop": bool(stops & set(ids[:-1])) or stopped != bool(stops & set(ids[-1:])),
        "bad_words": "bad_words" in asked and bool(BAD_IDS & set(ids)),
        "allowed_token_ids": not set(ids) <= set(asked.get("allowed_token_ids", ids)),
        "logprobs": "logprobs" in asked and not each_in(ids, output["logprobs"]),
    }
    if form := asked.get("structured_outputs"):
        pattern = form.get("regex") or "|".join(form["choice"])
        # A grammar ends the text by itself; what ends it before leaves a beginning.
        wrong["structured_outputs"] = ids[-1:] == [EOS] and not re.fullmatch(
            pattern, output["text"]
        )
    else:
        wrong["min_tokens"] = stopped and len(ids) <= asked.get("min_tokens", 0)
    return [f"{name}: {output}" for name, is_wrong in wrong.items() if is_wrong]
