"""Sizes, bytes, layers and routings."""

import torch

from bench.kernels.problem import Shape, layers_needed, make_layers
from bench.kernels.routing import Routing, distinct, draw
from tests.bench.kernels.fakes import CPU, SHAPE, random_batch

TP2 = Shape(4096, 1024, 256, 6)


def test_bytes_are_those_of_the_tensors():
    (layer,) = make_layers(SHAPE, 1, CPU, torch.Generator().manual_seed(0))
    tensors = (layer.w13, layer.w13_scale, layer.w2, layer.w2_scale)
    assert sum(t.numel() * t.element_size() for t in tensors) == SHAPE.layer_bytes
    assert layer.w13.shape == (8, 128 // 16, 4 * 128)
    assert layer.w2_scale.shape == (8, 1, 128)


def test_a_token_of_deepseeks_layer_reads_39_megabytes_on_a_rank():
    assert TP2.expert_bytes == 6_488_064
    assert TP2.batch_bytes(2) == 2 * (4 * 4096 + 48)


def test_as_many_layers_rotate_as_exceed_four_times_the_cache():
    for l2_bytes in (50 << 20, 128 << 20):
        count = layers_needed(TP2, l2_bytes)
        between = (count - 1) * 6 * TP2.expert_bytes
        assert 4 * l2_bytes <= between < 4 * l2_bytes + 6 * TP2.expert_bytes


def test_codes_and_scales_differ_from_layer_to_layer():
    first, second = make_layers(SHAPE, 2, CPU, torch.Generator().manual_seed(0))
    assert not torch.equal(first.w13, second.w13)
    assert 0.009 < float(first.w2_scale.min()) < float(first.w2_scale.max()) < 0.025


def test_a_token_never_names_an_expert_twice():
    generator = torch.Generator().manual_seed(0)
    for routing in Routing:
        for tokens, experts in ((1, 6), (4, 7), (5, 13), (64, 256)):
            ids = draw(routing, tokens, experts, 6, generator)
            assert ids.dtype == torch.int32
            assert ids.shape == (tokens, 6)
            assert all(len(set(row)) == 6 for row in ids.tolist())
            assert int(ids.min()) >= 0
            assert int(ids.max()) < experts


def mean_distinct(routing: Routing, tokens: int) -> float:
    generator = torch.Generator().manual_seed(0)
    counts = distinct(torch.stack([draw(routing, tokens, 256, 6, generator) for _ in range(300)]))
    return sum(counts) / len(counts)


def test_uniform_tokens_share_experts_by_chance_only():
    for tokens in (2, 4, 16):
        chance = 256 * (1 - (1 - 6 / 256) ** tokens)
        assert abs(mean_distinct(Routing.UNIFORM, tokens) - chance) < 0.03 * chance


def test_drafted_tokens_share_a_quarter_of_their_experts_with_the_token_before():
    assert abs(mean_distinct(Routing.MTP, 2) - (6 + 0.75 * 6)) < 0.2
    # Streams of two tokens: four of them, each with a quarter less in its second token.
    uniform, mtp = (mean_distinct(routing, 8) for routing in (Routing.UNIFORM, Routing.MTP))
    assert 0.83 < mtp / uniform < 0.93


def test_distinct_experts_are_counted_per_step():
    ids = torch.tensor([[[0, 1], [1, 2]], [[3, 4], [3, 4]]])
    assert distinct(ids) == [3, 2]


def test_the_router_writes_the_ids_of_its_step():
    batch = random_batch(separator=True)
    for step in (1, 0):
        routed = batch.route(step)
        assert routed is batch.router
        assert torch.equal(routed, batch.ids[step])
    assert random_batch().route(1).data_ptr() != batch.router.data_ptr()


def test_route_weights_add_up_to_one():
    torch.testing.assert_close(random_batch().weights.sum(-1), torch.ones(2, 3))
