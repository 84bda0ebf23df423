"""Which tensors a checkpoint holds: the model's parameters under the original names.

DeepSeek-V4 stores four kinds of tensor: FP4 routed experts, FP8 linear layers, bfloat16, and
float32 for whatever steers the model (hyper-connections, attention sinks, router bias, the
compressors' position biases). `tid2eid` is int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tiny.layers import Linear, RMSNorm, Storage
from tiny.model import DeepseekV4
from tiny.moe import RoutedExperts, Router


@dataclass(frozen=True)
class Slot:
    """One weight of a checkpoint and the place in the model that holds it.

    `tensor` is a view of the parameter (of one expert's matrix for routed experts), or the
    `tid2eid` buffer, whose storage is None: it is kept as int64.
    """

    tensor: torch.Tensor
    storage: Storage | None


def checkpoint_name(parameter: str) -> str:
    """Original name of a parameter: the MTP block's own level does not exist there."""
    return parameter.replace("mtp.0.block.", "mtp.0.")


def slots(model: DeepseekV4) -> dict[str, Slot]:
    """All weights by original name, without the scales, in a fixed order."""
    found: dict[str, Slot] = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        storage = Storage.F32
        if isinstance(module, Linear):
            storage = module.storage
        elif isinstance(module, RMSNorm | torch.nn.Embedding):
            storage = Storage.BF16
        if isinstance(module, RoutedExperts):
            for expert in range(len(module.w1)):
                for name in ("w1", "w2", "w3"):
                    matrix = getattr(module, name).data[expert]
                    found[f"{dot}{expert}.{name}.weight"] = Slot(matrix, Storage.FP4)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            is_gate = isinstance(module, Router) and name == "weight"
            found[dot + name] = Slot(parameter.data, Storage.BF16 if is_gate else storage)
        if isinstance(module, Router) and module.tid2eid is not None:
            found[f"{dot}tid2eid"] = Slot(module.tid2eid, None)
    return {checkpoint_name(name): slot for name, slot in found.items()}
