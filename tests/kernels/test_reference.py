"""The reference of the W4A16 kernels: against the definition, one dot product at a time."""

import math

import pytest
import torch

from kernels import reference, tiled
from kernels.formats import dequantize_int4, quantize_int4


def random_experts(experts=3, hidden=128, inter=128, seed=0):
    g = torch.Generator().manual_seed(seed)
    w13 = torch.randn(experts, 2 * inter, hidden, generator=g) / math.sqrt(hidden)
    w2 = torch.randn(experts, hidden, inter, generator=g) / math.sqrt(inter)
    quantized = [[quantize_int4(w) for w in weights] for weights in (w13, w2)]
    stacked = [torch.stack([q[i] for q in weights]) for weights in quantized for i in (0, 1)]
    return reference.Experts(*stacked)


def random_tokens(tokens=4, hidden=128, seed=1):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).bfloat16()


def by_hand(x, experts, ids, weights, limit):
    """The definition, one token and slot at a time, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(ids.tolist()):
        for slot, e in enumerate(row):
            if not 0 <= e < len(experts.w13_packed):
                continue
            w13 = dequantize_int4(experts.w13_packed[e], experts.w13_scale[e]).double()
            w2 = dequantize_int4(experts.w2_packed[e], experts.w2_scale[e]).double()
            inter = len(w13) // 2
            gate, up = w13[:inter] @ x[token].double(), w13[inter:] @ x[token].double()
            gate = torch.minimum(gate, torch.tensor(limit))
            up = torch.maximum(torch.minimum(up, torch.tensor(limit)), torch.tensor(-limit))
            act = gate / (1 + torch.exp(-gate)) * up
            out[token] += weights[token, slot].double() * (w2 @ act)
    return out


IDS = torch.tensor([[0, 1], [2, 2], [-1, 1], [-1, 3]], dtype=torch.int32)  # 3 is outside
WEIGHTS = torch.tensor([[0.75, 0.25], [0.5, 1.0], [9.0, 0.125], [9.0, 9.0]])


@pytest.mark.parametrize("limit", [None, 0.5])
def test_float64_is_the_definition(limit):
    experts, x = random_experts(), random_tokens()
    out = reference.moe(x.double(), experts, IDS, WEIGHTS, limit)
    expected = by_hand(x, experts, IDS, WEIGHTS, math.inf if limit is None else limit)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    assert torch.count_nonzero(out[3]) == 0


def test_the_limit_changes_the_output():
    experts, x = random_experts(), random_tokens().double()
    outputs = [reference.moe(x, experts, IDS, WEIGHTS, limit) for limit in (None, 0.5, 0.25)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert (outputs[1] - outputs[2]).abs().max() > 1e-3


def test_bfloat16_is_close_and_rounds():
    experts, x = random_experts(), random_tokens()
    exact = reference.moe(x.double(), experts, IDS, WEIGHTS, 10.0)
    plain = reference.moe(x, experts, IDS, WEIGHTS, 10.0)
    assert plain.dtype == torch.bfloat16
    error = (plain.double() - exact).abs().max() / exact.abs().max()
    assert 2**-12 < error < 2**-6


def test_bfloat16_rounds_the_weights_the_activation_and_each_linear():
    experts, x = random_experts(experts=1), random_tokens(tokens=1)
    plain = reference.moe(x, experts, torch.tensor([[0]]), torch.tensor([[0.3]]))
    w13 = dequantize_int4(experts.w13_packed[0], experts.w13_scale[0]).bfloat16()
    w2 = dequantize_int4(experts.w2_packed[0], experts.w2_scale[0]).bfloat16()
    gate, up = (x @ w13.T).float().chunk(2, dim=-1)
    act = (torch.nn.functional.silu(gate) * up).bfloat16()
    assert torch.equal(plain, ((act @ w2.T).float() * 0.3).bfloat16())


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_no_tokens_give_an_empty_output(dtype):
    ids, weights = torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2)
    out = reference.moe(torch.empty(0, 128, dtype=dtype), random_experts(), ids, weights)
    assert (out.dtype, tuple(out.shape)) == (dtype, (0, 128))


def test_gemm_is_the_product_with_the_dequantized_weight():
    packed, scale, _ = quantize_int4(torch.randn(64, 256, generator=torch.Generator()))
    a = random_tokens(hidden=256)
    exact = reference.gemm(a.double(), packed, scale)
    values = dequantize_int4(packed, scale).double()
    torch.testing.assert_close(exact, a.double() @ values.T, rtol=1e-12, atol=1e-14)
    plain = reference.gemm(a, packed, scale)
    assert torch.equal(plain, a @ values.bfloat16().T)


def test_silu_interleaved_is_the_activation_of_interleaved_features():
    gate, up = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(5)).double()
    rows = torch.cat([gate, up], dim=-1).T  # (2 * inter, rows), gate rows before up rows
    interleaved = tiled.interleave_rows(rows).T
    out = reference.silu_interleaved(interleaved, 0.5)
    gate, up = gate.clamp(max=0.5), up.clamp(-0.5, 0.5)
    torch.testing.assert_close(out, gate * torch.sigmoid(gate) * up, rtol=1e-12, atol=1e-14)
    assert reference.silu_interleaved(interleaved.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "call",
    [
        lambda x: reference.moe(x, random_experts(), IDS, WEIGHTS),
        lambda x: reference.gemm(x, torch.zeros(64, 16, dtype=torch.int32), torch.zeros(64, 1)),
        reference.silu_interleaved,
    ],
)
def test_another_arithmetic_is_refused(call):
    with pytest.raises(ValueError, match=r"dtype = torch.float32; float64 \(exact\) or bfloat16"):
        call(torch.zeros(4, 128))
