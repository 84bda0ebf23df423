"""The GPTQ algorithm against a float64 reference that follows the definition, and the policy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from retrofit import experts, gptq
from retrofit.experts import (
    Expert,
    Method,
    Sample,
    Scale,
    Settings,
    held_out_mask,
    quantize_experts,
    swiglu,
)

OUT, IN = 24, 256


def make_layer(rows: int = 600, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight float32 (out, in) and correlated inputs bf16 (rows, in)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(IN, IN, generator=generator) * torch.linspace(1.5, 0.02, IN)[:, None]
    rows_ = torch.randn(rows, IN, generator=generator) @ mix / IN**0.5
    return torch.randn(OUT, IN, generator=generator), rows_.bfloat16()


def brute_force(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """Optimal brain quantization, column by column, inverting what is left of H each time."""
    work, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.int8)
    group = weight.shape[1] // scale.shape[1]
    for i, column in enumerate(order.tolist()):
        open_ = order[i:]
        inverse = torch.linalg.inv(hessian.double()[open_][:, open_])
        step = scale[:, column // group].double()
        code = (work[:, column] / step).round().clamp(-8, 7)
        codes[:, column] = code.to(torch.int8)
        error = (work[:, column] - code * step) / inverse[0, 0]
        work[:, open_] -= error[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize("activation_order", [False, True])
def test_codes_are_those_of_the_float64_reference(activation_order):
    weight, rows = make_layer()
    hessian = gptq.damped(gptq.hessian(rows), 0.01)
    scale = gptq.absmax_scale(weight)
    order = torch.arange(IN)
    if activation_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    expected = brute_force(weight, hessian, scale, order)
    wide = gptq.quantize(
        weight[None].double(), hessian[None].double(), scale[None], activation_order
    )[0]
    assert torch.equal(wide, expected)
    # In float32 a value next to a rounding boundary may fall on the other side, and what follows
    # it in its row differs then; the output error stays the same.
    codes = gptq.quantize(weight[None], hessian[None], scale[None], activation_order)[0]
    assert (codes == expected).float().mean() > 0.97
    errors = [gptq.output_error(weight, gptq.dequantize(c, scale), rows) for c in (codes, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_output_error_is_well_below_rounding():
    weight, rows = make_layer()
    hessian = gptq.damped(gptq.hessian(rows), 0.01)
    scale = gptq.absmax_scale(weight)
    rounded = gptq.dequantize(gptq.round_to_nearest(weight, scale), scale)
    solved = gptq.dequantize(gptq.quantize(weight[None], hessian[None], scale[None])[0], scale)
    assert gptq.output_error(weight, solved, rows) < 0.5 * gptq.output_error(weight, rounded, rows)


def test_a_batch_gives_what_each_matrix_gives_alone():
    layers = [make_layer(seed=seed) for seed in range(3)]
    weight = torch.stack([w for w, _ in layers])
    hessians = torch.stack([gptq.damped(gptq.hessian(r), 0.01) for _, r in layers])
    scale = gptq.absmax_scale(weight)
    together = gptq.quantize(weight, hessians, scale)
    for i in range(3):
        alone = gptq.quantize(weight[i : i + 1], hessians[i : i + 1], scale[i : i + 1])[0]
        assert (together[i] == alone).float().mean() > 0.97


def test_inverse_factor_is_the_upper_cholesky_factor_of_the_inverse():
    hessian = gptq.damped(gptq.hessian(make_layer()[1]), 0.01).double()
    factor = gptq.inverse_factor(hessian)
    assert torch.equal(factor, factor.triu())
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    torch.testing.assert_close(factor, expected, rtol=1e-9, atol=1e-9)


def test_an_input_that_never_occurred_is_rounded_to_nearest():
    weight, rows = make_layer()
    rows[:, 5] = 0
    scale = gptq.absmax_scale(weight)
    hessian = gptq.damped(gptq.hessian(rows), 0.01)
    codes = gptq.quantize(weight[None], hessian[None], scale[None])[0]
    assert torch.equal(codes[:, 5], gptq.round_to_nearest(weight, scale)[:, 5])


def test_searched_scales_are_at_least_as_good_and_zero_groups_have_scale_one():
    weight = make_layer()[0]
    weight[3, :128] = 0

    def error(scale):
        return (gptq.dequantize(gptq.round_to_nearest(weight, scale), scale) - weight).square()

    absmax, searched = gptq.absmax_scale(weight), gptq.mse_scale(weight)
    per_group = [e.unflatten(1, (-1, 128)).sum(-1) for e in (error(searched), error(absmax))]
    assert (per_group[0] <= per_group[1] * 1.0001).all()
    assert per_group[0].sum() < 0.95 * per_group[1].sum()
    assert absmax[3, 0] == 1
    assert (searched > 0).all()
    codes = gptq.round_to_nearest(weight, searched)
    assert (codes[3, :128] == 0).all()


def test_a_group_that_no_input_reaches_keeps_its_range():
    """No scale is better than another for the output; half of it would clip the weights."""
    weight = make_layer()[0]
    importance = torch.ones(IN)
    importance[128:256] = 0
    searched = gptq.mse_scale(weight, importance)
    assert torch.equal(searched[:, 1], gptq.absmax_scale(weight)[:, 1])
    alike = gptq.mse_scale(weight)
    live = [g for g in range(IN // 128) if g != 1]
    assert torch.equal(searched[:, live], alike[:, live])


def test_what_cannot_be_solved_is_refused():
    weight, rows = make_layer()
    scale = gptq.absmax_scale(weight)
    with pytest.raises(ValueError, match="not positive definite"):
        gptq.inverse_factor(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"\[batch, in, in\]"):
        gptq.quantize(weight[None], gptq.hessian(rows)[None, :9], scale[None])
    with pytest.raises(ValueError, match="not a multiple of 3 groups"):
        gptq.quantize(weight[None], gptq.hessian(rows)[None], torch.ones(1, OUT, 3).bfloat16())
    dead = Expert(7, make_expert(0).weights, torch.zeros(200, IN).bfloat16(), torch.ones(200))
    with pytest.raises(ValueError, match=r"expert 7 \('w1', 'w3'\).*not positive definite"):
        quantize_experts([dead], Sample(dead.rows), SETTINGS)


# ------------------------------------------------------------------------------ the policy

SETTINGS = Settings(swiglu_limit=10.0)


def make_expert(rows: int, seed: int = 0) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w1": (128, IN), "w2": (IN, 128), "w3": (128, IN)}
    weights = {
        name: torch.randn(shape, generator=generator) * shape[1] ** -0.5
        for name, shape in shapes.items()
    }
    inputs = low_rank_rows(rows, seed)
    return Expert(seed, weights, inputs, torch.rand(rows, generator=generator))


def low_rank_rows(rows: int, seed: int) -> torch.Tensor:
    """Inputs that lie near 16 directions, the same for every seed: bf16 (rows, in)."""
    directions = torch.randn(16, IN, generator=torch.Generator().manual_seed(1234))
    generator = torch.Generator().manual_seed(seed)
    place = torch.randn(rows, 16, generator=generator)
    noise = torch.randn(rows, IN, generator=generator)
    return (place @ directions * 0.4 + 0.1 * noise).bfloat16()


def solve(expert: Expert, settings: Settings = SETTINGS):
    rows = torch.cat([low_rank_rows(1024, 99), make_layer(1024, 99)[1]])
    return quantize_experts([expert], Sample(rows), settings)[0]


@pytest.mark.parametrize("rows", [64, 100, 430, 3000])
def test_never_worse_than_rounding_on_held_out_rows(rows):
    for result in solve(make_expert(rows)).values():
        choice = result.choice
        assert choice.num_rows == rows
        assert choice.num_held_out_rows == held_out_mask(rows, SETTINGS).sum() > 0
        assert choice.error <= choice.rtn_error


def test_rounding_is_kept_where_gptq_is_worse_on_held_out_rows():
    """The rows that are fitted lie near 16 directions, the held-out ones anywhere."""
    expert = make_expert(430)
    mask = held_out_mask(430, SETTINGS)
    rows = expert.rows.clone()
    generator = torch.Generator().manual_seed(7)
    rows[mask] = torch.randn(int(mask.sum()), IN, generator=generator).bfloat16()
    strange = replace(expert, rows=rows)
    result = quantize_experts([strange], Sample(rows[~mask]), replace(SETTINGS, blends=()))[0]
    for name in ("w1", "w3"):
        choice = result[name].choice
        assert choice.method in (Method.RTN, Method.RTN_MSE)
        assert choice.error <= choice.rtn_error
        scale = gptq.absmax_scale(expert.weights[name])
        rounded = gptq.dequantize(gptq.round_to_nearest(expert.weights[name], scale), scale)
        measured = gptq.output_error(expert.weights[name], rounded, rows[mask])
        assert choice.rtn_error == pytest.approx(measured, rel=1e-6)


def test_many_rows_take_gptq_and_it_is_clearly_better():
    for result in solve(make_expert(3000)).values():
        assert result.choice.method == Method.GPTQ
        assert result.choice.error < 0.7 * result.choice.rtn_error


@pytest.mark.parametrize("rows", [0, 1, 63])
def test_below_min_rows_there_is_no_gptq(rows):
    for result in solve(make_expert(rows)).values():
        assert result.choice.method in (Method.RTN, Method.RTN_MSE)
        assert result.choice.error is None


@pytest.mark.parametrize(
    ("more", "make_rows", "name"),
    [
        ({"ladder": (0.1, 1.0)}, lambda: make_layer(100)[1], "w1"),  # 100 rows in 256 directions
        ({"blends": (0.1, 0.5)}, lambda: low_rank_rows(100, 0), "w2"),  # what other tokens have too
    ],
)
def test_few_rows_gain_from_more_damping_and_from_the_blend(more, make_rows, name):
    few = replace(make_expert(100), rows=make_rows())
    alone = replace(SETTINGS, ladder=(), blends=())
    choice = solve(few, replace(alone, **more))[name].choice
    assert choice.error < 0.9 * solve(few, alone)[name].choice.error
    assert choice.blend is not None or choice.percdamp > SETTINGS.percdamp


def test_many_rows_are_not_blended():
    only_blends = replace(SETTINGS, ladder=(), blends=(0.001,))
    assert {r.choice.blend for r in solve(make_expert(3000), only_blends).values()} == {None}


def test_held_out_rows_are_not_fitted():
    """Other rows in their place change the error that is reported, not the codes."""
    expert = make_expert(3000)
    mask = held_out_mask(3000, SETTINGS)
    rows = expert.rows.clone()
    rows[mask] *= torch.linspace(0.1, 2, int(mask.sum()))[:, None].bfloat16()
    a, b = (solve(replace(expert, rows=r))["w1"] for r in (expert.rows, rows))
    assert a.choice.method == b.choice.method == Method.GPTQ
    assert torch.equal(a.codes, b.codes)
    assert a.choice.error != b.choice.error


@pytest.mark.parametrize("rows", [64, 65, 100, 430, 1000, 11_000, 175_000])
def test_about_an_eighth_is_held_out_in_runs(rows):
    mask = held_out_mask(rows, SETTINGS)
    wanted = min(rows / 8, SETTINGS.held_out_most)
    assert 0.8 * wanted <= mask.sum() <= wanted + 32
    starts = int((mask[1:] & ~mask[:-1]).sum())
    assert starts >= 7
    assert mask.sum() / starts == pytest.approx(min(32, rows // 64), rel=0.1)
    assert held_out_mask(63, SETTINGS).sum() == 0


def test_w2_is_fitted_to_the_inputs_that_quantized_w1_and_w3_give():
    expert = make_expert(3000)
    result = solve(expert)
    gate, up = (gptq.product(expert.rows, result[name].values()) for name in ("w1", "w3"))
    inner = swiglu(gate, up, 10.0).bfloat16().float() * expert.route[:, None]
    inner = inner.bfloat16()[~held_out_mask(3000, SETTINGS)]
    hessian = gptq.hessian(inner)
    scale = gptq.mse_scale(expert.weights["w2"], hessian.diagonal())
    weight = expert.weights["w2"][None]
    damping = result["w2"].choice.percdamp
    codes = gptq.quantize(weight, gptq.damped(hessian, damping)[None], scale[None])[0]
    assert torch.equal(codes, result["w2"].codes)


def test_few_rows_of_w2_are_blended_at_their_own_size():
    """Hessians are quadratic in the route weight: all tokens get its root mean square."""
    route = torch.tensor([0.0, 2.0]).repeat(50)
    expert = replace(make_expert(100), route=route)
    sample = low_rank_rows(300, 99)
    done = solve(expert)
    problem = experts._second(expert, done, Sample(sample), SETTINGS)
    gate, up = (gptq.product(sample, done[name].values()) for name in ("w1", "w3"))
    inner = swiglu(gate, up, 10.0).bfloat16().float() * 2**0.5
    torch.testing.assert_close(problem.shared.rows, inner.bfloat16(), rtol=2**-7, atol=0)


def test_the_clamp_is_the_models():
    """The gate is cut above only, the other factor on both sides; no limit, no clamp."""
    gate, up = torch.tensor([20.0, -20.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, -20.0, 20.0])
    silu = torch.nn.functional.silu(torch.tensor([10.0, -20.0, 1.0, 1.0]))
    assert torch.equal(swiglu(gate, up, 10.0), silu * torch.tensor([1.0, 1.0, -10.0, 10.0]))
    assert torch.equal(swiglu(gate, up, None), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize(
    "option",
    [
        {"percdamp": 0.05},
        {"scale": Scale.ABSMAX},
        {"activation_order": False},
        {"route_weight_in_h2": False},
        {"swiglu_limit": 0.05},
        {"held_out_every": 4},
    ],
)
def test_each_option_changes_the_result(option):
    expert = make_expert(3000)
    a, b = solve(expert), solve(expert, replace(SETTINGS, **option))
    assert any(not torch.equal(a[name].codes, b[name].codes) for name in a)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"percdamp": 0.0}, "percdamp = 0.0"),
        ({"ladder": (0.001,)}, "the ladder above it"),
        ({"blends": (2.0,)}, r"blends = \(2.0,\)"),
        ({"group_size": 64}, "group_size = 64"),
        ({"held_out_every": 1}, "held_out_every = 1"),
        ({"solve_batch": 0}, "must be positive"),
        ({"scale": "best"}, "best"),
    ],
)
def test_bad_settings_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **option)
