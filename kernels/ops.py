"""PyTorch operators on the W4A16 kernels: `moe_w4a16`, `gemm_w4a16`, `silu_interleaved`.

The library of `kernels/build.py` is loaded at the first launch, with ctypes, so it fits any torch.
The operators `torch.ops.dsv4_maxq.*` write into an `out` that they are given; the functions of the
same names here make one where none is given. Both

- check their arguments before any launch and raise a ValueError that names operation, values and
  rule. Nothing that is checked makes the host wait for the device;
- launch on torch's current stream, and take their workspace from torch's allocator for each call:
  they can be captured in CUDA graphs and called on several streams at once;
- take zero tokens and then launch nothing: an engine has steps without tokens (a profiling run, a
  rank without work), and the right result for them, an empty tensor, is no special case.

Expert ids lie on the device. The kernels skip an id outside 0 .. num_experts - 1, as they skip -1,
and never read beyond the weights; `check_ids=True` (which waits for the device, and cannot be
captured) raises for it instead.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable

import torch

from kernels import build
from kernels.tiled import BLOCK_ROWS, INTERLEAVE, TILE_K
from kernels.weights import INT4_GROUP

# What the library supports; tests compare these with what it says itself.
MAX_TOKENS = 1 << 20
MAX_TOP_K = 16
MAX_EXPERTS = 1024
MAX_GEMM_ROWS = 65535 * 16
ALIGNMENT = 16  # bytes; what the kernels load and store at a time

_INT32_MAX = 2**31 - 1


class MoeArgs(ctypes.Structure):
    """Dsv4MoeArgs of `csrc/w4a16.h`."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("topk_ids", ctypes.c_void_p),
        ("topk_weights", ctypes.c_void_p),
        ("w13", ctypes.c_void_p),
        ("w13_scale", ctypes.c_void_p),
        ("w2", ctypes.c_void_p),
        ("w2_scale", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("num_experts", ctypes.c_int32),
        ("hidden_size", ctypes.c_int32),
        ("inter_size", ctypes.c_int32),
        ("swiglu_limit", ctypes.c_float),
    )


class GemmArgs(ctypes.Structure):
    """Dsv4GemmArgs of `csrc/w4a16.h`."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("size_m", ctypes.c_int32),
        ("size_n", ctypes.c_int32),
        ("size_k", ctypes.c_int32),
    )


# ------------------------------------------------------------------------------ for callers


def moe_w4a16(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    swiglu_limit: float | None = None,
    out: torch.Tensor | None = None,
    check_ids: bool = False,
) -> torch.Tensor:
    """Sum over a token's slots of weight * w2(silu(min(gate, limit)) * clamp(up, limit)).

    All tensors contiguous, on one CUDA device, those of BF16 and the weights at 16-byte addresses.

    Args:
        hidden: BF16 (tokens, hidden_size); hidden_size a multiple of 128.
        topk_ids: int32 (tokens, top_k); a slot whose id is outside 0 .. experts - 1 is skipped.
        topk_weights: float32 (tokens, top_k).
        w13: int32 (experts, hidden_size / 16, 4 * inter_size), `tile_weight(.., gated=True)`;
            inter_size a multiple of 128.
        w13_scale: BF16 (experts, hidden_size / 128, 2 * inter_size), `tile_scale(.., gated=True)`.
        w2: int32 (experts, inter_size / 16, 2 * hidden_size), `tile_weight`.
        w2_scale: BF16 (experts, inter_size / 128, hidden_size), `tile_scale`.
        swiglu_limit: above 0; None for no limit.
        out: BF16 (tokens, hidden_size), overlapping no other argument; made when None.
        check_ids: call `validate_topk_ids` first. It waits for the device.
    Returns:
        `out`, every element written: zeros for a token without experts. For a number of tokens the
        same bits each time.
    Raises:
        ValueError: an argument is not as above, or more than 2**20 tokens, top_k above 16, more
            than 1024 experts.
        RuntimeError: the library is not built, or CUDA refuses the launch.
    """
    _check_dims("moe_w4a16", "hidden", hidden, 2)
    if check_ids:
        _check_dims("moe_w4a16", "w13", w13, 3)
        validate_topk_ids(topk_ids, w13.shape[0], "moe_w4a16")
    if out is None:
        out = hidden.new_empty(hidden.shape)
    _MOE(hidden, topk_ids, topk_weights, w13, w13_scale, w2, w2_scale, swiglu_limit, out)
    return out


def gemm_w4a16(
    a: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`a` times the transposed weight.

    All tensors contiguous, on one CUDA device, at 16-byte addresses.

    Args:
        a: BF16 (m, k); k a multiple of 128, m at most 1048560.
        weight: int32 (k / 16, 2 n), `tile_weight`; n a multiple of 64.
        scale: BF16 (k / 128, n), `tile_scale`.
        out: BF16 (m, n), overlapping no other argument; made when None.
    Returns:
        `out`, every element written. For given sizes the same bits each time.
    Raises:
        ValueError: an argument is not as above.
        RuntimeError: the library is not built, or CUDA refuses the launch.
    """
    _check_dims("gemm_w4a16", "a", a, 2)
    _check_dims("gemm_w4a16", "weight", weight, 2)
    if out is None:
        out = a.new_empty(a.shape[0], weight.shape[1] // 2)
    _GEMM(a, weight, scale, out)
    return out


def silu_interleaved(
    gate_up: torch.Tensor, swiglu_limit: float | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(min(gate, limit)) * clamp(up, limit) of features that lie interleaved by 32.

    Both tensors contiguous, on one CUDA device, at 16-byte addresses.

    Args:
        gate_up: BF16 (rows, 2 * inter), what a GEMM over a gated weight gives; inter a multiple
            of 32.
        swiglu_limit: above 0; None for no limit.
        out: BF16 (rows, inter), not overlapping gate_up; made when None.
    Returns:
        `out`.
    Raises:
        ValueError: an argument is not as above.
        RuntimeError: the library is not built, or CUDA refuses the launch.
    """
    _check_dims("silu_interleaved", "gate_up", gate_up, 2)
    if out is None:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _SILU(gate_up, swiglu_limit, out)
    return out


def validate_topk_ids(
    topk_ids: torch.Tensor, num_experts: int, operation: str = "validate_topk_ids"
) -> None:
    """Refuse ids other than -1 (skipped) and 0 .. num_experts - 1. Waits for the device.

    Args:
        topk_ids: int (tokens, top_k), on any device.
        operation: named in the message.
    Raises:
        ValueError: there is such an id; the first one is named.
    """
    _check_dims(operation, "topk_ids", topk_ids, 2)
    wrong = ((topk_ids < -1) | (topk_ids >= num_experts)).nonzero()
    if len(wrong):
        token, slot = wrong[0].tolist()
        raise ValueError(
            f"{operation}: topk_ids[{token}, {slot}] = {int(topk_ids[token, slot])}; an id is -1 "
            f"(no expert) or 0 .. {num_experts - 1} (num_experts = {num_experts})"
        )


# ----------------------------------------------------------------------------------- checks
#
# Host only, on tensors of any device; that the device is a CUDA device is asked last, by _require.


def check_moe(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    swiglu_limit: float | None,
    out: torch.Tensor,
) -> tuple[int, int, int, int, int]:
    """Check the arguments of `moe_w4a16`, all but the kind of device and the ids.

    Returns:
        num_tokens, top_k, num_experts, hidden_size, inter_size.
    Raises:
        ValueError: operation, values and rule.
    """
    op = "moe_w4a16"
    _check_dims(op, "hidden", hidden, 2)
    _check_dims(op, "topk_ids", topk_ids, 2)
    _check_dims(op, "w13", w13, 3)
    num_tokens, hidden_size = hidden.shape
    top_k = topk_ids.shape[1]
    num_experts, _, words = w13.shape
    inter_size = words // 4
    _check_multiple(op, "hidden_size", hidden_size, INT4_GROUP)
    if words % (4 * INT4_GROUP) or not words:
        raise ValueError(
            f"{op}: w13 has {words} words per 16 k, inter_size = {words / 4:g}; it is not a "
            f"multiple of {INT4_GROUP}"
        )
    _check_at_most(op, "num_tokens", num_tokens, MAX_TOKENS, 0)
    _check_at_most(op, "top_k", top_k, MAX_TOP_K, 1)
    _check_at_most(op, "num_experts", num_experts, MAX_EXPERTS, 1)
    _check_limit(op, swiglu_limit)

    device, tokens = hidden.device, (num_tokens, top_k)
    up, down = (hidden_size // TILE_K, words), (inter_size // TILE_K, 2 * hidden_size)
    _check_scale(op, "w13_scale", w13_scale, hidden_size, (num_experts,), 2 * inter_size, device)
    _check_scale(op, "w2_scale", w2_scale, inter_size, (num_experts,), hidden_size, device)
    _check(op, "hidden", hidden, torch.bfloat16, (num_tokens, hidden_size), device, ALIGNMENT)
    _check(op, "topk_ids", topk_ids, torch.int32, tokens, device)
    _check(op, "topk_weights", topk_weights, torch.float32, tokens, device)
    _check(op, "w13", w13, torch.int32, (num_experts, *up), device, ALIGNMENT)
    _check(op, "w2", w2, torch.int32, (num_experts, *down), device, ALIGNMENT)
    _check(op, "out", out, torch.bfloat16, (num_tokens, hidden_size), device, ALIGNMENT)
    return num_tokens, top_k, num_experts, hidden_size, inter_size


def check_gemm(
    a: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor
) -> tuple[int, int, int]:
    """Check the arguments of `gemm_w4a16`, all but the kind of device.

    Returns:
        size_m, size_n, size_k.
    Raises:
        ValueError: operation, values and rule.
    """
    op = "gemm_w4a16"
    _check_dims(op, "a", a, 2)
    _check_dims(op, "weight", weight, 2)
    size_m, size_k = a.shape
    words = weight.shape[1]
    size_n = words // 2
    _check_multiple(op, "size_k", size_k, INT4_GROUP)
    if words % (2 * BLOCK_ROWS) or not words:
        raise ValueError(
            f"{op}: weight has {words} words per 16 k, size_n = {words / 2:g}; it is not a "
            f"multiple of {BLOCK_ROWS}"
        )
    _check_at_most(op, "size_m", size_m, MAX_GEMM_ROWS, 0)

    device = a.device
    _check_scale(op, "scale", scale, size_k, (), size_n, device)
    _check(op, "a", a, torch.bfloat16, (size_m, size_k), device, ALIGNMENT)
    _check(op, "weight", weight, torch.int32, (size_k // TILE_K, words), device, ALIGNMENT)
    _check(op, "out", out, torch.bfloat16, (size_m, size_n), device, ALIGNMENT)
    return size_m, size_n, size_k


def check_silu(
    gate_up: torch.Tensor, swiglu_limit: float | None, out: torch.Tensor
) -> tuple[int, int]:
    """Check the arguments of `silu_interleaved`, all but the kind of device.

    Returns:
        num_rows, inter_size.
    Raises:
        ValueError: operation, values and rule.
    """
    op = "silu_interleaved"
    _check_dims(op, "gate_up", gate_up, 2)
    num_rows, columns = gate_up.shape
    _check_multiple(op, "2 * inter_size", columns, 2 * INTERLEAVE)
    _check_at_most(op, "num_rows", num_rows, _INT32_MAX, 0)
    _check_limit(op, swiglu_limit)
    inter_size, device = columns // 2, gate_up.device
    _check(op, "gate_up", gate_up, torch.bfloat16, (num_rows, columns), device, ALIGNMENT)
    _check(op, "out", out, torch.bfloat16, (num_rows, inter_size), device, ALIGNMENT)
    return num_rows, inter_size


def _check_dims(op: str, name: str, tensor: torch.Tensor, dims: int) -> None:
    if tensor.dim() != dims:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}; {dims} dimensions are needed"
        )


def _check_multiple(op: str, name: str, size: int, of: int) -> None:
    if size % of or not size:
        raise ValueError(f"{op}: {name} = {size} is not a multiple of {of}")


def _check_at_most(op: str, name: str, size: int, most: int, least: int) -> None:
    if not least <= size <= most:
        raise ValueError(f"{op}: {name} = {size}; it must be {least} .. {most}")


def _check_limit(op: str, limit: float | None) -> None:
    if limit is not None and not limit > 0:
        raise ValueError(f"{op}: swiglu_limit = {limit}; it must be above 0, None for no limit")


def _check_scale(
    op: str,
    name: str,
    scale: torch.Tensor,
    size_k: int,
    experts: tuple[int, ...],
    size_n: int,
    device: torch.device,
) -> None:
    """As _check; a wrong number of groups is told as the group size that it means."""
    groups = size_k // INT4_GROUP
    if scale.dim() == len(experts) + 2 and scale.shape[-2] != groups:
        raise ValueError(
            f"{op}: {name} has {scale.shape[-2]} groups along k = {size_k}, group_size = "
            f"{size_k / max(scale.shape[-2], 1):g}; the kernels support group_size = {INT4_GROUP}"
        )
    _check(op, name, scale, torch.bfloat16, (*experts, groups, size_n), device, ALIGNMENT)


def _check(
    op: str,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    alignment: int = 1,
) -> None:
    """One pass in the good case; what is wrong is found out afterwards."""
    if (
        tensor.dtype is dtype
        and tensor.shape == shape
        and tensor.is_contiguous()
        and tensor.device == device
        and not tensor.data_ptr() % alignment
    ):
        return
    if tensor.dtype is not dtype:
        wrong = f"dtype {tensor.dtype}; {dtype} is needed"
    elif tensor.shape != shape:
        wrong = f"shape {tuple(tensor.shape)}; the other arguments need {shape}"
    elif not tensor.is_contiguous():
        wrong = f"shape {shape} and stride {tensor.stride()}; it must be contiguous"
    elif tensor.device != device:
        wrong = f"device {tensor.device}, the first argument {device}; one device is needed"
    else:
        wrong = f"address {tensor.data_ptr():#x}; it must be a multiple of {alignment} bytes"
    raise ValueError(f"{op}: {name} has {wrong}")


def _require_cuda(op: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"{op}: the tensors are on {device}; a CUDA device is needed")


# ---------------------------------------------------------------------------------- launches


def _moe(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    swiglu_limit: float | None,
    out: torch.Tensor,
) -> None:
    sizes = check_moe(
        hidden, topk_ids, topk_weights, w13, w13_scale, w2, w2_scale, swiglu_limit, out
    )
    _require_cuda("moe_w4a16", hidden.device)
    if sizes[0] == 0:
        return
    workspace = _workspace(_moe_workspace_bytes(*sizes), hidden.device)
    args = MoeArgs(
        hidden.data_ptr(),
        topk_ids.data_ptr(),
        topk_weights.data_ptr(),
        w13.data_ptr(),
        w13_scale.data_ptr(),
        w2.data_ptr(),
        w2_scale.data_ptr(),
        out.data_ptr(),
        workspace.data_ptr(),
        *sizes,
        math.inf if swiglu_limit is None else swiglu_limit,
    )
    _launch("moe_w4a16", hidden.device, _library().dsv4_moe, ctypes.byref(args))


def _gemm(a: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    sizes = check_gemm(a, weight, scale, out)
    _require_cuda("gemm_w4a16", a.device)
    if sizes[0] == 0:
        return
    workspace = _workspace(_gemm_workspace_bytes(*sizes), a.device)
    args = GemmArgs(
        a.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        out.data_ptr(),
        workspace.data_ptr(),
        *sizes,
    )
    _launch("gemm_w4a16", a.device, _library().dsv4_gemm, ctypes.byref(args))


def _silu(gate_up: torch.Tensor, swiglu_limit: float | None, out: torch.Tensor) -> None:
    sizes = check_silu(gate_up, swiglu_limit, out)
    _require_cuda("silu_interleaved", gate_up.device)
    if sizes[0] == 0:
        return
    limit = math.inf if swiglu_limit is None else swiglu_limit
    run = _library().dsv4_silu_interleaved
    pointers = gate_up.data_ptr(), out.data_ptr()
    _launch("silu_interleaved", gate_up.device, run, *pointers, *sizes, limit)


def _launch(
    op: str, device: torch.device, function: Callable[..., int], *arguments: object
) -> None:
    """Call the library with the tensors' device current, on torch's current stream of it."""
    index = device.index
    stream = torch.cuda.current_stream(index).cuda_stream
    if index == torch.cuda.current_device():
        error = function(*arguments, stream)
    else:
        with torch.cuda.device(index):
            error = function(*arguments, stream)
    if error:
        text = _library().dsv4_error_string(error).decode()
        raise RuntimeError(f"{op}: CUDA error {error} on {device}: {text}")


def _workspace(size_bytes: int, device: torch.device) -> torch.Tensor:
    """Torch's allocator aligns to 512 bytes, keeps the memory of a captured graph for that graph,
    and gives what a stream has freed to that stream only."""
    return torch.empty(size_bytes, dtype=torch.uint8, device=device)


@functools.lru_cache(maxsize=4096)
def _moe_workspace_bytes(*sizes: int) -> int:
    size_bytes = _library().dsv4_moe_workspace_bytes(*sizes)
    if not size_bytes:
        names = ("num_tokens", "top_k", "num_experts", "hidden_size", "inter_size")
        raise _unsupported("moe_w4a16", names, sizes)
    return size_bytes


@functools.lru_cache(maxsize=4096)
def _gemm_workspace_bytes(*sizes: int) -> int:
    size_bytes = _library().dsv4_gemm_workspace_bytes(*sizes)
    if not size_bytes:
        raise _unsupported("gemm_w4a16", ("size_m", "size_n", "size_k"), sizes)
    return size_bytes


def _unsupported(op: str, names: tuple[str, ...], sizes: tuple[int, ...]) -> ValueError:
    values = ", ".join(f"{name} = {size}" for name, size in zip(names, sizes, strict=True))
    return ValueError(
        f"{op}: {values}: the library has no workspace size for these, they are too large"
    )


@functools.cache
def _library() -> ctypes.CDLL:
    """The library, loaded once.

    Raises:
        RuntimeError: it is not built, or cannot be loaded.
    """
    path = build.library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"kernels: {path} cannot be loaded: {error}") from error
    int32, size, pointer = ctypes.c_int32, ctypes.c_size_t, ctypes.c_void_p
    signatures = {
        "dsv4_moe_workspace_bytes": (size, [int32] * 5),
        "dsv4_moe": (ctypes.c_int, [ctypes.POINTER(MoeArgs), pointer]),
        "dsv4_gemm_workspace_bytes": (size, [int32] * 3),
        "dsv4_gemm": (ctypes.c_int, [ctypes.POINTER(GemmArgs), pointer]),
        "dsv4_silu_interleaved": (
            ctypes.c_int,
            [pointer, pointer, int32, int32, ctypes.c_float, pointer],
        ),
        "dsv4_error_string": (ctypes.c_char_p, [ctypes.c_int]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


# ------------------------------------------------------------------------------ registration


def _register() -> torch.library.Library:
    library = torch.library.Library("dsv4_maxq", "FRAGMENT")
    operators = {
        "moe_w4a16(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor w13, "
        "Tensor w13_scale, Tensor w2, Tensor w2_scale, float? swiglu_limit, "
        "Tensor(a!) out) -> ()": _moe,
        "gemm_w4a16(Tensor a, Tensor weight, Tensor scale, Tensor(a!) out) -> ()": _gemm,
        "silu_interleaved(Tensor gate_up, float? swiglu_limit, Tensor(a!) out) -> ()": _silu,
    }
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    for schema, function in operators.items():
        name = schema.split("(")[0]
        library.define(schema, tags=tags)
        library.impl(name, function, "CUDA")
        library.impl(name, function, "CPU")  # to refuse: with our message, not the dispatcher's
        # Writes `out` and gives nothing, so there is nothing to infer. It checks nothing either:
        # a size may be symbolic here, and a comparison would fix it.
        torch.library.register_fake(f"dsv4_maxq::{name}", _nothing, lib=library)
    return library


def _nothing(*_: object) -> None:
    return None


_REGISTERED = _register()  # the operators live as long as this object
_MOE = torch.ops.dsv4_maxq.moe_w4a16.default
_GEMM = torch.ops.dsv4_maxq.gemm_w4a16.default
_SILU = torch.ops.dsv4_maxq.silu_interleaved.default
