"""DeepSeek-V4's lightning indexer on a CPU, in plain PyTorch: see `attention.py`."""

from __future__ import annotations

import torch

from kernels.cpu.attention import MIN_SCALE, rotate
from kernels.cpu.compressor import index_regions
from kernels.formats import FP8_MAX, ue8m0_scale

INDEX_TOPK = 512


def fused_indexer_q_rope_quant_cpu(
    positions: torch.Tensor,
    index_q: torch.Tensor,
    index_q_cos_sin_cache: torch.Tensor,
    index_q_fp8: torch.Tensor,
    index_weights: torch.Tensor,
    index_weights_softmax_scale: float,
    index_weights_head_scale: float,
    index_weights_out: torch.Tensor,
) -> None:
    """Rotate and quantize the indexer's queries; fold their scales into the head weights.

    Args:
        positions: int64 (tokens,).
        index_q: float32 (tokens, heads, 128); the last 64 are rotated.
        index_q_cos_sin_cache: float32 (positions, 64).
        index_q_fp8: float8_e4m3fn (tokens, heads, 128), written.
        index_weights: float32 (tokens, heads).
        index_weights_out: float32 (tokens, heads), written: weight * scale of q * both scales.
    """
    rope_dim = index_q_cos_sin_cache.shape[-1]
    cos_sin = index_q_cos_sin_cache[positions].unsqueeze(1)
    rope = rotate(index_q[..., -rope_dim:], cos_sin).bfloat16().float()
    q = torch.cat((index_q[..., :-rope_dim], rope), dim=-1)
    scale = ue8m0_scale(q.abs().amax(-1, keepdim=True).clamp(min=MIN_SCALE), FP8_MAX)
    index_q_fp8.copy_((q / scale).clamp(-FP8_MAX, FP8_MAX))
    factor = index_weights_softmax_scale * index_weights_head_scale
    index_weights_out.copy_(index_weights * scale.squeeze(-1) * factor)


def fp8_paged_mqa_logits_cpu(
    q_fp8: torch.Tensor,
    kvcache_fp8: torch.Tensor,
    weight: torch.Tensor,
    seq_lens: torch.Tensor,
    page_table: torch.Tensor,
    block_size: int,
    max_seq_len: int,
) -> torch.Tensor:
    """Index score of each compressed key for each query: sum over heads of weight * relu(q k).

    Args:
        q_fp8: float8_e4m3fn (queries, heads, 128).
        kvcache_fp8: uint8 (pages, bytes): codes, then float32 scales; see `compressor.py`.
        weight: float32 (queries, heads).
        seq_lens: int (queries,), compressed keys that the query may read.
        page_table: int (queries, pages per query).
    Returns:
        float32 (queries, max_seq_len); entries at and past seq_lens are -inf.
    """
    logits = torch.full((q_fp8.shape[0], max_seq_len), float("-inf"))
    data, scales = index_regions(kvcache_fp8, block_size)
    q = q_fp8.float()
    # Queries of one request share a page table; gather its keys once.
    tables, owner = torch.unique(page_table, dim=0, return_inverse=True)
    for request in range(tables.shape[0]):
        rows = (owner == request).nonzero().squeeze(1)
        length = min(int(seq_lens[rows].max()), max_seq_len)
        if length <= 0:
            continue
        pages = tables[request, : -(-length // block_size)].long()
        codes = data[pages].reshape(-1, data.shape[-1])[:length]
        keys = codes.contiguous().view(torch.float8_e4m3fn).float()  # (length, 128)
        key_scale = scales[pages].reshape(-1, 4)[:length].contiguous().view(torch.float32)
        dots = torch.relu(q[rows] @ keys.T)  # (rows, heads, length)
        score = torch.einsum("rh,rhl->rl", weight[rows], dots) * key_scale.view(1, -1)
        beyond = torch.arange(length) >= seq_lens[rows].unsqueeze(1)
        logits[rows, :length] = score.masked_fill(beyond, float("-inf"))
    return logits


def topk_transform_512_cpu(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    page_tables: torch.Tensor,
    out_page_indices: torch.Tensor,
    page_size: int,
    out_raw_indices: torch.Tensor | None,
) -> None:
    """The 512 best keys of each row, as positions and as slots; ties go to the lower position.

    Rows with at most 512 keys select all of them, in order; unused entries are -1.

    Args:
        scores: float32 (rows, max_seq_len); entries at and past seq_lens are not read.
        seq_lens: int (rows,).
        page_tables: int (rows, pages).
        out_page_indices: int32 (rows, >= 512), written: page * page_size + offset.
        out_raw_indices: int32, same shape, written: positions.
    """
    rows, width = scores.shape
    lens = seq_lens.clamp(0, width).view(-1, 1).long()
    position = torch.arange(width).view(1, -1)
    masked = scores.masked_fill(position >= lens, float("-inf"))
    # A stable sort keeps the lower position first among equal scores.
    order = torch.sort(masked, dim=1, descending=True, stable=True).indices[:, :INDEX_TOPK]
    picked = torch.full((rows, INDEX_TOPK), -1, dtype=torch.long)
    picked[:, : order.shape[1]] = order
    slot = torch.arange(INDEX_TOPK).view(1, -1)
    picked = torch.where(lens <= INDEX_TOPK, slot, picked)
    picked = picked.masked_fill(slot >= lens, -1)
    page = page_tables.long().gather(1, picked.clamp(min=0) // page_size)
    physical = torch.where(picked >= 0, page * page_size + picked.clamp(min=0) % page_size, -1)
    out_page_indices[:, :INDEX_TOPK] = physical.int()
    if out_raw_indices is not None:
        out_raw_indices[:, :INDEX_TOPK] = picked.int()
