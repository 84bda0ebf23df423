"""`verify`: the gate before anyone serves a W4A16-FP8 checkpoint with its MTP head.

files and index -> sizes -> head's names, dtypes, shapes -> trunk's -> config -> target matching
-> values -> with `--deep`, bytes and errors against the original.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernels.formats import dequantize_fp8_block, dequantize_int4
from kernels.weights import (
    Kind,
    Layout,
    Weight,
    head_weights,
    is_compressor,
    tensors,
    trunk_weights,
)
from retrofit import gptq, matching, pack
from retrofit.errors import BadInput
from retrofit.holes import hole_faults
from retrofit.layout import (
    base_forms,
    check_sizes,
    compare_head,
    compare_trunk,
    head_entries,
    head_tensors,
    layer_of_head,
    spec_faults,
)
from retrofit.progress import Progress
from retrofit.reading import (
    CONFIG,
    Checkpoint,
    absent_faults,
    open_checkpoint,
    read_json,
    refuse,
    scan,
)

MANIFEST = "mtp_manifest.json"
# An FP8 block's scale is its absmax / 448. Exponent bytes read as numbers are 100 and more.
LARGEST_FP8_SCALE = 16.0
ELEMENTS_AT_ONCE = 1 << 22
# GPTQ moves weights away from the nearest code, so its weight error is above rounding's, but never
# by much; another expert's weights, or scales of half the size, are far above this.
LARGEST_ERROR_RATIO = 4.0


@dataclass(frozen=True)
class VerifyConfig:
    """Options of `verify`.

    deep: the original checkpoint; its shards with the head are enough.
    stock_vllm: also refuse what stock vLLM 0.32.0 does not load and this project's loader does.
    """

    path: Path
    deep: Path | None = None
    stock_vllm: bool = False


@dataclass
class Report:
    """What was found."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(config: VerifyConfig) -> int:
    """Print every fault; 1 when there is one."""
    source = None
    if config.deep is not None:
        source = open_checkpoint(config.deep, partial=True)
        check_sizes(source.config, config.deep / CONFIG)
        refuse(config.deep, compare_head(source.config, source.entries, Layout.ORIGINAL))
    report = check(scan(config.path), source, config.stock_vllm)
    for note in report.notes:
        print(note)
    for fault in report.faults:
        print(f"fault: {fault}")
    verdict = f"{len(report.faults)} faults" if report.faults else "sound"
    print(f"{config.path}: {verdict}")
    return 1 if report.faults else 0


def check(
    checkpoint: Checkpoint, source: Checkpoint | None = None, stock_vllm: bool = False
) -> Report:
    """All checks; see the module."""
    report = Report(faults=[*checkpoint.faults, *absent_faults(checkpoint)])
    config, entries = checkpoint.config, checkpoint.entries
    try:
        check_sizes(config)
    except BadInput as error:
        report.faults.append(str(error))
        return report
    names = compare_head(config, entries, Layout.W4A16)
    if not head_entries(entries) and not _strays(checkpoint):
        names = ["no tensor is named mtp.0.*: the head is absent"]
    report.faults += names + compare_trunk(config, entries)
    faults = matching.config_faults(config)
    report.faults += faults
    if not faults:
        if why := matching.why_vllm_is_not_asked():
            report.notes.append(f"target matching: skipped: {why}")
        report.faults += matching.vllm_faults(config) or []
    compressor = _fp8_compressor(checkpoint)
    if compressor and stock_vllm:
        report.faults += [f"{name}: stock vLLM builds this module in BF16" for name in compressor]
    elif compressor:
        report.notes.append(
            f"{len(compressor)} compressor and indexer weights are FP8: this project's loader "
            "dequantizes them, stock vLLM 0.32.0 does not load them"
        )
    report.faults += value_faults(checkpoint)
    if not names:
        report.notes.append(f"MTP head: {len(head_tensors(config, Layout.W4A16)):,} tensors")
        if source is not None:
            deep = deep_check(checkpoint, source)
            report.faults += deep.faults
            report.notes += deep.notes
    return report


def _strays(checkpoint: Checkpoint) -> bool:
    number = layer_of_head(checkpoint.config)
    prefixes = (f"layers.{number}.", f"model.layers.{number}.")
    return any(name.startswith(prefixes) for name in checkpoint.entries)


def _fp8_compressor(checkpoint: Checkpoint) -> list[str]:
    return [
        name
        for name in sorted(checkpoint.entries)
        if name.endswith(".weight_scale") and is_compressor(name.removesuffix(".weight_scale"))
    ]


def value_faults(checkpoint: Checkpoint) -> list[str]:
    """Values that no head and no trunk has, of all tensors but the trunk's packed words.

    Of these only what was never written is seen. One tensor at a time is in memory, in the order
    of the files.
    """
    weights = _stored(checkpoint)
    names = sorted(weights, key=lambda n: (checkpoint.entries[n].path, checkpoint.entries[n].start))
    progress = Progress("read values", len(names))
    faults = hole_faults(checkpoint.entries.values())
    for name in names:
        faults += _tensor_faults(name, checkpoint.tensor(name), weights[name], checkpoint.config)
        progress.step()
    return faults


def _stored(checkpoint: Checkpoint) -> dict[str, Weight]:
    """Tensors of a right dtype and shape whose values are looked at, and what they are of."""
    config, entries = checkpoint.config, checkpoint.entries
    found = {}
    for weight in head_weights(config):
        found |= {spec: weight for spec in tensors(weight, Layout.W4A16)}
    for weight in trunk_weights(config):
        forms = base_forms(config, weight)
        # The trunk's experts are nine tenths of the bytes.
        found |= {s: weight for f in forms for s in f if not s.name.endswith("weight_packed")}
    return {
        spec.name: weight
        for spec, weight in found.items()
        if spec.name in entries and not spec_faults(spec, entries[spec.name])
    }


def _tensor_faults(
    name: str, tensor: torch.Tensor, weight: Weight, config: Mapping[str, Any]
) -> list[str]:
    if name.endswith("weight_shape"):
        if tensor.tolist() == list(weight.shape):
            return []
        return [f"{name}: {tensor.tolist()}; must be {list(weight.shape)}"]
    least, most = _range(tensor)
    if weight.kind == Kind.I64:
        last = config["n_routed_experts"] - 1
        if least >= 0 and most <= last:
            return []
        return [f"{name}: expert ids in [{least:g}, {most:g}]; must be in [0, {last}]"]
    if not (math.isfinite(least) and math.isfinite(most)):
        return [f"{name}: holds NaN or infinity"]
    if name.endswith("weight_scale"):
        return _scale_faults(name, tensor.float(), least, weight.kind)
    if name.endswith("weight_packed"):
        return [f"{name}: all words are {least:g}"] if least == most else []
    # FP32 tensors are biases and mixers, some of which may be zero.
    if least == most == 0 and weight.kind != Kind.F32:
        return [f"{name}: all values are 0"]
    return []


def _range(tensor: torch.Tensor) -> tuple[float, float]:
    """The least and the largest value, of E4M3 the largest magnitude; NaN where there is one."""
    parts = []
    for part in tensor.flatten().split(ELEMENTS_AT_ONCE):
        if part.dtype == torch.float8_e4m3fn:
            # The bits below the sign are in the order of the magnitudes, NaN after the last.
            # A conversion to float32 takes six times as long.
            top = (part.view(torch.uint8) & 0x7F).amax()
            most = top.view(torch.float8_e4m3fn).double()
            parts.append(torch.stack((-most, most)))
        else:
            wide = part.float() if part.dtype == torch.float8_e8m0fnu else part
            parts.append(torch.stack(torch.aminmax(wide)).double())
    found = torch.stack(parts)
    return float(found[:, 0].min()), float(found[:, 1].max())


def _scale_faults(name: str, values: torch.Tensor, least: float, kind: Kind) -> list[str]:
    if least <= 0:
        return [f"{name}: a scale is {least:g}; scales are positive"]
    if kind != Kind.EXPERT and values.median() > LARGEST_FP8_SCALE:
        return [f"{name}: the median scale is {values.median():g}: exponents, copied as numbers"]
    return []


def deep_check(checkpoint: Checkpoint, source: Checkpoint) -> Report:
    """The head's bytes and errors against the original."""
    report = Report()
    weights = list(head_weights(checkpoint.config))
    progress = Progress("deep", len(weights))
    ratios = []
    for weight in weights:
        if weight.kind == Kind.EXPERT:
            ratio = expert_ratio(checkpoint, source, weight)
            ratios.append(ratio)
            if not ratio <= LARGEST_ERROR_RATIO:
                report.faults.append(
                    f"{weight.stem}: its values differ from the original's by {ratio:.3g} times "
                    f"the error of rounding; at most {LARGEST_ERROR_RATIO:g}"
                )
        else:
            report.faults += _bytes_faults(checkpoint, source, weight)
        progress.step()
    report.notes.append(
        f"weight error against rounding to nearest: median {statistics.median(ratios):.3f}, "
        f"largest {max(ratios):.3f} over {len(ratios)} tensors"
    )
    report.faults += _manifest_faults(checkpoint.folder / MANIFEST)
    return report


def expert_ratio(checkpoint: Checkpoint, source: Checkpoint, weight: Weight) -> float:
    """Squared weight error of the stored INT4 over that of rounding with absmax scales."""
    exact = pack.expert_values(source, weight)
    stored = dequantize_int4(
        *(checkpoint.tensor(spec.name) for spec in tensors(weight, Layout.W4A16))
    )
    scale = gptq.absmax_scale(exact)
    rounded = gptq.dequantize(gptq.round_to_nearest(exact, scale), scale)
    wrong = float((stored - exact).square().sum())
    nearest = float((rounded - exact).square().sum())
    if nearest == 0:
        return 0.0 if wrong == 0 else float("inf")
    return wrong / nearest


def _bytes_faults(checkpoint: Checkpoint, source: Checkpoint, weight: Weight) -> list[str]:
    original = [source.tensor(spec.name) for spec in tensors(weight, Layout.ORIGINAL)]
    stored = [checkpoint.tensor(spec.name) for spec in tensors(weight, Layout.W4A16)]
    names = [spec.name for spec in tensors(weight, Layout.W4A16)]
    if weight.kind == Kind.PROJECTION:
        original = [dequantize_fp8_block(*original, dtype=torch.bfloat16)]
    elif weight.kind == Kind.ATTENTION:
        original[1], stored[1] = original[1].float(), stored[1].float()
    return [
        f"{name}: differs from the original"
        for name, a, b in zip(names, original, stored, strict=True)
        if a.shape != b.shape or not torch.equal(_bits(a), _bits(b))
    ]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _manifest_faults(path: Path) -> list[str]:
    """Tensors that the manifest itself says are worse than rounding to nearest."""
    if not path.exists():
        return []
    try:
        records: Mapping = read_json(path).get("tensors", {})
        return [
            f"{path.name}: {name}: error {record['error']:g} is above {record['rtn_error']:g}, "
            "that of rounding to nearest"
            for name, record in records.items()
            if record["error"] is not None and record["error"] > record["rtn_error"]
        ]
    except (BadInput, AttributeError, KeyError, TypeError) as error:
        return [f"{path.name}: cannot be read: {error}"]
