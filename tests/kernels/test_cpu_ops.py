"""The reference ops against the compiled ones where this CPU has them, and against plain maths."""

import math

import pytest
import torch

pytest.importorskip("vllm")

from kernels.cpu import attention, compressor, hyper, indexer, ops, routing

pytestmark = pytest.mark.engine

BLOCKS, BLOCK_SIZE = 6, 64


@pytest.fixture(scope="module")
def compiled():
    """The compiled ops by name; skips where vLLM's library for this CPU has none."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("the compiled DeepSeek-V4 ops need AMX")
    # Captured before any test registers a reference in their place.
    kernels = {name: ops.compiled_kernel(name) for name in ops.SCHEMAS}
    if None in kernels.values():
        pytest.skip("vLLM's library for this CPU lacks the compiled DeepSeek-V4 ops")
    return kernels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def relative(out: torch.Tensor, ref: torch.Tensor) -> float:
    return ((out.double() - ref.double()).norm() / ref.double().norm()).item()


def cos_sin(positions: int = 4096, dim: int = 64) -> torch.Tensor:
    angle = torch.arange(positions)[:, None] / 10000 ** (torch.arange(dim // 2) / (dim // 2))
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


def ds_mla_cache() -> torch.Tensor:
    """An `fp8_ds_mla` cache with padding between blocks, poisoned."""
    width = BLOCK_SIZE * (attention.TOKEN_BYTES + attention.SCALE_BYTES) + 192
    return torch.full((BLOCKS, width), 0xA5, dtype=torch.uint8)


def filled_cache(spread: float = 3.0) -> torch.Tensor:
    cache = ds_mla_cache()
    slots = torch.arange(BLOCKS * BLOCK_SIZE)
    rows = torch.randn(slots.numel(), 512) * torch.logspace(-spread, spread, slots.numel())[:, None]
    attention.write_ds_mla(cache, BLOCK_SIZE, slots, rows.bfloat16())
    return cache


def test_cache_rows_come_back_to_within_fp8_rounding():
    cache = ds_mla_cache()
    slots = torch.tensor([0, 65, 130, 383])
    rows = torch.randn(4, 512).bfloat16()
    attention.write_ds_mla(cache, BLOCK_SIZE, slots, rows)
    back = attention.read_ds_mla(cache, BLOCK_SIZE, slots)
    assert torch.equal(back[:, 448:], rows[:, 448:].float())
    group_max = rows[:, :448].float().unflatten(1, (7, 64)).abs().amax(-1, keepdim=True)
    error = (back[:, :448] - rows[:, :448].float()).unflatten(1, (7, 64)).abs()
    # e4m3 keeps 3 bits; the scale is rounded up to a power of two, which costs at most one bit.
    assert (error <= group_max * 2**-4).all()
    assert (cache[:, BLOCK_SIZE * 584 :] == 0xA5).all()


@pytest.mark.parametrize("padded", [4, 6])
def test_qnorm_rope_insert_equals_the_compiled_op(compiled, padded):
    q, kv = torch.randn(9, 4, 512).bfloat16(), torch.randn(9, 512).bfloat16() * 5
    positions = torch.randint(0, 4096, (9,))
    slots = torch.tensor([3, -1, 64, 129, 200, 201, 202, 383])
    caches = ds_mla_cache(), ds_mla_cache()
    args = (slots, cos_sin(), padded, 1e-6, BLOCK_SIZE)
    expected = compiled["fused_qnorm_rope_kv_insert_cpu"](q, kv, positions, caches[0], *args)
    out = attention.fused_qnorm_rope_kv_insert_cpu(q, kv, positions, caches[1], *args)
    assert out.shape == expected.shape == (9, padded, 512)
    # The compiled op leaves padded heads to the caller; only the live ones are compared.
    assert (out[:, :4].float() - expected[:, :4].float()).abs().max() <= 2**-7 * 4
    kept = slots[slots >= 0]
    rows = [attention.read_ds_mla(cache, BLOCK_SIZE, kept) for cache in caches]
    # The compiled op flushes FP8 subnormals to zero, the reference keeps them.
    assert relative(rows[1], rows[0]) < 2e-3


@pytest.mark.parametrize("compressed", [0, 40])
def test_sparse_attention_is_as_close_to_float64_as_the_compiled_op(compiled, compressed):
    cache, extra = filled_cache(0.5), filled_cache(0.5)
    q = torch.randn(150, 4, 512).bfloat16()
    # Distinct slots in random order, some absent, as the engine makes them.
    order = torch.stack([torch.randperm(BLOCKS * BLOCK_SIZE) for _ in range(150)])
    order[torch.rand(order.shape) < 0.3] = -1
    window, picked = order[:, :128].contiguous(), order[:, 128 : 128 + compressed].contiguous()
    sink = torch.tensor([0.0, 1.0, -1.0, float("-inf")])
    scale = 512**-0.5
    exact = torch.zeros(150, 4, 512, dtype=torch.float64)
    for t in range(150):
        keys = attention.read_ds_mla(cache, BLOCK_SIZE, window[t][window[t] >= 0])
        more = attention.read_ds_mla(extra, BLOCK_SIZE, picked[t][picked[t] >= 0])
        keys = torch.cat((keys, more)).double()
        score = torch.cat((q[t].double() @ keys.T * scale, sink.double()[:, None]), dim=1)
        exact[t] = torch.softmax(score, dim=1)[:, :-1] @ keys
    outs = []
    for op in (compiled["flash_mla_with_kvcache_cpu"], attention.flash_mla_with_kvcache_cpu):
        out = torch.full((150, 4, 512), float("nan"), dtype=torch.bfloat16)
        op(out, q, cache, window, BLOCK_SIZE, extra, picked, BLOCK_SIZE, sink, scale)
        outs.append(relative(out, exact))
    assert outs[1] <= 2**-8
    assert outs[1] <= outs[0] * 1.01


def test_attention_without_any_key_is_zero():
    out = torch.full((1, 2, 512), float("nan"), dtype=torch.bfloat16)
    none = torch.full((1, 4), -1)
    sink = torch.tensor([0.0, float("-inf")])
    q = torch.ones(1, 2, 512).bfloat16()
    cache = ds_mla_cache()
    attention.flash_mla_with_kvcache_cpu(
        out, q, cache, none, BLOCK_SIZE, cache, none[:, :0], 1, sink, 1.0
    )
    assert torch.equal(out, torch.zeros_like(out))


def test_inverse_rotation_equals_the_compiled_op_and_undoes_the_rotation(compiled):
    o, positions, table = torch.randn(5, 4, 512).bfloat16(), torch.arange(5) * 700, cos_sin()
    expected = compiled["inverse_gptj_rope_o_proj_cpu"](o, positions, table, 64)
    out = attention.inverse_gptj_rope_o_proj_cpu(o, positions, table, 64)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    again = attention.rotate(out[..., 448:], table[positions].unsqueeze(1))
    torch.testing.assert_close(again, o[..., 448:].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ratio", "head_dim"), [(4, 512), (128, 512), (4, 128)])
def test_compressor_equals_the_compiled_ops(compiled, ratio, head_dim):
    overlap = ratio == 4
    width = head_dim * (2 if overlap else 1)
    window = ratio * (2 if overlap else 1)
    tokens = 2 * ratio + 3
    state_block, state_blocks = (4 if ratio == 4 else 8), 60
    kv, score = torch.randn(tokens, width), torch.randn(tokens, width) * 2
    ape, positions = torch.randn(ratio, width), torch.arange(tokens)
    slots = torch.randperm(state_blocks * state_block)[:tokens]
    slots[1] = -1
    states = [torch.full((state_blocks, state_block, 2 * width), float("nan")) for _ in range(2)]
    compiled["save_partial_states_cpu"](kv, score, ape, positions, states[0], slots)
    compressor.save_partial_states_cpu(kv, score, ape, positions, states[1], slots)
    assert torch.equal(states[0].nan_to_num(7.0), states[1].nan_to_num(7.0))

    offsets = torch.arange(tokens)[:, None] - window + 1 + torch.arange(window)
    gather = torch.where(offsets >= 0, slots[offsets.clamp(min=0)], -1)
    kv_slots = torch.where((positions + 1) % ratio == 0, positions // ratio + 70, -1)
    weight = torch.rand(head_dim) + 0.5
    name = (
        "compress_norm_rope_store_cpu"
        if head_dim == 512
        else ("compress_norm_rope_store_indexer_cpu")
    )
    caches = ds_mla_cache(), ds_mla_cache()
    args = (positions, kv_slots, weight, 1e-6, cos_sin())
    compiled[name](states[0], gather, *args, caches[0], BLOCK_SIZE, ratio)
    getattr(compressor, name)(states[0], gather, *args, caches[1], BLOCK_SIZE, ratio)
    if head_dim == 512:
        written = kv_slots[kv_slots >= 0]
        assert written.numel() == 2
        rows = [attention.read_ds_mla(cache, BLOCK_SIZE, written) for cache in caches]
        assert relative(rows[1], rows[0]) < 2e-3
    else:
        codes, scales = zip(*(compressor.index_regions(c, BLOCK_SIZE) for c in caches), strict=True)
        assert torch.equal(scales[0], scales[1])
        values = [c.contiguous().view(torch.float8_e4m3fn).float().nan_to_num() for c in codes]
        assert relative(values[1], values[0]) < 2e-3


def test_indexer_query_equals_the_compiled_op(compiled):
    q, weights = torch.randn(7, 4, 128) * 3, torch.randn(7, 4)
    positions, table = torch.arange(7) * 500, cos_sin()
    outs = []
    for op in (
        compiled["fused_indexer_q_rope_quant_cpu"],
        indexer.fused_indexer_q_rope_quant_cpu,
    ):
        codes = torch.empty(7, 4, 128, dtype=torch.float8_e4m3fn)
        scaled = torch.full((7, 4), float("nan"))
        op(positions, q, table, codes, weights, 128**-0.5, 0.5, scaled)
        outs.append((codes.float(), scaled))
    torch.testing.assert_close(outs[1][1], outs[0][1])
    assert relative(outs[1][0], outs[0][0]) < 2e-3


def test_index_scores_and_selection_equal_the_compiled_ops(compiled):
    pages, block, heads, queries = 24, 64, 4, 5
    cache = torch.zeros(pages, block * 132 + 60, dtype=torch.uint8)
    codes, scales = compressor.index_regions(cache, block)
    codes.copy_(torch.randn(pages, block, 128).to(torch.float8_e4m3fn).view(torch.uint8))
    powers = 2.0 ** torch.randint(-3, 3, (pages, block, 1))
    scales.copy_(powers.view(torch.uint8))
    q = torch.randn(queries, heads, 128).to(torch.float8_e4m3fn)
    weight = torch.randn(queries, heads)
    seq_lens = torch.tensor([0, 3, 512, 700, 1000], dtype=torch.int32)
    table = torch.stack([torch.randperm(pages)[:16] for _ in range(queries)]).int()
    args = (q, cache, weight, seq_lens, table, block, 1024)
    expected = compiled["fp8_paged_mqa_logits_cpu"](*args)
    out = indexer.fp8_paged_mqa_logits_cpu(*args)
    read = torch.arange(1024) < seq_lens[:, None]
    torch.testing.assert_close(out[read], expected[read], rtol=1e-4, atol=1e-4)
    assert torch.isinf(out[~read]).all()
    picks = []
    for op in (compiled["topk_transform_512_cpu"], indexer.topk_transform_512_cpu):
        paged, raw = (torch.full((queries, 512), -7, dtype=torch.int32) for _ in range(2))
        op(out, seq_lens, table, paged, block, raw)
        picks.append((paged.sort(1).values, raw.sort(1).values))
    assert torch.equal(picks[0][0], picks[1][0])
    assert torch.equal(picks[0][1], picks[1][1])


def test_hyper_connections_equal_the_compiled_ops(compiled):
    x = torch.randn(6, 4, 256).bfloat16()
    fn, scale, base = torch.randn(24, 1024) * 0.02, torch.rand(3), torch.randn(24)
    args = (x, fn, scale, base, 4, 20, 1e-6, 1e-6)
    expected, out = compiled["hc_pre_fused_cpu"](*args), hyper.hc_pre_fused_cpu(*args)
    for mine, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-2, atol=1e-4)
    layer, post, comb = out
    assert relative(comb.sum(1), torch.ones(6, 4)) < 1e-4
    layer_out = torch.randn(6, 256).bfloat16()
    mixed = hyper.hc_post_fused_cpu(layer_out, x, post, comb)
    theirs = compiled["hc_post_fused_cpu"](layer_out, x, post, comb)
    torch.testing.assert_close(mixed, theirs, rtol=1e-2, atol=1e-2)
    head = (x, torch.randn(4, 1024) * 0.02, torch.rand(1), torch.randn(4), 1e-6, 1e-6)
    torch.testing.assert_close(
        hyper.hc_head_fused_cpu(*head), compiled["hc_head_fused_cpu"](*head), rtol=1e-2, atol=1e-2
    )


def test_routing_equals_the_compiled_ops_at_the_full_size(compiled):
    scores, bias = torch.randn(11, 256) * 4, torch.randn(256)
    args = (scores, scores, bias, 6, True, "sqrtsoftplus", 0, 1.5, True)
    expected, out = compiled["biased_topk_cpu"](*args), routing.biased_topk_cpu(*args)
    assert torch.equal(out[1], expected[1])
    torch.testing.assert_close(out[0], expected[0], rtol=1e-4, atol=1e-6)
    table = torch.randint(0, 256, (11, 6), dtype=torch.int32)
    args = (scores, table, 6, "sqrtsoftplus", 0, 256, 1.5)
    expected, out = compiled["hash_topk_cpu"](*args), routing.hash_topk_cpu(*args)
    assert torch.equal(out[1], expected[1])
    torch.testing.assert_close(out[0], expected[0], rtol=1e-4, atol=1e-6)


def test_routing_weights_sum_to_the_scaling_factor_and_ignore_the_bias():
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    bias = torch.tensor([100.0, 0.0, 0.0, 0.0])
    weights, ids = routing.biased_topk_cpu(
        scores, scores, bias, 2, True, "sqrtsoftplus", 0, 1.5, True
    )
    assert ids.tolist() == [[0, 3]]
    expected = [math.sqrt(math.log1p(math.exp(x))) for x in (0.0, 3.0)]
    expected = [1.5 * x / sum(expected) for x in expected]
    torch.testing.assert_close(weights[0], torch.tensor(expected))


def test_batched_product_equals_pytorch():
    a, b = torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 32, 64).bfloat16()
    out = torch.empty(2, 3, 32, dtype=torch.bfloat16)
    attention.bmm_cpu(out, a, attention.convert_weight_packed(b), True, None)
    assert relative(out, a.double() @ b.double().transpose(1, 2)) < 2**-8


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: attention.bmm_cpu(x, x, x, True, x), "scale is given"),
        (lambda x: routing.hash_topk_cpu(x, x, 1, "softmax", 0, 4, 1.0), "scoring_func"),
        (lambda x: routing.hash_topk_cpu(x, x, 1, "sqrtsoftplus", 1, 4, 1.0), "num_fused_shared"),
    ],
)
def test_what_the_reference_lacks_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.zeros(1, 1))


def test_an_unknown_choice_of_ops_is_refused(monkeypatch):
    monkeypatch.setenv(ops.ENV, "fast")
    with pytest.raises(ValueError, match="DSV4_CPU_OPS = 'fast'; one of auto, reference, compiled"):
        ops.OpsChoice.from_env()
