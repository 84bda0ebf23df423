"""Attention-metadata kernels of DeepSeek-V4, in PyTorch, for CPUs without a Triton backend.

vLLM builds the metadata of sparse attention with Triton kernels and gives CPU replacements only
for the block table and the speculative-decoding helpers. `KERNELS` names each further kernel that
a DeepSeek-V4 step launches on a CPU and its replacement. The parameters of a replacement are
those of the kernel it replaces, in the same order; Triton's launch options are swallowed.

Source: the kernels of the same names in vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

PAD_SLOT = -1


def token_request_mapping(
    query_start_loc: torch.Tensor,
    output: torch.Tensor,
    num_reqs: int,
    num_mapped: int,
    num_tokens: int,
    **_: Any,
) -> None:
    """Write the request index of each token; tokens past `num_mapped` get 0.

    Args:
        query_start_loc: int32 (num_reqs + 1,), ascending; first token of each request.
        output: int32 (>= num_tokens,).
    """
    tokens = torch.arange(num_tokens, dtype=query_start_loc.dtype)
    request = torch.searchsorted(query_start_loc[1 : num_reqs + 1], tokens, right=True)
    request = request.clamp_(max=num_reqs - 1)
    request[num_mapped:] = 0
    output[:num_tokens] = request.to(output.dtype)


def prefill_gather_lens(
    prefill_gather_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    replay_start: torch.Tensor,
    num_prefills: int,
    num_decodes: int,
    window_size: int,
    BLOCK_SIZE: int,
    **_: Any,
) -> None:
    """Write how many KV rows each prefill reads: its own tokens and the window before them."""
    rows = slice(num_decodes, num_decodes + num_prefills)
    starts = query_start_loc[num_decodes : num_decodes + num_prefills + 1]
    query_lens = starts[1:] - starts[:-1]
    prefix = (seq_lens[rows] - query_lens - replay_start[rows]).clamp(min=0)
    prefill_gather_lens[:num_prefills] = query_lens + prefix.clamp(max=window_size - 1)


def swa_indices_and_lens(
    swa_indices: torch.Tensor,
    swa_indices_stride: int,
    swa_lens: torch.Tensor,
    window_size: int,
    index_width: int,
    left_visible: torch.Tensor,
    right_visible: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    token_to_req_indices: torch.Tensor,
    is_valid_token: torch.Tensor,
    block_table: torch.Tensor,
    block_table_stride: int,
    block_size: int,
    replay_start: torch.Tensor,
    token_offset: int,
    HAS_IMAGE: bool,
    TRITON_BLOCK_SIZE: int,
    **_: Any,
) -> None:
    """Write the KV-cache slots of each token's sliding window, -1 past its length.

    `DeepseekV4CPUAttention` derives its window from the positions and never reads these
    buffers, so this launch has no reader on a CPU and writes nothing.
    """


def prepare_uniform_decode(
    seq_lens: torch.Tensor,
    decode_seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    block_table_stride: int,
    expanded_block_table: torch.Tensor,
    expanded_bt_stride: int,
    decode_lens: torch.Tensor,
    max_decode_len: int,
    BLOCK_SIZE: int,
    **_: Any,
) -> None:
    """Give each of a request's `max_decode_len` tokens a row of its own: length and blocks."""
    num_reqs = seq_lens.shape[0]
    rows = num_reqs * max_decode_len
    offsets = torch.arange(max_decode_len, dtype=seq_lens.dtype) - (max_decode_len - 1)
    per_token = (seq_lens.unsqueeze(1) + offsets).clamp(min=0)  # (num_reqs, max_decode_len)
    decode_seq_lens[:rows] = per_token.flatten()
    # The two tables may differ in width; the kernel copies the narrower one's columns.
    width = min(block_table.shape[1], expanded_block_table.shape[1])
    expanded_block_table[:rows, :width] = block_table[:num_reqs, :width].repeat_interleave(
        max_decode_len, dim=0
    )
    decode_lens[:rows] = 1


def build_prefill_chunk_metadata(
    query_start_loc: torch.Tensor,
    uncompressed_seq_lens: torch.Tensor,
    cu_compressed_seq_lens: torch.Tensor,
    row_start_cu_compressed_seq_lens: torch.Tensor,
    token_to_seq: torch.Tensor,
    cu_compressed_seq_len_ks: torch.Tensor,
    cu_compressed_seq_len_ke: torch.Tensor,
    query_slice_start: int,
    query_slice_stop: int,
    DCP_RANK: int,
    DCP_WORLD: int,
    DCP_INTERLEAVE: int,
    BLOCK_SIZE: int,
    COMPRESS_RATIO: int,
    **_: Any,
) -> None:
    """Write, for each query token, the first and last compressed key that it may read.

    Args:
        query_start_loc: int32 (num_reqs + 1,), starting at 0.
        cu_compressed_seq_lens: int32 (num_reqs + 1,), cumulative compressed lengths.
        token_to_seq: int32 (total compressed keys,), out: request of each compressed key.
        cu_compressed_seq_len_ks, cu_compressed_seq_len_ke: int32 (query tokens,), out.
    Raises:
        ValueError: decode context parallelism, which the CPU does not have.
    """
    if DCP_WORLD > 1:
        raise ValueError(f"build_prefill_chunk_metadata: DCP_WORLD = {DCP_WORLD}; the CPU has 1")
    num_reqs = query_start_loc.shape[0] - 1
    requests = torch.arange(num_reqs)
    query_lens = query_start_loc[1:] - query_start_loc[:-1]
    owner = torch.repeat_interleave(requests, query_lens)  # (query tokens,)
    offset = torch.arange(owner.shape[0]) - query_start_loc[owner]
    context = (uncompressed_seq_lens[:num_reqs] - query_lens)[owner] + 1 + offset
    row_start = row_start_cu_compressed_seq_lens[owner]
    chunk = slice(query_slice_start, query_slice_stop)
    size = query_slice_stop - query_slice_start
    cu_compressed_seq_len_ks[:size] = row_start[chunk].int()
    cu_compressed_seq_len_ke[:size] = (row_start + context // COMPRESS_RATIO)[chunk].int()
    compressed_lens = cu_compressed_seq_lens[1:] - cu_compressed_seq_lens[:-1]
    token_to_seq[:] = torch.repeat_interleave(requests, compressed_lens).int()


def compressed_slot_mapping(
    compressed_slot_mapping: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    block_table_stride: int,
    block_size: int,
    dcp_world_size: int,
    cp_interleave: int,
    COMPRESS_RATIO: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
    **_: Any,
) -> None:
    """Write the slot of each compressed key at the token that completes its group, else PAD_ID.

    Args:
        slot_mapping: int64 (num_tokens,), the tokens' own slots; PAD_ID is kept.
        seq_lens: int32 (num_reqs,), context and query tokens.
        block_table: int32 (num_reqs, blocks), blocks of `block_size` compressed keys.
    """
    num_reqs = min(block_table.shape[0], query_start_loc.shape[0] - 1)
    query_lens = query_start_loc[1 : num_reqs + 1] - query_start_loc[:num_reqs]
    owner = torch.repeat_interleave(torch.arange(num_reqs), query_lens)
    token = torch.arange(owner.shape[0]) + query_start_loc[0]
    position = (seq_lens[:num_reqs] - query_lens)[owner] + token - query_start_loc[owner]
    own_slot = slot_mapping[token]
    valid = ((position + 1) % COMPRESS_RATIO == 0) & (own_slot != PAD_ID)
    group = torch.where(valid, position // COMPRESS_RATIO, 0).long()
    slot = block_table[owner, group // block_size].long() * block_size + group % block_size
    compressed_slot_mapping[token] = torch.where(valid, slot, PAD_ID)


_MLA = "vllm.v1.attention.backends.mla"
KERNELS: dict[str, Callable[..., None]] = {
    "vllm.v1.attention.ops.metadata._token_request_mapping_kernel": token_request_mapping,
    f"{_MLA}.sparse_swa.ComputePrefillMetadataKernel.kernel": prefill_gather_lens,
    f"{_MLA}.sparse_swa.ComputeSWAIndicesAndLensKernel.kernel": swa_indices_and_lens,
    f"{_MLA}.indexer.PrepareUniformDecodeKernel.kernel": prepare_uniform_decode,
    f"{_MLA}.indexer.BuildPrefillChunkMetadataKernel.kernel": build_prefill_chunk_metadata,
    f"{_MLA}.compressor_utils.CompressedSlotMappingKernel.kernel": compressed_slot_mapping,
}


def register_metadata_kernels() -> None:
    """Put `KERNELS` in place of vLLM's Triton kernels, unless Triton runs here. Idempotent."""
    from vllm.triton_utils import HAS_TRITON, dispatcher

    if HAS_TRITON:
        return
    missing = {name: fn for name, fn in KERNELS.items() if name not in dispatcher._registry}
    if missing:
        dispatcher.register_kernels(missing)
