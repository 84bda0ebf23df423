"""How vLLM 0.32.0 cuts DeepSeek-V4's KV cache into blocks, in arithmetic.

Five kinds of layer cache share one pool of blocks of equal size: a block holds the pages of one
group of layers, so the widest group sets its size. A request takes blocks from every group:

    compressed (all layers)   one block for 256 tokens: the part that grows with the context
    sliding windows, states   window + tokens in flight, over a block of 64, 8 or 4 tokens

The second line grows with max_num_batched_tokens, not with the context. Checked against vLLM's own
`get_kv_cache_groups` in tests/loader. Source: models/deepseek_v4/{attention,compressor}.py,
v1/attention/backends/mla/sparse_swa.py, v1/core/kv_cache_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BLOCK_TOKENS = 256
PAGE_ALIGNMENT = 576
ROW_BYTES = 584  # fp8_ds_mla: 448 B of FP8, 64 BF16 of rope, 8 B of scales
INDEX_ROW_BYTES = 132  # 128 B of FP8 and one FP32 scale
WINDOW_BLOCK_TOKENS = 64
STATE_BLOCK_TOKENS = {4: 4, 128: 8}
BATCHES_IN_FLIGHT = 2  # asynchronous scheduling


@dataclass(frozen=True)
class Bucket:
    """Layer caches that are addressed alike.

    pages: page bytes -> number of layers.
    window: tokens that a sliding cache looks back, or None if it keeps all.
    """

    block_tokens: int
    window: int | None
    pages: Mapping[int, int]

    @property
    def layers(self) -> int:
        """Repeats of the layer pattern: layers of the most frequent page size."""
        return max(self.pages.values())

    @property
    def is_balanced(self) -> bool:
        return len(set(self.pages.values())) == 1

    def group_bytes(self, num_groups: int) -> int:
        """Pages of the largest of the groups that the bucket is split into."""
        return sum(math.ceil(count / num_groups) * page for page, count in self.pages.items())

    def request_blocks(self, max_model_len: int, in_flight_tokens: int) -> int:
        """Blocks of one group that a request can hold at most."""
        if self.window is None:
            return math.ceil(max_model_len / self.block_tokens)
        tokens = min(self.window - 1 + in_flight_tokens, max_model_len)
        return math.ceil(tokens / self.block_tokens) + 1


@dataclass(frozen=True)
class KvLayout:
    """Buckets with the number of groups of each, and the size of the shared block."""

    groups: tuple[tuple[Bucket, int], ...]
    block_bytes: int

    def request_blocks(self, max_model_len: int, in_flight_tokens: int) -> int:
        """Blocks that one request can hold at most, over all groups."""
        return sum(
            count * bucket.request_blocks(max_model_len, in_flight_tokens)
            for bucket, count in self.groups
        )

    @property
    def token_bytes(self) -> float:
        """Bytes that one more token of context costs."""
        return self.block_bytes / BLOCK_TOKENS


def page(num_bytes: int) -> int:
    """A page rounded up to its alignment."""
    return math.ceil(num_bytes / PAGE_ALIGNMENT) * PAGE_ALIGNMENT


def buckets(config: Mapping[str, Any], mtp: bool) -> list[Bucket]:
    """The layer caches of the target, and of the MTP layers if they draft."""
    ratios = config["compress_ratios"][: config["num_hidden_layers"]]
    num_windows = len(ratios) + (config["num_nextn_predict_layers"] if mtp else 0)
    csa, hca = ratios.count(4), ratios.count(128)
    head_dim, index_dim = config["head_dim"], config["index_head_dim"]

    def state(width: int, ratio: int) -> int:
        """A block of FP32 pairs (KV, score) of a compressor."""
        return page(STATE_BLOCK_TOKENS[ratio] * 2 * width * 4)

    found = [
        Bucket(
            WINDOW_BLOCK_TOKENS,
            config["sliding_window"],
            {page(WINDOW_BLOCK_TOKENS * ROW_BYTES): num_windows},
        ),
        Bucket(
            BLOCK_TOKENS,
            None,
            {
                page(BLOCK_TOKENS // 4 * INDEX_ROW_BYTES): csa,
                page(BLOCK_TOKENS // 4 * ROW_BYTES): csa,
                page(BLOCK_TOKENS // 128 * ROW_BYTES): hca,
            },
        ),
        # Ratio 4 overlaps its windows: twice the width, twice the look-back.
        Bucket(4, 8, {state(2 * index_dim, 4): csa, state(2 * head_dim, 4): csa}),
        Bucket(8, 128, {state(head_dim, 128): hca}),
    ]
    kept = [{size: count for size, count in b.pages.items() if count} for b in found]
    return [
        Bucket(b.block_tokens, b.window, pages)
        for b, pages in zip(found, kept, strict=True)
        if pages
    ]


def least_padding(counts: list[int], at_least: int) -> int:
    """Chunk size that pads `counts` the least when each is rounded up to it; the largest such."""
    candidates = range(at_least, max(at_least, *counts) + 1)
    return min(candidates, key=lambda size: (sum(-count % size for count in counts), -size))


def kv_layout(config: Mapping[str, Any], mtp: bool) -> KvLayout:
    """Groups and block size as vLLM's packed layout chooses them."""
    found = buckets(config, mtp)
    mixed = [bucket.layers for bucket in found if bucket.is_balanced and len(bucket.pages) > 1]
    groups = []
    for bucket in found:
        num_groups = 1
        if mixed and bucket.is_balanced:
            counts = [other.layers for other in found if other.is_balanced]
            num_groups = math.ceil(bucket.layers / least_padding(counts, max(mixed)))
        groups.append((bucket, num_groups))
    return KvLayout(
        tuple(groups), max(bucket.group_bytes(num_groups) for bucket, num_groups in groups)
    )
