"""Which experts the tokens of a batch choose, and how many differ."""

from __future__ import annotations

from enum import StrEnum

import torch

MTP_SHARED = 0.25  # of a drafted token's slots that repeat an expert of the token before it


class Routing(StrEnum):
    """How experts are drawn."""

    UNIFORM = "uniform"
    MTP = "mtp"


def draw(
    routing: Routing, num_tokens: int, num_experts: int, top_k: int, generator: torch.Generator
) -> torch.Tensor:
    """Experts of a batch, all different within a token.

    MTP: a verification step sends a stream's next token and its drafts; each slot of a draft
    repeats an expert of the token before with probability MTP_SHARED. Batches of up to four are
    one stream; larger ones are streams of two tokens.

    Returns:
        int32 (tokens, top_k), on the CPU.
    """
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    ids = scores.topk(top_k, dim=1).indices
    if routing is Routing.MTP:
        length = num_tokens if num_tokens <= 4 else 2
        for token in range(num_tokens):
            if token % length:
                ids[token] = _follow(ids[token - 1], scores[token], generator)
    return ids.to(torch.int32)


def _follow(before: torch.Tensor, scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token's experts: some of the one before, the rest the best-scored of all others."""
    top_k = len(before)
    repeated = before[torch.rand(top_k, generator=generator) < MTP_SHARED]
    others = scores.clone()
    others[before] = -1
    fresh = others.topk(min(top_k - len(repeated), len(scores) - top_k)).indices
    # With hardly more experts than slots the others run out: repeat more.
    missing = top_k - len(repeated) - len(fresh)
    left = before[~torch.isin(before, repeated)][:missing]
    return torch.cat([repeated, fresh, left])


def distinct(ids: torch.Tensor) -> list[int]:
    """Distinct experts of each step, ids int32 (steps, tokens, top_k)."""
    return [int(step.unique().numel()) for step in ids]
