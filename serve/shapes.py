"""Names, types and shapes of a W4A16 + FP8 DeepSeek-V4 checkpoint, from its config alone.

The layout is `kernels.weights`' W4A16. No tensor library is needed: `serve plan` works where no
checkpoint and no engine is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from kernels.weights import Kind, Layout, head_weights, is_compressor, tensors, trunk_weights

FLASH_CONFIG = Path(__file__).parent / "flash.json"
# safetensors' names of the types
TYPE_BYTES = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4,
              "I64": 8}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint, as a safetensors header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * TYPE_BYTES[self.dtype]


def flash_config() -> dict[str, Any]:
    """The config of DeepSeek-V4-Flash in W4A16 + FP8 with its MTP head."""
    return json.loads(FLASH_CONFIG.read_text(encoding="utf-8"))


def checkpoint_tensors(
    config: Mapping[str, Any], mtp: bool = True, fp8_compressor: bool = False
) -> Iterator[TensorSpec]:
    """Every tensor of the checkpoint, layer by layer.

    Args:
        config: config.json; `num_hidden_layers` and the sizes in it are used.
        mtp: with the MTP head, its expert in INT4 and its attention in FP8.
        fp8_compressor: compressor and indexer in FP8, as the base was first published.
    """
    heads = range(config["num_nextn_predict_layers"]) if mtp else ()
    for weight in chain(
        trunk_weights(config), *(head_weights(config, prefix=f"mtp.{head}.") for head in heads)
    ):
        fp8 = fp8_compressor and is_compressor(weight.stem)
        stored = replace(weight, kind=Kind.ATTENTION) if fp8 else weight
        for spec in tensors(stored, Layout.W4A16):
            yield TensorSpec(spec.name, spec.dtypes[0], spec.shape)
