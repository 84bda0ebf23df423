"""Which INT4 experts vLLM's NVIDIA classes take on a fake GPU, and what becomes of the weights."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from kernels import build, dispatch
from kernels.tiled import tile_scale, tile_weight
from scripts.make_full_size import FullSizeConfig
from tests.kernels.library_folder import write_library
from tests.loader.conftest import TIMEOUT_S
from tests.loader.ranks import run_ranks
from tests.loader.scenarios import NUM_LAYERS, SCENARIOS, TINY, unbroken

pytestmark = [pytest.mark.engine, pytest.mark.slow]

W4A16, GROUPS_OF_64 = "no two values alike", "INT4 in groups of 64"
SIZES = {
    "hidden_size": TINY["hidden_size"],
    "num_experts": TINY["n_routed_experts"],
    "top_k": TINY["num_experts_per_tok"],
}
INTER = TINY["moe_intermediate_size"]
OURS_TO_4 = [{"max_tokens": 4, "kernel": "ours"}, {"max_tokens": None, "kernel": "marlin"}]
ALWAYS_OURS = [{"max_tokens": None, "kernel": "ours"}]
OURS, MARLIN = "Dsv4MaxqExperts", "MarlinExperts"
# On two ranks a part of w2 is a single group wide, which Marlin reads in another order.
SEGMENTS = {1: OURS_TO_4, 2: ALWAYS_OURS}


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory) -> dict[str, str]:
    """Environment with a library and a table of the tiny layer, on one rank and on two."""
    folder = tmp_path_factory.mktemp("surroundings")
    tables = [
        {**SIZES, "inter_size": INTER // ranks, "segments": segments}
        for ranks, segments in SEGMENTS.items()
    ]
    body = {"schema_version": 1, "device": "fake", "capability": "12.0", "tables": tables}
    table = folder / "table.json"
    table.write_text(json.dumps(body))
    library = write_library(folder / "library")
    return {**os.environ, dispatch.ENV: str(table), build.FOLDER_ENV: str(library)}


def load(folder: Path, env: dict[str, str], *options: str, ranks: int = 1) -> list[dict[str, Any]]:
    """What each rank's harness saw: scenario -> model -> outcome."""
    return run_ranks(folder, ranks, *options, timeout_s=TIMEOUT_S, env=env)


def kernels_of(outcomes: dict[str, Any]) -> dict[str, set[str]]:
    """Experts classes of each loaded model, from the load record's list of modules."""
    assert {outcome["outcome"] for outcome in outcomes.values()} == {"complete"}, outcomes
    return {
        part: {m["kernel"] for m in outcome["modules"] if m["module"].endswith("routed_experts")}
        for part, outcome in outcomes.items()
    }


Loaded = tuple[list[dict[str, Any]], Path]  # what each rank saw, folder of its parameters


@pytest.fixture(scope="module")
def alone(tmp_path_factory, surroundings) -> Loaded:
    """One rank on sm_120, with each of the backends."""
    folder = tmp_path_factory.mktemp("alone")
    backends = ["--moe-backend", "auto", "marlin", "external"]
    return load(folder, surroundings, "--only", W4A16, GROUPS_OF_64, *backends), folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory, surroundings) -> Loaded:
    """Two ranks on sm_120."""
    folder = tmp_path_factory.mktemp("pair")
    return load(folder, surroundings, "--only", W4A16, ranks=2), folder


@pytest.fixture(params=["alone", "pair"])
def loaded(request) -> Loaded:
    return request.getfixturevalue(request.param)


def test_ours_are_chosen_on_sm_120_for_target_and_head(loaded):
    for outcomes in loaded[0]:
        assert kernels_of(outcomes[W4A16]) == {"target": {OURS}, "draft": {OURS}}


@pytest.mark.parametrize(("backend", "expected"), [("marlin", MARLIN), ("external", OURS)])
def test_the_backend_that_is_asked_for_is_chosen(alone, backend, expected):
    [outcomes], _ = alone
    found = kernels_of(outcomes[f"{W4A16}, {backend}"])
    assert found == {"target": {expected}, "draft": {expected}}


def test_groups_of_64_are_marlins_and_an_error_when_asked_of_ours(alone):
    [outcomes], _ = alone
    assert kernels_of(outcomes[GROUPS_OF_64]) == {"target": {MARLIN}, "draft": {MARLIN}}
    for outcome in outcomes[f"{GROUPS_OF_64}, external"].values():
        assert outcome["outcome"] == "ValueError"
        assert re.match(
            "WNA16 MoE backend 'EXTERNAL' does not support the deployment configuration since "
            "weight_group_size = 64; 128 is needed",
            outcome["message"],
        )


def checkpoint() -> dict[str, torch.Tensor]:
    """The scenario's tensors, under the checkpoint's names."""
    edit = SCENARIOS[W4A16].edit
    shards = unbroken(FullSizeConfig(layers=NUM_LAYERS))
    return {n: t for shard in shards for key in shard for n, t in edit(key, shard[key])}


def of_rank(tensors: dict[str, torch.Tensor], block: str, leaf: str, rank: int, ranks: int) -> Any:
    """(w13, w2) of all experts of a layer as stored: a rank's halves of gate and up, then w2's."""

    def stack(name: str, dim: int) -> torch.Tensor:
        experts = range(SIZES["num_experts"])
        whole = torch.stack([tensors[f"{block}.ffn.experts.{e}.{name}.{leaf}"] for e in experts])
        return whole.chunk(ranks, dim)[rank]

    return torch.cat([stack("w1", 1), stack("w3", 1)], 1), stack("w2", 2)


@pytest.mark.parametrize("part", ["target", "draft"])
def test_a_ranks_weights_are_the_checkpoints_tiled_bit_for_bit(loaded, part):
    ranks, folder = loaded
    tensors = checkpoint()
    blocks = {f"model.layers.{i}": f"layers.{i}" for i in range(NUM_LAYERS)}
    if part == "draft":
        blocks = {f"model.layers.{NUM_LAYERS}.mtp_block": "mtp.0"}
    compared = 0
    for rank in range(len(ranks)):
        given = torch.load(folder / str(rank) / W4A16 / f"{part}.pt")
        for module, block in blocks.items():
            for leaf, tile in (("weight_packed", tile_weight), ("weight_scale", tile_scale)):
                w13, w2 = of_rank(tensors, block, leaf, rank, len(ranks))
                stem = f"{module}.ffn.experts.routed_experts"
                assert torch.equal(given[f"{stem}.w13_{leaf}"], tile(w13, gated=True))
                assert torch.equal(given[f"{stem}.w2_{leaf}"], tile(w2))
                compared += 2
    assert compared == len(ranks) * len(blocks) * 4


def test_without_the_library_the_load_fails_with_one_line(tmp_path, surroundings):
    env = surroundings | {build.FOLDER_ENV: str(tmp_path / "absent")}
    [outcomes] = load(tmp_path, env, "--only", W4A16, "--moe-backend", "auto", "marlin")
    for outcome in outcomes[W4A16].values():
        assert outcome["outcome"] == "RuntimeError"
        assert outcome["message"] == (
            f"kernels: {tmp_path / 'absent' / build.LIBRARY} is not built; run `make kernels`, or "
            "take vLLM's own with --moe-backend marlin"
        )
    assert kernels_of(outcomes[f"{W4A16}, marlin"]) == {"target": {MARLIN}, "draft": {MARLIN}}
