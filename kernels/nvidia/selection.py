"""Whether our INT4 experts serve a layer, and with which kernel each batch.

On compute capability 12.0 they are chosen by themselves, where a measured table says for which
batches they are faster; on another GPU that the library has code for, with `--moe-backend external`
only. Whatever they do not serve is left to vLLM's own experts, with the reason.
"""

from __future__ import annotations

import torch
from vllm import envs
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.platforms import current_platform

from kernels import build, ops
from kernels.dispatch import Device, Dispatch, Kernel, Shape, find_dispatch, find_similar, only_ours
from kernels.nvidia import marlin
from kernels.weights import INT4_GROUP

BACKEND = "external"  # of vLLM's --moe-backend
AUTOMATIC = (12, 0)
ARCHITECTURES = {8: "sm_80", 9: "sm_90"}  # by major number; code for 12.0 runs on no other 12.x
INSTEAD = "or take vLLM's own with --moe-backend marlin"


class NotServed(ValueError):
    """Our experts do not serve the layer; the message is the reason."""


def is_asked_for(config: FusedMoEConfig) -> bool:
    """Whether the user named the backend."""
    return config.moe_backend == BACKEND


def is_automatic(config: FusedMoEConfig) -> bool:
    """Whether they are considered without being asked for."""
    return config.moe_backend == "auto" and _capability() == AUTOMATIC


def choose_dispatch(config: FusedMoEConfig) -> Dispatch:
    """The kernel for each batch of a layer.

    Raises:
        NotServed: the layer is not for our experts.
        ValueError: a dispatch table cannot be read.
    """
    _check_device(config)
    _check_layer(config)
    shape = _shape(config)
    single = "Marlin reads the scales of a single group in another order"
    dispatch = find_dispatch(shape, this_device())
    if dispatch is None:
        if not is_asked_for(config):
            raise NotServed(
                f"no dispatch table has {shape}, so nothing says that they are faster; "
                "`python -m bench.kernels --dispatch-table FILE` measures one"
            )
        dispatch = find_similar(shape, this_device())
        if dispatch is None:
            return only_ours(f"asked for, and no table is of a layer like {shape}")
    if Kernel.MARLIN in dispatch.kernels and not marlin.can_read(
        shape.hidden_size, shape.inter_size
    ):
        if not is_asked_for(config):
            raise NotServed(f"{shape}: {single}")
        return only_ours(f"asked for, and {single}")
    return dispatch


def require_library() -> None:
    """Make sure that the shared library is there and has code for this GPU.

    Raises:
        RuntimeError: it has not; one line that says what to do.
    """
    try:
        path = build.library_path()
    except RuntimeError as error:
        raise RuntimeError(f"{error}, {INSTEAD}") from error
    stamp = build.read_stamp(path.parent)
    needed = _architecture(_capability())
    if needed not in stamp.architectures:
        raise RuntimeError(
            f"kernels: {path} has code for {', '.join(stamp.architectures)}, none for {needed}; "
            f"run `make kernels`, {INSTEAD}"
        )


def this_device() -> Device:
    """The GPU, as dispatch tables name it."""
    return Device(current_platform.get_device_name(), _text(_capability()))


def _capability() -> tuple[int, int]:
    return tuple(current_platform.get_device_capability())


def _text(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def _architecture(capability: tuple[int, int]) -> str | None:
    return "sm_120a" if capability == AUTOMATIC else ARCHITECTURES.get(capability[0])


def _shape(config: FusedMoEConfig) -> Shape:
    return Shape(
        config.hidden_dim,
        config.intermediate_size_per_partition,
        config.num_local_experts,
        config.experts_per_token,
    )


def _check_device(config: FusedMoEConfig) -> None:
    capability = _capability()
    if _architecture(capability) is None:
        raise NotServed(
            f"compute capability {_text(capability)}; the library has code for 8.x, 9.x and 12.0"
        )
    if not is_asked_for(config) and not is_automatic(config):
        raise NotServed(
            f"compute capability {_text(capability)}; they are chosen by themselves on 12.0 only, "
            f"elsewhere with --moe-backend {BACKEND}"
        )


def _check_layer(config: FusedMoEConfig) -> None:
    shape = _shape(config)
    factors = (config.swiglu_alpha, config.swiglu_beta)
    rules = (
        (
            config.weight_group_size == INT4_GROUP,
            f"weight_group_size = {config.weight_group_size}; {INT4_GROUP} is needed, of a "
            "compressed-tensors checkpoint",
        ),
        (
            config.in_dtype == torch.bfloat16,
            f"activations are {config.in_dtype}; bfloat16 is needed",
        ),
        (
            not config.moe_parallel_config.use_ep,
            "expert parallelism; each rank must hold a part of every expert",
        ),
        (not config.has_bias, "the experts have a bias"),
        (factors in ((None, None), (1.0, 0.0)), f"swiglu_alpha, swiglu_beta = {factors}"),
        (
            shape.hidden_size % INT4_GROUP == 0 and shape.inter_size % INT4_GROUP == 0,
            f"{shape}: hidden_size and inter_size must be multiples of {INT4_GROUP}",
        ),
        (
            shape.num_experts <= ops.MAX_EXPERTS and shape.top_k <= ops.MAX_TOP_K,
            f"{shape}: at most {ops.MAX_EXPERTS} experts and top_k {ops.MAX_TOP_K} are supported",
        ),
        (
            envs.VLLM_MARLIN_INPUT_DTYPE is None,
            f"VLLM_MARLIN_INPUT_DTYPE = {envs.VLLM_MARLIN_INPUT_DTYPE!r}; activations stay BF16",
        ),
    )
    for holds, reason in rules:
        if not holds:
            raise NotServed(reason)
