"""kernels/model/allreduce.pml by spin: the protocol holds, and each seeded bug is found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kernels import build

MODEL = build.ROOT / "kernels" / "model" / "allreduce.pml"
PROTOCOL = (build.CSRC / "allreduce_protocol.cuh").read_text(encoding="utf-8")
MAX_DEPTH = 10_000
TIMEOUT_S = 600  # of a hang: a search takes ten seconds where nothing else runs

pytestmark = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")), reason="needs spin and gcc"
)

# FIRST is near TOP = 13, where the generations wrap, or CALLS goes past the wrap and all the way
# round to where a generation of before it comes back.
HOLDS = {
    "without a fault, round the wrap and back": "CALLS=28",
    "without a fault, two blocks": "CALLS=3 FIRST=12 BLOCKS=2",
    "a rank dies": "CALLS=3 FIRST=12 DEATH",
    "a rank dies, two blocks": "CALLS=2 FIRST=13 BLOCKS=2 HALVES=1 DEATH",
    "a rank is slow": "CALLS=3 FIRST=12 SLOW",
    "one or two halves are lost": "CALLS=2 FIRST=13 LOSSES=2",
    "a rank leaves a call out": "CALLS=3 FIRST=12 SKIPS",
}

MIXED = r"assertion violated \(mem\[.*==k\)"  # a sum of halves that are not this call's
OVERWRITTEN = r"assertion violated \(*mem\[.*<=taken\["
NO_END = r"invalid end state"
BUGS = {
    "one generation for a line of 16 bytes": ("CALLS=3 BUG_ONE_GENERATION", MIXED),
    "one slot": ("CALLS=3 BUG_ONE_SLOT", OVERWRITTEN),
    "generation 0 not skipped": ("CALLS=28 BUG_ZERO_NOT_SKIPPED", MIXED),
    "after the last generation 1": ("CALLS=28 BUG_WRAP_TO_ONE", OVERWRITTEN),
    "old lines not cleared": ("CALLS=28 BUG_NO_CLEAR", MIXED),
    "no fence after clearing": ("CALLS=28 BUG_NO_FENCE", NO_END),
    "no deadline": ("CALLS=2 DEATH BUG_NO_DEADLINE", NO_END),
    "an abort that is not sticky": ("CALLS=2 SLOW BUG_NOT_STICKY", r"assertion violated \(g=="),
}


def check(folder: Path, options: str) -> str:
    """What spin's verifier says of the model with these definitions; the search is exhaustive."""
    definitions = [f"-D{option}" for option in options.split()]
    steps = [
        ["spin", "-a", *definitions, MODEL],
        ["gcc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=2000", "-o", "pan", "pan.c"],
        ["./pan", f"-m{MAX_DEPTH}", "-w22"],
    ]
    for step in steps:
        done = subprocess.run(
            step,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "max search depth too small" not in done.stdout
    return done.stdout


@pytest.mark.parametrize("case", HOLDS)
def test_no_sum_is_mixed_no_slot_is_overwritten_unread_and_every_wait_ends(tmp_path, case):
    said = check(tmp_path, HOLDS[case])
    assert "errors: 0" in said, said
    assert "Search not completed" not in said
    assert not re.search(r"invalid end states\s*-|assertion violations\s*-", said)  # both on
    if "CALLS=28" in HOLDS[case]:  # more than a handful of orders was tried
        assert int(re.search(r"(\d+) states, stored", said)[1]) > 1_000_000


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_has_a_counterexample(tmp_path, bug):
    options, found = BUGS[bug]
    said = check(tmp_path, options)
    assert "errors: 1" in said, said
    assert re.search(found, said), said
    assert (tmp_path / f"{MODEL.name}.trail").stat().st_size


def test_the_steps_of_the_model_are_those_of_the_code():
    model = MODEL.read_text(encoding="utf-8")
    steps = set(re.findall(r"^inline (\w+)\(", model, re.MULTILINE)) - {"choose_size", "take"}
    assert steps == {"push", "clear_old", "give_up", "finish"}
    for step in steps:
        assert re.search(rf"^DSV4_DEVICE \w+ {step}\(", PROTOCOL, re.MULTILINE), step
    # What the model takes from the code; change both, and look at what the model then says.
    assert "return g == 0xffffffffu ? 2 : g + 1;" in PROTOCOL
    assert "(int)(generation & 1) * (a.world_size - 1) + index" in PROTOCOL
    assert "got[j].word[1] == generation && got[j].word[3] == generation" in PROTOCOL
    assert "if ((generation >> 1 & 15) != 0) return false;" in PROTOCOL
