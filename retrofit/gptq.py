"""GPTQ (Frantar et al. 2022) to symmetric INT4 with one scale per group: linear algebra only.

A weight W (out, in) is applied to inputs x. With H = mean(x x^T) over calibration inputs, the
squared output error of a quantized Q is trace((W - Q) H (W - Q)^T). GPTQ rounds the columns one
after the other and moves each column's rounding error into the columns that are still open, as H
says. Everything works on a batch of matrices, so that a GPU is kept busy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kernels.formats import INT4_GROUP

LOW, HIGH = -8, 7
BLOCK = 128  # columns rounded before the rest of the matrix is brought up to date
ABSMAX_STEPS = 7.5  # compressed-tensors' symmetric range: absmax is this many steps
# Scales tried by the search, in units of absmax / 7.5. 1.25 makes e2m1's 6 exact (absmax / 6).
# 1 first: only what is better replaces it, so a group without importance keeps its whole range.
SEARCH_FACTORS = (1.0, *(0.5 + 0.025 * i for i in range(33) if i != 20))
ELEMENTS_AT_ONCE = 1 << 19  # a search step stays in a CPU's cache; a GPU takes more
ROWS_AT_ONCE = 8192


@contextmanager
def exact_products() -> Iterator[None]:
    """TF32 for products of bfloat16 values held in float32: exact, and accumulated in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def hessian(rows: torch.Tensor) -> torch.Tensor:
    """Mean of x x^T.

    Args:
        rows: bfloat16 (n, in), n >= 1.
    Returns:
        float32 (in, in).
    """
    total = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
    with exact_products():
        for part in rows.split(ROWS_AT_ONCE):
            x = part.float()
            total.addmm_(x.t(), x)
    return total / len(rows)


def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows @ weight^T as an engine computes it: bfloat16 in, bfloat16 out, float32 sums.

    Args:
        rows: bfloat16 (n, in).
        weight: floating (out, in), rounded to bfloat16.
    Returns:
        bfloat16 (n, out).
    """
    matrix = weight.bfloat16().float().t()
    with exact_products():
        parts = [(part.float() @ matrix).bfloat16() for part in rows.split(ROWS_AT_ONCE)]
    return torch.cat(parts)


def absmax_scale(weight: torch.Tensor, group_size: int = INT4_GROUP) -> torch.Tensor:
    """bfloat16 (..., out, in / group_size): absmax / 7.5, 1 where a group is all zero.

    Source: compressed-tensors `calculate_qparams`, symmetric.
    """
    absmax = weight.unflatten(-1, (-1, group_size)).abs().amax(dim=-1)
    return torch.where(absmax == 0, torch.ones_like(absmax), absmax / ABSMAX_STEPS).bfloat16()


def mse_scale(
    weight: torch.Tensor,
    importance: torch.Tensor | None = None,
    group_size: int = INT4_GROUP,
) -> torch.Tensor:
    """Per group, the best of SEARCH_FACTORS x absmax / 7.5 in squared rounding error.

    Args:
        weight: float32 (out, in).
        importance: of each input in the error, float32 (in); all alike when None.
    Returns:
        bfloat16 (out, in / group_size).
    """
    if importance is None:
        importance = torch.ones_like(weight[0])
    importance = importance.view(-1, group_size)  # (groups, group_size)
    at_once = ELEMENTS_AT_ONCE if weight.device.type == "cpu" else 1 << 24
    step = max(1, at_once // weight.shape[1])
    return torch.cat([_search(part, importance, group_size) for part in weight.split(step)])


def _search(weight: torch.Tensor, importance: torch.Tensor, group_size: int) -> torch.Tensor:
    groups = weight.unflatten(-1, (-1, group_size))  # (out, groups, group_size)
    unit = groups.abs().amax(dim=-1) / ABSMAX_STEPS
    unit = torch.where(unit == 0, torch.ones_like(unit), unit)
    best = unit.bfloat16()
    best_error = torch.full_like(unit, torch.inf)
    for factor in SEARCH_FACTORS:
        scale = (unit * factor).bfloat16()
        wide = scale.float()[..., None]
        rounded = (groups / wide).round_().clamp_(LOW, HIGH).mul_(wide)
        error = rounded.sub_(groups).square_().mul_(importance).sum(dim=-1)
        better = error < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, error, best_error)
    return best


def round_to_nearest(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes without regard to the inputs.

    Args:
        weight: float32 (..., out, in).
        scale: bfloat16 (..., out, groups).
    Returns:
        int8 (..., out, in) in [-8, 7].
    """
    groups = weight.unflatten(-1, (scale.shape[-1], -1))
    codes = (groups / scale.float()[..., None]).round_().clamp_(LOW, HIGH)
    return codes.to(torch.int8).flatten(-2)


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 (..., out, in): code times its group's scale."""
    groups = codes.unflatten(-1, (scale.shape[-1], -1))
    return (groups.float() * scale.float()[..., None]).flatten(-2)


def damped(hessians: torch.Tensor, percdamp: float) -> torch.Tensor:
    """H + percdamp * mean(diag H) * I.

    An input that never occurred has only the damping on its diagonal: its column is then simply
    rounded to nearest.
    """
    diagonal = hessians.diagonal()
    result = hessians.clone()
    result.diagonal().add_(percdamp * diagonal.mean())
    return result


def inverse_factor(matrix: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with U^T U = inverse(matrix).

    Written H = R R^T with R upper triangular (Cholesky from the last row up), the inverse is
    R^-T R^-1, so U = R^-1: one factorization and one triangular inverse, where the usual way
    (Cholesky, inverse, Cholesky of the inverse) takes three and loses digits.

    Raises:
        ValueError: the matrix is not positive definite.
    """
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(info) != 0:
        raise ValueError(
            f"GPTQ: the damped Hessian is not positive definite (pivot {int(info)} of "
            f"{len(matrix)}); its inputs are all zero, or not finite"
        )
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)


def quantize(
    weight: torch.Tensor,
    hessians: torch.Tensor,
    scale: torch.Tensor,
    activation_order: bool = True,
) -> torch.Tensor:
    """GPTQ codes of a batch.

    Args:
        weight: float32 or float64 (batch, out, in).
        hessians: same dtype (batch, in, in), damped.
        scale: bfloat16 (batch, out, groups), fixed beforehand. A column uses its own group's scale
            whatever the order, so no g_idx is needed ("static" order in compressed-tensors).
        activation_order: round columns with the largest diag(H) first, while the most columns are
            open to take their error.
    Returns:
        int8 (batch, out, in) in [-8, 7].
    Raises:
        ValueError: shapes do not fit, or a Hessian is not positive definite.
    """
    batch, out_features, in_features = weight.shape
    groups = scale.shape[-1]
    if hessians.shape != (batch, in_features, in_features) or scale.shape[:2] != weight.shape[:2]:
        raise ValueError(
            f"GPTQ: weight {list(weight.shape)}, hessians {list(hessians.shape)}, scale "
            f"{list(scale.shape)}; [batch, out, in], [batch, in, in], [batch, out, groups]"
        )
    if groups == 0 or in_features % groups:
        raise ValueError(f"GPTQ: in_features = {in_features} is not a multiple of {groups} groups")
    order = _order(hessians, activation_order)  # (batch, in)
    factor = torch.stack([inverse_factor(h[o][:, o]) for h, o in zip(hessians, order, strict=True)])
    # Columns become rows, so that one column is contiguous.
    expand = order[..., None].expand(-1, -1, out_features)
    columns = weight.transpose(1, 2).gather(1, expand)  # (batch, in, out)
    scales = scale.to(weight.dtype).transpose(1, 2).contiguous()  # (batch, groups, out)
    group_of = order // (in_features // groups)
    codes = torch.empty(columns.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, in_features, BLOCK):
        end = min(start + BLOCK, in_features)
        index = group_of[:, start:end, None].expand(-1, -1, out_features)
        errors = _quantize_block(
            columns[:, start:end],
            factor[:, start:end, start:end],
            scales.gather(1, index),
            codes[:, start:end],
        )
        if end < in_features:
            rest = columns[:, end:]
            rest.baddbmm_(factor[:, start:end, end:].transpose(1, 2), errors, alpha=-1)
    result = torch.empty_like(codes).scatter_(1, expand, codes)
    return result.transpose(1, 2).contiguous()


def _order(hessians: torch.Tensor, activation_order: bool) -> torch.Tensor:
    diagonal = hessians.diagonal(dim1=1, dim2=2)  # (batch, in)
    if activation_order:
        return diagonal.argsort(dim=1, descending=True, stable=True)
    return torch.arange(diagonal.shape[1], device=diagonal.device).expand(diagonal.shape)


def _quantize_block(
    columns: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Round one block of columns (batch, block, out) and fill `codes`; the errors, same shape."""
    work = columns.clone()
    errors = torch.empty_like(work)
    diagonal = factor.diagonal(dim1=1, dim2=2)[..., None]  # (batch, block, 1)
    for i in range(work.shape[1]):
        column, scale = work[:, i], scales[:, i]  # (batch, out)
        code = (column / scale).round_().clamp_(LOW, HIGH)
        codes[:, i] = code
        error = torch.div(column.addcmul(code, scale, value=-1), diagonal[:, i], out=errors[:, i])
        if i + 1 < work.shape[1]:
            work[:, i + 1 :].baddbmm_(
                factor[:, i, i + 1 :, None], error[:, None], alpha=-1
            )  # (batch, open, 1) x (batch, 1, out)
    return errors


def output_error(weight: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> float:
    """|| x (W - Q)^T ||^2 / || x W^T ||^2 over rows (n, in); 0 where both are 0."""
    x = rows.to(weight.dtype)
    wrong = (x @ (weight - values).t()).square().sum()
    whole = (x @ weight.t()).square().sum()
    return float(wrong / whole) if float(whole) else float(wrong)
