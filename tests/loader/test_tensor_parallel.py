"""Two ranks of vLLM's NVIDIA classes, in two processes, against one rank alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from scripts.make_full_size import FullSizeConfig, model_config
from serve.shapes import checkpoint_tensors, flash_config
from tests.loader.ranks import run_ranks
from tests.loader.scenarios import NUM_LAYERS, TINY

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WORLD_SIZE = 2
TIMEOUT_S = 900  # of a hang; both ranks take half a minute
W4A16, PUBLISHED = "no two values alike", "all as DeepSeek published it"
COMPLETE = (W4A16, "B FP8 compressor and indexer", PUBLISHED)
BROKEN = {
    "E no mtp.* tensor": ("draft", r"70 missing: "),
    "F MTP without w2": ("draft", r"13 missing: mtp\.0\.ffn\.experts\.0\.w2\.weight_packed"),
    "G MTP experts named gate/up/down_proj": ("draft", r"36 missing: .*; 36 unexpected: "),
    "K one MTP attention scale absent": ("draft", r"1 missing: mtp\.0\.attn\.wq_b\.weight_scale$"),
    "M one MTP expert absent": ("draft", r"9 missing: mtp\.0\.ffn\.experts\.1\.w1"),
    "N MTP router bias absent": ("draft", r"1 missing: mtp\.0\.ffn\.gate\.bias$"),
    "MTP scales of groups twice as wide": ("draft", r"4 of a wrong size: "),
    # Only the last rank would reach beyond the end.
    "a tensor of another shape": ("target", r"1 of a wrong size: layers\.1\.attn\.wq_b\.weight "),
    "T one expert absent": ("target", r"9 missing: layers\.1\.ffn\.experts\.2\.w1"),
}
# Dimension that is cut over the ranks; every other parameter is whole on each rank.
CUT = {
    r".*\b(embed_tokens|lm_head|shared_head\.head)\.weight": 0,
    r".*\.attn\.(wq_b|wo_a)\.weight\w*": 0,
    r".*\.attn\.wo_b\.weight\w*": 1,
    r".*\.shared_experts\.gate_up_proj\.weight\w*": 0,
    r".*\.shared_experts\.down_proj\.weight\w*": 1,
    r".*\.routed_experts\.w13_weight(_packed|_scale)?": 1,  # after the experts
    r".*\.routed_experts\.w2_weight(_packed|_scale)?": 2,
}
Parameters = dict[str, torch.Tensor]


def load(folder: Path, scenarios: list[str], *options: str) -> list[dict[str, Any]]:
    """Load on all ranks at once; what each saw."""
    return run_ranks(folder, WORLD_SIZE, *options, "--only", *scenarios, timeout_s=TIMEOUT_S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    """Scenario -> model -> what each rank saw."""
    return load(folder, [*COMPLETE, *BROKEN])


@pytest.fixture(scope="module")
def alone(folder, ranks) -> Path:
    """Folder of the parameters that one rank alone loads."""
    (folder / "alone").mkdir()
    run_ranks(folder / "alone", 1, "--only", W4A16, PUBLISHED, timeout_s=TIMEOUT_S)
    return folder / "alone" / "0"


def cut_dim(name: str) -> int | None:
    """Dimension along which the ranks hold parts of a parameter."""
    return next((dim for pattern, dim in CUT.items() if re.fullmatch(pattern, name)), None)


def together(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """One rank's parameter, from those of all ranks."""
    if name.endswith(".attn_sink"):  # padding follows each rank's heads
        heads = TINY["num_attention_heads"] // WORLD_SIZE
        return torch.cat([part[:heads] for part in parts])
    dim = cut_dim(name)
    if dim is None:
        assert torch.equal(bits(parts[0]), bits(parts[1])), f"{name} differs between the ranks"
        return parts[0]
    if "w13" in name or "gate_up_proj" in name:  # w1's part, then w3's, on each rank
        halves = [part.chunk(2, dim) for part in parts]
        return torch.cat([torch.cat(half, dim) for half in zip(*halves, strict=True)], dim)
    return torch.cat(parts, dim)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("scenario", COMPLETE)
@pytest.mark.parametrize("part", ["target", "draft"])
def test_each_rank_fills_every_parameter(ranks, scenario, part):
    for outcomes in ranks:
        result = outcomes[scenario][part]
        assert result["outcome"] == "complete", result
        # Without copies of its own, the head takes embedding and output head from the target.
        shared = 0 if part == "target" or scenario == W4A16 else 2
        assert result["num_loaded"] == result["num_parameters"] - shared


@pytest.mark.parametrize("part", ["target", "draft"])
def test_each_rank_takes_every_tensor_once(ranks, part):
    """One for each layer, expert, projection and leaf of the published layout."""
    config = model_config(FullSizeConfig(NUM_LAYERS), flash_config() | TINY)
    names = [spec.name for spec in checkpoint_tensors(config)]
    names += ["mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"]  # copies of the target's
    expected = sum(name.startswith("mtp.") == (part == "draft") for name in names)
    assert sum(".experts." in name for name in names) == (NUM_LAYERS + 1) * 4 * 3 * 3
    assert [outcomes[W4A16][part]["num_tensors"] for outcomes in ranks] == [expected] * WORLD_SIZE


@pytest.mark.parametrize("scenario", [W4A16, PUBLISHED])
@pytest.mark.parametrize("part", ["target", "draft"])
def test_the_ranks_parts_together_are_what_one_rank_loads(folder, alone, scenario, part):
    paths = [folder / str(rank) / scenario / f"{part}.pt" for rank in range(WORLD_SIZE)]
    whole: Parameters = torch.load(alone / scenario / f"{part}.pt")
    parts: list[Parameters] = [torch.load(path) for path in paths]
    assert parts[0].keys() == parts[1].keys() == whole.keys()
    cut = 0
    for name, expected in whole.items():
        given = together(name, [part[name] for part in parts])
        if name.endswith(".attn_sink"):
            expected = expected[: len(given)]
        assert given.shape == expected.shape, name
        assert torch.equal(bits(given), bits(expected)), name
        cut += cut_dim(name) is not None
    layers = NUM_LAYERS if part == "target" else 1
    # wq_b, wo_a, wo_b with scales, w13 and w2 with scales, two of the shared experts; vocabularies.
    scales_of_shared = 2 if scenario == PUBLISHED else 0
    assert cut == layers * (6 + 4 + 2 + scales_of_shared) + 2


@pytest.mark.parametrize("scenario", BROKEN)
def test_both_ranks_refuse_with_the_same_words(ranks, scenario):
    part, message = BROKEN[scenario]
    first, second = (outcomes[scenario][part] for outcomes in ranks)
    assert first == second
    assert first["outcome"] == "ValueError"
    assert re.match(rf"load of the (target|MTP head): {message}", first["message"])


def test_with_expert_parallelism_each_rank_asks_for_every_expert(tmp_path):
    broken = "M one MTP expert absent"
    for outcomes in load(tmp_path, [W4A16, broken], "--expert-parallel"):
        assert {result["outcome"] for result in outcomes[W4A16].values()} == {"complete"}
        assert re.match(".*: " + BROKEN[broken][1], outcomes[broken]["draft"]["message"])
