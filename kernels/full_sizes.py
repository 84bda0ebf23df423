"""The size of every checkpoint tensor before any rank cuts it, from the model's config.

vLLM's loaders cut a tensor first and compare afterwards, or do not compare: they take the first
part of one that is too long, and put an expert's that is too short into the front of its place,
the rest of which stays unset. On two ranks one may refuse what the other accepts. The whole size
is the same on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from kernels.weights import FP4_GROUP, FP8_BLOCK, head_weights, trunk_weights

SHARED_WITH_TARGET = ("emb.tok_emb", "head")
LEAVES = ("weight", "weight_packed", "weight_scale", "weight_shape")
WHOLE_ROW = -1  # what vLLM calls the group of a channel-wise scale
_BYTES = (torch.uint8, torch.int8)


class FullSizes:
    """Sizes by checkpoint name.

    Args:
        config: config.json of the model.
        group_size: input features that share an INT4 scale, or None if no expert is INT4.
    """

    def __init__(self, config: Mapping[str, Any], group_size: int | None) -> None:
        self.group_size = group_size
        heads = [f"mtp.{head}." for head in range(config["num_nextn_predict_layers"])]
        weights = [*trunk_weights(config)]
        for prefix in heads:
            weights += head_weights(config, prefix)
        # A name without `.weight`, or a module that has a `weight` in one of the layouts.
        self.plain = {weight.name: weight.shape for weight in weights if not weight.suffix}
        self.modules = {weight.stem: weight.shape for weight in weights if weight.suffix}
        vocabulary = (config["vocab_size"], config["hidden_size"])
        for prefix in heads:
            self.modules |= {f"{prefix}{name}": vocabulary for name in SHARED_WITH_TARGET}

    def knows(self, name: str) -> bool:
        """Whether the config gives a size for this name."""
        module, _, leaf = name.rpartition(".")
        return name in self.plain or (module in self.modules and leaf in LEAVES)

    def size(self, name: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[int, ...]:
        """The size that a tensor must have.

        Args:
            name: a canonical name that is known.
            dtype: the tensor's.
            weight_dtype: of the parameter that holds the module's weight.
        """
        if name in self.plain:
            return self.plain[name]
        module, _, leaf = name.rpartition(".")
        shape = self.modules[module]
        if leaf == "weight_shape":
            return (2,)
        out_features, *in_features = shape
        if not in_features:  # a norm
            return shape
        in_features = in_features[0]
        if leaf == "weight_packed":
            return out_features, in_features // (2 * dtype.itemsize)  # 4-bit codes
        if leaf == "weight":
            return out_features, in_features // (2 if dtype in _BYTES else 1)
        if weight_dtype == torch.float8_e4m3fn:
            return math.ceil(out_features / FP8_BLOCK), math.ceil(in_features / FP8_BLOCK)
        group = FP4_GROUP if weight_dtype in _BYTES else self.group_size
        return out_features, 1 if group == WHOLE_ROW else math.ceil(in_features / group)

    def check(self, name: str, tensor: torch.Tensor, weight_dtype: torch.dtype) -> None:
        """Refuse a tensor of another size.

        Raises:
            ValueError: with the size that it has and the one that it must have; or with the
                values of a `weight_shape` that belongs to a weight of another size.
        """
        size = self.size(name, tensor.dtype, weight_dtype)
        if tuple(tensor.shape) != size and not (tensor.numel() == 1 == math.prod(size)):
            raise ValueError(f"{name} ({list(tensor.shape)}, must be {list(size)})")
        if name.endswith(".weight_shape"):
            shape = list(self.modules[name.rpartition(".")[0]])
            if tensor.tolist() != shape:
                raise ValueError(f"{name} (says {tensor.tolist()}, must say {shape})")
