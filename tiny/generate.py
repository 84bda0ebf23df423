"""Greedy decoding, and what the MTP head would have been worth during it.

Acceptance is simulated, not measured: one teacher-forced forward over prompt and greedy
continuation gives the draft of every place; a walk over the places then counts exactly what an
engine's counters count. With greedy sampling the emitted tokens do not depend on the drafts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from tiny.attention import DraftHistory
from tiny.model import DeepseekV4


@dataclass(frozen=True)
class Acceptance:
    """Counters of speculative decoding, summed over all prompts.

    num_drafts: verification steps; num_draft_tokens: tokens drafted (k per step);
    num_accepted_tokens: drafted tokens that equal the target's; per_position: accepted tokens
    by place in the draft.
    """

    num_speculative_tokens: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    per_position: tuple[int, ...]

    @property
    def acceptance_rate(self) -> float:
        """Accepted tokens / drafted tokens."""
        return self.num_accepted_tokens / max(self.num_draft_tokens, 1)

    @property
    def acceptance_length(self) -> float:
        """1 + accepted tokens / drafts: tokens per step of the target, bonus token included."""
        return 1 + self.num_accepted_tokens / max(self.num_drafts, 1)

    def to_dict(self) -> dict[str, object]:
        """Counters and both ratios, for JSON."""
        ratios = {
            "acceptance_rate": round(self.acceptance_rate, 4),
            "acceptance_length": round(self.acceptance_length, 4),
        }
        return {**asdict(self), "per_position": list(self.per_position), **ratios}


@torch.no_grad()
def greedy(
    model: DeepseekV4, prompts: list[list[int]], max_tokens: int, dtype: torch.dtype
) -> list[list[int]]:
    """Greedy continuations, exactly max_tokens each; an end-of-sentence token does not stop.

    The whole sequence is computed again for every token: simple, and fast enough at this size.

    Args:
        prompts: token ids, each at least one long.
        dtype: of the activations.
    """
    if not prompts or min(len(p) for p in prompts) == 0:
        raise ValueError("greedy: every prompt needs at least one token")
    device = model.head.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    tokens = torch.zeros(len(prompts), int(lengths.max()) + max_tokens, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)
    rows = torch.arange(len(prompts), device=device)
    longest = int(lengths.max())
    for i in range(max_tokens):
        streams = model.trunk(tokens[:, : longest + i], dtype)  # what lies behind is not seen
        last = streams[rows, lengths + i - 1][:, None]  # (B, 1, hc, hidden)
        tokens[rows, lengths + i] = model.logits(last)[:, 0].argmax(-1)
    return [tokens[row, len(p) : len(p) + max_tokens].tolist() for row, p in enumerate(prompts)]


@torch.no_grad()
def drafts(
    model: DeepseekV4, tokens: torch.Tensor, num_speculative_tokens: int, dtype: torch.dtype
) -> torch.Tensor:
    """Draft tokens of every place of teacher-forced sequences.

    Args:
        tokens: (B, L) int64; padding at the end is harmless.
    Returns:
        int64 (B, L - 1, k): entry [b, p, s] predicts tokens[b, p + 2 + s]. Step s > 0 takes the
        draft and the streams of step s - 1.
    """
    streams = model.trunk(tokens, dtype)[:, :-1]
    ids, history, steps = tokens[:, 1:], DraftHistory(), []
    for step in range(num_speculative_tokens):
        logits, streams = model.draft(streams, ids, step, history)
        ids = logits.argmax(-1)
        steps.append(ids)
    return torch.stack(steps, dim=-1)


def walk(
    prompt_len: int, tokens: list[int], draft: list[list[int]], max_tokens: int, eos: int
) -> tuple[int, list[int]]:
    """Count drafts and accepted tokens of one request.

    Prefill emits the first token. Then each step verifies the draft made after the last emitted
    token and emits the accepted ones and one more, until max_tokens or `eos` is out.

    Args:
        tokens: prompt and continuation; at least max_tokens + k tokens follow the prompt.
        draft: draft[p][s] predicts tokens[p + 2 + s].
    Returns:
        number of drafts, accepted tokens per draft position.
    Source: vLLM `v1/core/sched/scheduler.py`: the counters take a step's accepted tokens before
        the request is cut at its end.
    """
    accepted = [0] * len(draft[0])
    num_drafts, emitted = 0, 1
    while emitted < max_tokens and eos not in tokens[prompt_len : prompt_len + emitted]:
        place = prompt_len + emitted - 2  # the last position whose successor is known
        num_drafts += 1
        emitted += 1
        for step, token in enumerate(draft[place]):
            if token != tokens[place + 2 + step]:
                break
            accepted[step] += 1
            emitted += 1
    return num_drafts, accepted


def acceptance(
    model: DeepseekV4,
    prompts: list[list[int]],
    num_speculative_tokens: int,
    max_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    continuations: list[list[int]] | None = None,
    batch: int = 64,
) -> Acceptance:
    """Simulated acceptance of the MTP head over greedy continuations of `prompts`.

    Args:
        max_tokens: per prompt; an end-of-sentence token ends a request earlier.
        continuations: as from `greedy`, at least max_tokens + k long; computed when absent.
        batch: prompts per forward.
    """
    k = num_speculative_tokens
    if continuations is None:
        continuations = []
        for i in range(0, len(prompts), batch):
            continuations += greedy(model, prompts[i : i + batch], max_tokens + k, dtype)
    device, eos = model.head.weight.device, model.config.eos_token_id
    num_drafts, per_position = 0, [0] * k
    sequences = [p + c for p, c in zip(prompts, continuations, strict=True)]
    for i in range(0, len(sequences), batch):
        part = sequences[i : i + batch]
        longest = max(len(s) for s in part)
        rows = [F.pad(torch.tensor(s), (0, longest - len(s))) for s in part]
        made = drafts(model, torch.stack(rows).to(device), k, dtype).tolist()
        for offset, sequence in enumerate(part):
            count, accepted = walk(
                len(prompts[i + offset]), sequence, made[offset], max_tokens, eos
            )
            num_drafts += count
            per_position = [a + b for a, b in zip(per_position, accepted, strict=True)]
    return Acceptance(k, num_drafts, k * num_drafts, sum(per_position), tuple(per_position))
