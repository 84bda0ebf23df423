import pytest
import torch

from tiny.attention import (
    Compressor,
    DraftHistory,
    attend,
    index_loss,
    num_visible_groups,
    window_mask,
)
from tiny.config import TinyConfig
from tiny.hyper import hc_post, hc_pre, sinkhorn
from tiny.layers import Rope, rope_inverse_frequencies
from tiny.model import DeepseekV4
from tiny.moe import RoutedExperts, make_hash_table

CONFIG = TinyConfig()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DeepseekV4(CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, CONFIG.vocab_size, (1, 160), generator=torch.Generator().manual_seed(1))


def test_logits_and_drafts_have_one_row_per_place(model, tokens):
    streams = model.trunk(tokens, torch.float32)
    assert streams.shape == (1, 160, CONFIG.hc_mult, CONFIG.hidden_size)
    assert model.logits(streams).shape == (1, 160, CONFIG.vocab_size)
    logits, next_streams = model.draft(streams[:, :-1], tokens[:, 1:])
    assert logits.shape == (1, 159, CONFIG.vocab_size)
    assert next_streams.shape == (1, 159, CONFIG.hc_mult, CONFIG.hidden_size)


def test_future_tokens_change_nothing(model, tokens):
    changed = tokens.clone()
    changed[:, 130:] = (changed[:, 130:] + 7) % CONFIG.vocab_size
    before, after = (model.trunk(t, torch.float64) for t in (tokens, changed))
    assert (before - after)[:, :130].abs().max() < 1e-9
    assert (before - after)[:, 130:].abs().max() > 1e-2
    drafts = [
        model.draft(streams[:, :-1], t[:, 1:])[0]
        for streams, t in ((before, tokens), (after, changed))
    ]
    assert (drafts[0] - drafts[1])[:, :129].abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_and_float64_agree(model, tokens, dtype):
    exact = model.trunk(tokens[:, :40], torch.float64)
    assert (model.trunk(tokens[:, :40], dtype).double() - exact).abs().max() < 1e-3


def test_a_group_is_visible_from_its_last_token_on():
    positions = torch.tensor([0, 2, 3, 6, 7, 126, 127, 128])
    assert num_visible_groups(positions, 4).tolist() == [0, 0, 1, 1, 2, 31, 32, 32]
    assert num_visible_groups(positions, 128).tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(("ratio", "first", "last"), [(4, 4, 11), (128, 128, 255)])
def test_a_compressed_key_covers_its_group_and_for_ratio_4_the_one_before(ratio, first, last):
    torch.manual_seed(0)
    compressor = Compressor(CONFIG, ratio, 512).double()
    rope = Rope(CONFIG, ratio)
    group = (last + 1) // ratio - 1
    x = torch.randn(1, 2 * max(ratio, 8), CONFIG.hidden_size, dtype=torch.float64)
    x.requires_grad_(True)
    compressor(x, rope)[0, group].sum().backward()
    touched = x.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert touched == list(range(first, last + 1))


def test_an_incomplete_group_has_no_key():
    compressor, rope = Compressor(CONFIG, 4, 128), Rope(CONFIG, 4)
    assert compressor(torch.randn(1, 11, CONFIG.hidden_size), rope).shape == (1, 2, 128)
    assert compressor(torch.randn(1, 3, CONFIG.hidden_size), rope).shape == (1, 0, 128)


def test_the_window_holds_the_last_128_tokens():
    mask = window_mask(torch.arange(300), torch.arange(300), 128)
    assert mask[200].nonzero().flatten().tolist() == list(range(73, 201))
    assert mask[5].nonzero().flatten().tolist() == list(range(6))


def test_the_indexer_limits_a_query_to_topk_reachable_groups(model):
    attention = model.layers[1].attn
    scores = torch.randn(1, 2400, 600)
    reachable = torch.arange(600) < num_visible_groups(torch.arange(2400), 4)[:, None]
    chosen = attention._choose(scores, reachable)
    counts = chosen.sum(-1)[0]
    assert torch.equal(counts, reachable.sum(-1).clamp(max=CONFIG.index_topk))
    assert not (chosen & ~reachable).any()
    worst_kept = scores[0, -1][chosen[0, -1]].min()
    assert worst_kept >= scores[0, -1][~chosen[0, -1] & reachable[-1]].max()


def test_the_sink_takes_weight_from_the_keys():
    query, kv = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 8)
    visible = torch.ones(1, 3, 3, dtype=torch.bool)
    _, without = attend(query, kv, visible, torch.full((2,), float("-inf")))
    _, with_sink = attend(query, kv, visible, torch.zeros(2))
    assert torch.allclose(without.sum(-1), torch.ones(1, 3, 2))
    assert (with_sink.sum(-1) < 1).all()


def test_first_draft_step_is_the_plain_block(model, tokens):
    streams = model.trunk(tokens, torch.float32)[:, :-1]
    head = model.mtp[0]
    positions = torch.arange(159)
    embedded = model.embed_tokens(tokens[:, 1:], torch.float32)
    plain = head.block(head.combine(embedded, streams, positions), tokens[:, 1:], positions)
    _, drafted = model.draft(streams, tokens[:, 1:], 0, DraftHistory())
    assert (plain - drafted).abs().max() < 1e-5


def test_second_draft_step_equals_a_block_over_the_same_history(model, tokens):
    place, k = 150, 2
    streams = model.trunk(tokens, torch.float64)[:, :-1]
    history = DraftHistory()
    _, first = model.draft(streams, tokens[:, 1:], 0, history)
    guess = (tokens[:, 1:] + 3) % CONFIG.vocab_size
    _, second = model.draft(first, guess, 1, history)
    head = model.mtp[0]
    inputs = torch.cat((streams[:, : place + 1], first[:, place : place + 1]), dim=1)
    ids = torch.cat((tokens[:, 1 : place + 2], guess[:, place : place + 1]), dim=1)
    positions = torch.arange(place + k)
    embedded = model.embed_tokens(ids, torch.float64)
    plain = head.block(head.combine(embedded, inputs, positions), ids, positions)
    assert (plain[:, -1] - second[:, place]).abs().max() < 1e-9


def test_the_embedding_is_masked_at_position_0_only(model, tokens):
    streams = model.trunk(tokens[:, :8], torch.float32)
    other = tokens[:, 1:9].clone()
    other[:, 0] += 1
    head, positions = model.mtp[0], torch.arange(8)
    a, b = (
        head.combine(model.embed_tokens(t, torch.float32), streams, positions)
        for t in (tokens[:, 1:9], other)
    )
    assert torch.equal(a, b)
    other[:, 3] += 1
    c = head.combine(model.embed_tokens(other, torch.float32), streams, positions)
    assert not torch.equal(a, c)


def test_hash_layers_route_by_token_and_spread_evenly(model):
    table = make_hash_table(CONFIG)
    assert table.dtype == torch.int64
    assert tuple(table.shape) == (CONFIG.vocab_size, CONFIG.num_experts_per_tok)
    assert (table[:, 0] != table[:, 1]).all()
    counts = torch.bincount(table.flatten(), minlength=CONFIG.n_routed_experts)
    assert counts.max() - counts.min() <= 0.1 * counts.float().mean()
    router = model.layers[0].ffn.gate
    ids = torch.tensor([5, 9, 5])
    weights, chosen = router(torch.randn(3, CONFIG.hidden_size), ids)
    assert torch.equal(chosen, table[ids])
    assert torch.allclose(weights.sum(-1), torch.full((3,), CONFIG.routed_scaling_factor))


def test_the_router_bias_steers_the_choice_but_not_the_weights(model):
    router = model.layers[1].ffn.gate
    # So many that none is sure to be given to expert 3 each time, without the bias, by chance.
    x = torch.randn(64, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(64, dtype=torch.long)
    _, before = router(x, ids)
    router.bias[3] = 100.0
    weights, after = router(x, ids)
    router.bias[3] = 0.0
    assert (after == 3).any(-1).all()
    assert not (before == 3).any(-1).all()
    assert torch.allclose(weights.sum(-1), torch.full((64,), CONFIG.routed_scaling_factor))
    assert weights.max() < CONFIG.routed_scaling_factor


def test_both_ways_to_run_the_experts_agree():
    torch.manual_seed(0)
    experts = RoutedExperts(CONFIG).double()
    x = torch.randn(20, CONFIG.hidden_size, dtype=torch.float64)
    ids = torch.stack([torch.randperm(16)[:2] for _ in range(20)])
    weights = torch.rand(20, 2, dtype=torch.float64)
    dense, chosen = experts._all_experts(x, weights, ids), experts._chosen_experts(x, weights, ids)
    assert (dense - chosen).abs().max() < 1e-12


def test_sinkhorn_is_nearly_doubly_stochastic():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, 4, dtype=torch.float64, generator=generator)
    mix = sinkhorn(logits, 20, 1e-6)
    assert (mix.sum(-2) - 1).abs().max() < 1e-5
    assert (mix.sum(-1) - 1).abs().max() < 1e-3
    assert (mix > 0).all()


def test_hyper_connections_equal_the_engines_reference():
    reference = pytest.importorskip("vllm.model_executor.kernels.mhc.torch")
    torch.manual_seed(0)
    streams = torch.randn(1, 6, 4, 256).bfloat16()
    fn, base, scale = torch.randn(24, 1024) * 0.05, torch.randn(24), torch.rand(3)
    x, post, comb = hc_pre(streams, fn, base, scale, CONFIG)
    their_post, their_comb, their_x = reference.mhc_pre_torch(
        streams[0], fn, scale, base, 1e-6, 1e-6, 1e-6, 2.0, 20
    )
    assert (post[0] - their_post[..., 0]).abs().max() < 1e-5
    assert (comb[0] - their_comb).abs().max() < 1e-5
    # One step of bfloat16 and a little.
    torch.testing.assert_close(x[0], their_x.to(x.dtype), rtol=2**-7, atol=2**-6)
    y = torch.randn(1, 6, 256).bfloat16()
    ours = hc_post(y, streams, post, comb)[0]
    theirs = reference.mhc_post_torch(y[0], streams[0], their_post, their_comb)
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize(("ratio", "theta"), [(0, 10000.0), (4, 160000.0), (128, 160000.0)])
def test_rope_frequencies_follow_the_layer_kind(ratio, theta):
    frequencies = rope_inverse_frequencies(CONFIG, ratio)
    plain = theta ** -(torch.arange(0, 64, 2).float() / 64)
    assert torch.allclose(frequencies[:5], plain[:5])
    factor = 1 if ratio == 0 else CONFIG.rope_scaling["factor"]
    assert torch.allclose(frequencies[-1] * factor, plain[-1])


def test_rope_frequencies_equal_the_engines():
    rotary = pytest.importorskip(
        "vllm.model_executor.layers.rotary_embedding.deepseek_scaling_rope"
    )

    class Shape:
        base, rotary_dim, max_position_embeddings = 160000, 64, 4096
        beta_fast, beta_slow = 32, 1

    theirs = rotary.DeepseekScalingRotaryEmbedding._compute_inv_freq(Shape(), 16)
    assert torch.allclose(rope_inverse_frequencies(CONFIG, 4), theirs, rtol=1e-6)


def test_inverse_rope_undoes_rope():
    rope, x = Rope(CONFIG, 4), torch.randn(1, 9, 2, 512, dtype=torch.float64)
    positions = torch.arange(100, 109)
    turned = rope(x, positions)
    assert torch.equal(turned[..., :448], x[..., :448])
    assert (rope(turned, positions, inverse=True) - x).abs().max() < 1e-6


def test_index_loss_is_zero_when_scores_match_attention():
    probabilities = torch.softmax(torch.randn(1, 5, 2, 7), -1)
    scores = probabilities.sum(2).log()
    chosen = torch.ones(1, 5, 7, dtype=torch.bool)
    assert index_loss(probabilities, scores, chosen).abs() < 1e-5
    assert index_loss(probabilities, torch.randn(1, 5, 7), chosen) > 0.01
