"""Strict loading of DeepSeek-V4: every parameter from one named tensor, or an error with the names.

The checkpoint names that a model needs are derived from its own parameters, one for each
(layer, expert, projection, leaf) and for each shard of a fused parameter. A tensor is looked up by
its whole name; nothing is matched by substring. What is missing, unexpected, given twice, of a
type that a copy would convert to other numbers, or names an expert that does not exist is counted,
and ends the load.

Names are those of the original checkpoint, with or without a leading `model.`. A scale may be
called `scale`, `weight_scale` or `weight_scale_inv`, whichever of them the parameter is called.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import nn

from kernels.formats import dequantize_fp8_block
from kernels.full_sizes import FullSizes

NAMES_SHOWN = 20
PROBLEMS = (
    "missing",
    "unexpected",
    "given twice",
    "of a wrong type",
    "of a wrong size",
    "with wrong values",
)
SCALES = ("scale", "weight_scale", "weight_scale_inv")
SCALE = "weight_scale"  # what a scale is called in expected names and messages

# Last component of a fused module -> components of the checkpoint, in shard order.
FUSED = {
    "fused_wqa_wkv": ("wq_a", "wkv"),
    "fused_wkv_wgate": ("wkv", "wgate"),
    "gate_up_proj": ("w1", "w3"),
}
RENAMED = {"down_proj": "w2"}
EXPERT_SHARDS = {"w13": ("w1", "w3"), "w2": ("w2",)}

# vLLM multiplies by these weights in BF16 and has no scale parameter for them. A checkpoint may
# store them as block FP8: they are dequantized while they are loaded.
DEQUANTIZED = re.compile(
    r"layers\.\d+\.attn\.(?:indexer\.)?compressor\.(?:wkv|wgate)"
    r"|layers\.\d+\.attn\.indexer\.weights_proj"
    r"|mtp\.\d+\.[eh]_proj"
)
MTP_NAME = re.compile(r"(?:model\.)?mtp\.\d+\.")

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BYTES = (torch.uint8, torch.int8)


class Part(StrEnum):
    """What is loaded: the model, or the head that drafts for it."""

    TARGET = "target"
    DRAFT = "MTP head"


class Unit(NamedTuple):
    """What one checkpoint tensor fills.

    shard: None, the position in a fused parameter, or w1, w2, w3 of an expert.
    """

    parameter: str
    shard: str | int | None = None
    expert: int | None = None


class WrongValues(ValueError):
    """A tensor of the right type and size holds values that it must not."""


@dataclass
class LoadReport:
    """What a complete load did."""

    part: Part
    parameters: set[str] = field(default_factory=set)
    num_tensors: int = 0
    dequantized: list[str] = field(default_factory=list)


def is_mtp_name(name: str) -> bool:
    """Whether a checkpoint name belongs to the MTP head."""
    return MTP_NAME.match(name) is not None


def canonical_name(name: str) -> str:
    """The spelling under which a name is looked up: no `model.`, one word for scale and bias."""
    name = name.removeprefix("model.")
    module, dot, leaf = name.rpartition(".")
    if leaf in SCALES:
        leaf = SCALE
    elif leaf == "e_score_correction_bias":
        leaf = "bias"
    return f"{module}{dot}{leaf}"


def block_names(rest: str, parameter: str, num_experts: int) -> Iterator[tuple[str, Unit]]:
    """Checkpoint names below a layer that fill one parameter of a decoder block.

    Args:
        rest: the parameter's name below the block, e.g. `attn.fused_wqa_wkv.weight`.
        parameter: its full name.
        num_experts: routed experts of the model, over all ranks.
    """
    module, dot, leaf = rest.rpartition(".")
    parent, _, last = module.rpartition(".")
    if last == "routed_experts":
        fused, _, leaf = leaf.partition("_")
        for expert in range(num_experts):
            for shard in EXPERT_SHARDS[fused]:
                yield f"{parent}.{expert}.{shard}.{leaf}", Unit(parameter, shard, expert)
    elif last in FUSED:
        for shard, name in enumerate(FUSED[last]):
            yield f"{parent}.{name}.{leaf}", Unit(parameter, shard)
    elif last in RENAMED:
        yield f"{parent}.{RENAMED[last]}.{leaf}", Unit(parameter)
    else:
        yield f"{module}{dot}{leaf}", Unit(parameter)


def target_names(parameter: str, num_experts: int) -> Iterator[tuple[str, Unit]]:
    """Checkpoint names that fill one parameter of the target."""
    top = {"lm_head.weight": "head.weight", "model.embed_tokens.weight": "embed.weight"}
    if parameter in top:
        yield top[parameter], Unit(parameter)
    elif layer := re.fullmatch(r"model\.(layers\.\d+\.)(.+)", parameter):
        for name, unit in block_names(layer[2], parameter, num_experts):
            yield layer[1] + name, unit
    else:
        yield parameter.removeprefix("model."), Unit(parameter)


def draft_names(parameter: str, num_experts: int, first_layer: int) -> Iterator[tuple[str, Unit]]:
    """Checkpoint names that fill one parameter of the MTP head, whose layers start there."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(?:(mtp_block)\.)?(.+)", parameter)
    if layer is None:  # model.embed_tokens.weight
        yield "mtp.0.emb.tok_emb.weight", Unit(parameter)
        return
    prefix = f"mtp.{int(layer[1]) - first_layer}."
    if layer[2]:
        for name, unit in block_names(layer[3], parameter, num_experts):
            yield prefix + name, unit
    else:
        yield prefix + layer[3].removeprefix("shared_head."), Unit(parameter)


def is_optional(part: Part, name: str) -> bool:
    """Whether vLLM shares this tensor of the head with the target when it is absent."""
    return part is Part.DRAFT and name.endswith((".emb.tok_emb.weight", ".head.weight"))


def as_stored(name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor to copy into a parameter, its bits kept where the parameter holds bytes.

    Raises:
        TypeError: a copy would convert the values to others without a word: BF16 into FP8, FP8
            without its scale, E8M0 exponents typed as uint8, and the like.
    """
    leaf = name.rpartition(".")[2]
    given, wanted = tensor.dtype, parameter.dtype
    if given == wanted:
        return tensor
    if wanted in _BYTES and given in (*_BYTES, torch.float8_e8m0fnu):
        return tensor.view(wanted)  # two e2m1 codes, or one E8M0 exponent
    if wanted in _FLOATS and (given in _FLOATS or given == torch.float8_e8m0fnu):
        return tensor
    # vLLM keeps shapes as floats and expert ids as int32.
    if leaf in ("weight_shape", "tid2eid") and given in (torch.int64, torch.int32):
        return tensor
    raise TypeError(f"{name} ({str(given)[6:]} into {str(wanted)[6:]})")  # without "torch."


def is_deferred(parameter: nn.Parameter) -> bool:
    """Whether vLLM's layerwise reload keeps what its loader is given until there is memory."""
    loader = getattr(parameter, "weight_loader", None)
    return getattr(loader, "__name__", None) == "online_process_loader"


def pad_heads(heads: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """A rank's attention sinks, (heads,), as long as its parameter: a padded head has no sink.

    Raises:
        RuntimeError: there are more heads than the parameter holds.
    """
    padded = heads.new_full(parameter.shape, -math.inf, dtype=parameter.dtype)
    padded[: len(heads)] = heads
    return padded


def check_expert_ids(name: str, ids: torch.Tensor, num_experts: int) -> None:
    """Refuse ids that name no routed expert of the model, over all ranks.

    Raises:
        WrongValues: with the range of the ids and the one that is allowed.
    """
    low, high = (bound.item() for bound in ids.aminmax())
    if low < 0 or high >= num_experts:
        raise WrongValues(f"{name} (ids {low} to {high}, must be 0 to {num_experts - 1})")


class StrictLoader:
    """Fills the parameters of one model and counts what was filled.

    Args:
        model: a target or draft class of vLLM.
        part: which of the two.
        num_experts: routed experts of the model, over all ranks.
        first_layer: number of the first MTP layer; for the draft only.
        tp_rank, tp_size: this process's part of the attention heads.
        sizes: of the tensors before they are cut; None leaves them to vLLM's own loaders.
    Raises:
        ValueError: the config gives no size for a parameter.
        RuntimeError: a parameter has no memory, and no loader that waits until it has.
    """

    def __init__(
        self,
        model: nn.Module,
        part: Part,
        num_experts: int,
        first_layer: int = 0,
        tp_rank: int = 0,
        tp_size: int = 1,
        sizes: FullSizes | None = None,
    ) -> None:
        self.part = part
        self.tp_rank, self.tp_size = tp_rank, tp_size
        self.num_experts = num_experts
        self.parameters = dict(model.named_parameters())
        if lost := [n for n, p in self.parameters.items() if p.is_meta and not is_deferred(p)]:
            raise RuntimeError(
                f"load of the {part}: {len(lost)} parameters are on meta and have no loader of "
                f"vLLM's layerwise reload; a copy would be lost: {', '.join(lost[:NAMES_SHOWN])}"
            )
        self.expected: dict[str, Unit] = {}
        for parameter in self.parameters:
            names = (
                target_names(parameter, num_experts)
                if part is Part.TARGET
                else draft_names(parameter, num_experts, first_layer)
            )
            for name, unit in names:
                if (known := self.expected.setdefault(canonical_name(name), unit)) != unit:
                    raise RuntimeError(f"strict load: {name} would fill {known} and {unit}")
        self.sizes = sizes
        if sizes and (unknown := sorted(n for n in self.expected if not sizes.knows(n))):
            raise ValueError(
                f"load of the {part}: the config gives no size for {len(unknown)} tensors: "
                + ", ".join(unknown[:NAMES_SHOWN])
            )
        # FP8 weights and scales of DEQUANTIZED modules that wait for each other.
        self.pending: dict[str, dict[str, torch.Tensor]] = {}
        self.report = LoadReport(part)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> LoadReport:
        """Load every tensor of this part; names of the other part are skipped.

        Raises:
            ValueError: something is missing, unexpected, given twice, of a wrong type, of a wrong
                size or has wrong values; the first 20 names of each kind are listed.
        """
        filled: set[str] = set()
        problems: dict[str, list[str]] = {kind: [] for kind in PROBLEMS}
        for given, tensor in weights:
            if is_mtp_name(given) != (self.part is Part.DRAFT):
                continue
            name = canonical_name(given)
            if self._is_dequantized(name, tensor):
                name, tensor = self._dequantize(given, tensor, filled, problems)
                if tensor is None:
                    continue
            if name not in self.expected:
                problems["unexpected"].append(given)
            elif name in filled:
                problems["given twice"].append(given)
            else:
                filled.add(name)
                try:
                    self._fill(name, tensor)
                except TypeError as error:
                    problems["of a wrong type"].append(str(error))
                except WrongValues as error:
                    problems["with wrong values"].append(str(error))
                except ValueError as error:
                    problems["of a wrong size"].append(str(error))
        for module, halves in self.pending.items():
            unscaled = "weight" in halves
            problems["missing" if unscaled else "unexpected"].append(f"{module}.{SCALE}")
            filled |= {f"{module}.weight"} if unscaled else set()
        problems["missing"] += [
            name
            for name in self.expected
            if name not in filled and not is_optional(self.part, name)
        ]
        self._check(problems, empty=not filled)
        self.report.num_tensors = len(filled)
        self.report.parameters = {self.expected[name].parameter for name in filled}
        return self.report

    def _is_dequantized(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether this is half of an FP8 weight whose parameter is BF16."""
        module, _, leaf = name.rpartition(".")
        weight = self.expected.get(f"{module}.weight")
        if weight is None or not DEQUANTIZED.fullmatch(module):
            return False
        if self.parameters[weight.parameter].dtype not in _FLOATS:
            return False
        return leaf == SCALE or (leaf == "weight" and tensor.dtype == torch.float8_e4m3fn)

    def _dequantize(
        self,
        given: str,
        tensor: torch.Tensor,
        filled: set[str],
        problems: dict[str, list[str]],
    ) -> tuple[str, torch.Tensor | None]:
        """Keep one half, or give back the BF16 weight when it is the second."""
        name = canonical_name(given)
        module, _, leaf = name.rpartition(".")
        weight = f"{module}.weight"
        halves = self.pending.setdefault(module, {})
        if leaf in halves:
            problems["given twice"].append(given)
            return name, None
        halves[leaf] = tensor
        if len(halves) < 2:
            return name, None
        del self.pending[module]
        dtype = self.parameters[self.expected[weight].parameter].dtype
        try:
            dense = dequantize_fp8_block(halves["weight"], halves[SCALE], dtype)
        except ValueError as error:
            problems["of a wrong size"].append(f"{weight} ({error})")
            filled.add(weight)
            return weight, None
        self.report.dequantized.append(module)
        return weight, dense

    def _fill(self, name: str, tensor: torch.Tensor) -> None:
        """Copy this rank's part.

        Raises:
            TypeError: see `as_stored`.
            WrongValues: see `check_expert_ids`.
            ValueError: the sizes differ.
        """
        parameter_name, shard, expert = self.expected[name]
        parameter = self.parameters[parameter_name]
        tensor = as_stored(name, tensor, parameter)
        if self.sizes:
            self.sizes.check(name, tensor, self._weight_dtype(name, parameter))
        if name.endswith(".tid2eid"):
            check_expert_ids(name, tensor, self.num_experts)
        try:
            if parameter_name.endswith(".attn_sink"):
                tensor = pad_heads(tensor.chunk(self.tp_size)[self.tp_rank], parameter)
            loader = getattr(parameter, "weight_loader", _default_loader())
            if expert is not None:
                loader(parameter, tensor, parameter_name, shard_id=shard, expert_id=expert)
            elif shard is not None:
                loader(parameter, tensor, shard)
            else:
                loader(parameter, tensor)
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{name} ({list(tensor.shape)} into {list(parameter.shape)} of {parameter_name})"
            ) from error

    def _weight_dtype(self, name: str, parameter: nn.Parameter) -> torch.dtype:
        """Type of the parameter that holds the weight of this tensor's module."""
        module = name.rpartition(".")[0]
        for leaf in ("weight", "weight_packed"):
            if unit := self.expected.get(f"{module}.{leaf}"):
                return self.parameters[unit.parameter].dtype
        return parameter.dtype

    def _check(self, problems: dict[str, list[str]], empty: bool) -> None:
        shown = [
            f"{len(names)} {kind}: {', '.join(sorted(names)[:NAMES_SHOWN])}"
            for kind, names in problems.items()
            if names
        ]
        if not shown:
            return
        if empty and self.part is Part.DRAFT:
            shown.append(
                "the checkpoint has no mtp.* tensor; restore the head, or do not speculate"
            )
        raise ValueError(f"load of the {self.part}: " + "; ".join(shown))


def _default_loader() -> Callable[..., None]:
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    return default_weight_loader
