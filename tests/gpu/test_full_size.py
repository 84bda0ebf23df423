"""The patched engine with full-size layers on one GPU, and on two where there are two."""

from __future__ import annotations

import pytest
import torch

from scripts.gpu_case import CASES, STREAMS
from scripts.gpu_check import judge

pytestmark = pytest.mark.gpu
DEVICES = max(torch.cuda.device_count(), 1)
FULL = [name for name, case in CASES.items() if not case.tiny and case.ranks <= DEVICES]
DRAFTING = [name for name in FULL if CASES[name].k]


@pytest.mark.parametrize("name", FULL)
def test_a_case_ran(results, name):
    assert results[name]["error"] is None


@pytest.mark.parametrize("name", FULL)
def test_every_tensor_was_loaded(results, name):
    load = results[name]["load"]
    per_layer = 256 * 3 * 3
    assert load["target"]["num_tensors"] > 4 * per_layer
    if CASES[name].k:
        assert load["draft"]["num_tensors"] == 2338


def test_speculation_and_graphs_do_not_change_the_text(results):
    assert judge({name: results[name] for name in FULL}) == []


@pytest.mark.parametrize("name", DRAFTING)
def test_an_intact_head_is_accepted(results, name):
    """The checkpoint answers t + 1, and its head drafts so."""
    assert results[name]["speculation"]["acceptance_rate"] > 0.9


@pytest.mark.parametrize("name", FULL)
def test_each_number_of_streams_was_served(results, name):
    assert set(results[name]["streams"]) == {str(streams) for streams in STREAMS}


@pytest.mark.parametrize("name", [name for name in FULL if CASES[name].profile])
def test_a_profile_has_decode_steps(results, name):
    profile = results[name]["profile"]
    assert profile["steps"] > 0
    assert bool(profile["us_in_graphs"]) == (not CASES[name].eager)


@pytest.mark.parametrize(
    "name", [name for name in FULL if CASES[name].profile and CASES[name].eager]
)
def test_the_profile_has_every_kind_of_layer(results, name):
    kinds = {key.split("/")[0] for key in results[name]["profile"]["kinds"]}
    assert kinds >= {"window", "csa", "hca"} | ({"mtp"} if CASES[name].k else set())
