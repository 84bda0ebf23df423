"""The arms of a run: loads vLLM's libraries and says in notes what was and was not found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.kernels.arms import Arm, Ours, interleaved_activation
from bench.kernels.config import BenchConfig
from bench.kernels.gpu import Gpu, Unavailable
from bench.kernels.marlin import (
    C_LIBRARY,
    MOE_LIBRARY,
    Marlin,
    find_library,
    torch_activation,
    vllm_activation,
)
from bench.kernels.problem import Layer, Shape, make_batch
from kernels import build

MARLIN, MARLIN_OURS, HUMMING = "marlin", "marlin_interleaved", "humming"


@dataclass(frozen=True)
class Arms:
    """What is timed.

    Attributes:
        ours: our kernels.
        baselines: Marlin as vLLM runs it, then Marlin over our w13, which the dispatcher can take.
        broken: arms with something left out, for the controls.
        libraries: vLLM's, by name, for the provenance.
        notes: what a reader must know of an arm, by its name.
    """

    ours: Arm
    baselines: Sequence[Arm]
    broken: Sequence[Arm] = ()
    libraries: dict[str, Path | None] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def make_arms(config: BenchConfig, gpu: Gpu) -> Arms:
    """Load the libraries and make the arms.

    Raises:
        ValueError: a library that was named does not exist.
        Unavailable: our library is not built, there is no Marlin to compare with, or a library
            does not load.
    """
    try:
        build.library_path()
    except RuntimeError as error:
        raise Unavailable(str(error)) from error
    moe_library = find_library(MOE_LIBRARY, config.marlin)
    if moe_library is None:
        raise Unavailable(
            "bench.kernels: no Marlin to compare with: vLLM is not installed; give --marlin "
            f"{MOE_LIBRARY} of its wheel"
        )
    c_library = find_library(C_LIBRARY, config.vllm_c)
    _load(moe_library)
    limit, sms = config.swiglu_limit, gpu.info.multiprocessors
    if c_library is not None:
        _load(c_library)
        activation = vllm_activation(limit, torch.ops._C)
        silu = "vLLM's silu_and_mul_with_clamp"
    else:
        activation = torch_activation(limit, config.inter_size, gpu.device)
        silu = f"three PyTorch kernels for SiLU, for want of {C_LIBRARY} (--vllm-c)"
    ops = torch.ops._moe_C
    ours_silu = interleaved_activation(limit)
    return Arms(
        ours=Ours(limit),
        baselines=(
            Marlin(MARLIN, activation, False, sms, ops),
            Marlin(MARLIN_OURS, ours_silu, True, sms, ops),
        ),
        broken=(
            Marlin("down GEMM left out", ours_silu, True, sms, ops, skip_down=True),
        ),
        libraries={MOE_LIBRARY: moe_library, C_LIBRARY: c_library},
        notes={MARLIN: f"align, GEMM, {silu}, GEMM, moe_sum"},
    )  # fmt: skip


def make_humming(
    config: BenchConfig, gpu: Gpu, shape: Shape, layers: Sequence[Layer]
) -> tuple[Arm | None, str]:
    """Humming where it runs.

    Returns:
        The arm, or None, and a note: how it runs or why it does not.
    """
    if not config.humming:
        return None, "not asked for (--humming)"
    needed = shape.layer_bytes * len(layers)
    if gpu.free_bytes() < 1.2 * needed:
        return None, f"skipped: its copy of the weights needs {needed / 2**30:.0f} GiB more"
    try:
        from bench.kernels.humming import Humming

        arm = Humming(HUMMING, shape, layers, config.swiglu_limit)
        # Compiles; a failure here costs this arm and not the run.
        generator = torch.Generator(gpu.device).manual_seed(config.seed)
        ids = torch.arange(shape.top_k, dtype=torch.int32)[None, None]
        arm.prepare(make_batch(shape, layers, (0,), ids, gpu.device, generator, False))(0)
    # A JIT of its own on a package that may not be there: whatever it says is the reason.
    except (ImportError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as e:
        return None, f"skipped: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    return arm, arm.note


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise Unavailable(f"bench.kernels: {path.name} does not load: {error}") from error
