"""Parity on the real CPU engine with the tiny model, and engines that must break it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from safetensors.torch import load_file, save_file

from bench.client import Choices
from bench.eval import parity, parity_judge
from bench.eval import run as run_module
from bench.eval.config import EvalConfig, TaskName
from bench.eval.stats import mcnemar_loss
from bench.load.errors import Unbelievable
from bench.measurement import Prompt
from bench.server import free_port, running_server
from serve.command import vllm_command
from serve.profiles import load_profile
from tests.engine.engine import CHECKPOINT

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# Their beginnings: shorter to read, and as different.
PROMPTS = [Prompt(p.id, p.text[:100]) for p in parity.default_prompts(200)]
FEW = 40  # enough where most texts change
# p of a broken engine is below it, not just below where parity ends.
CLEARLY = parity_judge.ALPHA / 100
# p of a sound engine is above it: below it is either of two in one run of 100,000.
BY_CHANCE = 1e-5 / 2
TOKENS = 8
# With one draft a pass has twice as many rows as the first run's; the control's has half as many.
STREAMS = (4, 2)
TIMEOUT_S = 600.0
TRUSTING = """
def register():
    from vllm.v1.sample import rejection_sampler

    verified = rejection_sampler.rejection_sample

    def trusting(drafts, num_drafts, most, ends, probabilities, logits, *rest, **named):
        best = float("inf")
        logits = logits.scatter(1, drafts.long()[:, None], best)
        return verified(drafts, num_drafts, most, ends, probabilities, logits, *rest, **named)

    rejection_sampler.rejection_sample = trusting
"""
# Of the texts where a flipped token was clear, more show it: the others part before it at a near
# tie, as one in twenty or so does in every run.
SHOWN_SHARE = 0.6


@contextlib.contextmanager
def serving(
    folder: Path, model: Path = CHECKPOINT, speculation: dict | None = None
) -> Iterator[str]:
    """vLLM's own server of the tiny profile; `speculation` is its speculative config."""
    profile = load_profile("cpu-tiny")
    port = free_port()
    command = vllm_command(profile, model, "127.0.0.1", port, 0)
    if speculation:
        config = {"method": "mtp", "num_speculative_tokens": 1, **speculation}
        command += ["--speculative-config", json.dumps(config)]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        folder.mkdir(parents=True, exist_ok=True)
        with running_server(command, url, folder / "server.log", TIMEOUT_S):
            yield url


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def without(folder) -> tuple[parity.Control, dict]:
    """The control, and retrieval at the model's own context, in one life of the server."""
    with serving(folder / "plain") as url:
        control = asyncio.run(parity.ask_control(url, PROMPTS, TOKENS, STREAMS, 120.0))
        config = EvalConfig(
            url=url, tasks=(TaskName.LONG,), contexts=(2048, 4096), depths=(0.5,),
            streams=4, max_tokens=32,
        )  # fmt: skip
        with contextlib.suppress(Unbelievable):
            run_module.run(config, folder / "long.json")
    return control, json.loads((folder / "long.json").read_text())


def speculative(folder: Path, count: int, **engine) -> parity.Speculative:
    with serving(folder, **engine) as url:
        return asyncio.run(parity.ask_speculative(url, PROMPTS[:count], TOKENS, STREAMS[0], 120.0))


def few(control: parity.Control) -> parity.Control:
    return replace(control, base=control.base[:FEW], again=control.again[:FEW])


def test_the_text_is_the_same_with_and_without_mtp(without, folder):
    control, _ = without
    found = parity_judge.judge(
        PROMPTS, control, speculative(folder / "mtp", len(PROMPTS), speculation={"method": "mtp"})
    )
    assert found["n"] == 200
    assert found["num_accepted_tokens"] > 0.4 * found["num_drafts"]
    # Not `problems`: at their alpha a sound engine has some in one run of a hundred, and no seed
    # fixes which requests share a batch.
    for test in (found["parted"], found["clear"]):
        assert test["p"] > BY_CHANCE, found
        assert test["detectable"] < 0.15, found  # what passes here could have failed


def test_a_head_that_is_trusted_without_verification_breaks_parity(without, folder, monkeypatch):
    """A plugin of the engine takes every draft, right or wrong."""
    plugin = folder / "plugin"
    about = plugin / "trusting-0.dist-info"
    about.mkdir(parents=True)
    (plugin / "trusting.py").write_text(TRUSTING)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: trusting\nVersion: 0\n")
    (about / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ntrusting = trusting:register\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(plugin))
    run = speculative(folder / "trusted", FEW, speculation={"method": "mtp"})
    found = parity_judge.judge(PROMPTS[:FEW], few(without[0]), run)
    assert run.num_accepted_tokens == run.num_drafts
    assert "part at a clear token" in found["problems"][-1], found
    assert found["clear"]["p"] < CLEARLY, found
    with pytest.raises(Unbelievable, match="no parity"):
        parity_judge.check(found)


def test_a_flipped_row_of_the_output_matrix_breaks_parity(without, folder):
    control, _ = without
    broken = flipped(folder / "checkpoint", control)
    run = speculative(folder / "flipped", len(PROMPTS), model=broken, speculation={"method": "mtp"})
    found = parity_judge.judge(PROMPTS, control, run)
    assert "part at a clear token" in found["problems"][-1], found
    assert found["clear"]["p"] < CLEARLY, found


def flipped(target: Path, control: parity.Control) -> Path:
    """The checkpoint with one token's logits of the opposite sign: the most seldom that will do.

    A more frequent one would be an easier test; a fault in fewer texts than the test can call clear
    beside this control is none to it.
    """
    again = tuple(run.token_ids for run in control.again)
    found = parity_judge.judge(PROMPTS, control, parity.Speculative(control.facts, again, 1, 1))
    limit, noisy = found["noise"]["limit"], found["clear"]["control"]
    texts = Counter(token for run in control.base for token in clear_tokens(run, limit))
    enough = {t: n for t, n in texts.items() if mcnemar_loss(int(SHOWN_SHARE * n), noisy) < CLEARLY}
    token = min(enough, key=enough.__getitem__)
    target.mkdir()
    for path in CHECKPOINT.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
            continue
        tensors = load_file(path)
        if "head.weight" not in tensors:
            os.link(path, target / path.name)
            continue
        tensors["head.weight"][token] *= -1
        save_file(tensors, target / path.name, metadata={"format": "pt"})
    return target


def clear_tokens(run: Choices, limit: float) -> set[int]:
    return {token for i, token in enumerate(run.token_ids) if run.gap(i) > limit}


def test_a_head_that_drafts_nothing_shows_nothing(without):
    control, _ = without
    inert = parity.Speculative(control.facts, ids_of(control), 0, 0)
    assert parity_judge.judge(PROMPTS, control, inert)["problems"] == [
        "the server with MTP drafted nothing: this says nothing about MTP"
    ]


def ids_of(control: parity.Control) -> tuple[tuple[int, ...], ...]:
    return tuple(run.token_ids for run in control.base)


def test_retrieval_at_the_models_own_context(without):
    """The tiny model need not be right; the prompts have the lengths that are promised."""
    _, found = without
    (entry,) = found["tasks"]
    assert entry["n"] == entry["num_planned"] == 4
    assert entry["verdicts"]["failed"] == 0
    assert {g["group"] for g in entry["groups"]} == {
        "2048 retrieval", "2048 multi-hop", "4096 retrieval", "4096 multi-hop",
    }  # fmt: skip
