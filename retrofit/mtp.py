"""`mtp`: the base plus an MTP head that matches its format.

check all inputs -> link the base's files -> quantize the experts, step by step -> write the head's
shard -> index, config, manifest -> verify -> rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from kernels.weights import (
    EXPERT_DTYPE,
    HEAD_PREFIX,
    Kind,
    Layout,
    Weight,
    expert_shapes,
    head_weights,
)
from retrofit import experts, matching, pack, verify
from retrofit.calibration import META, Calibration
from retrofit.errors import BadInput
from retrofit.experts import PROJECTIONS, Expert, Quantized, Sample, Scale, Settings
from retrofit.holes import hole_faults
from retrofit.layout import (
    SIZES,
    check_sizes,
    compare_head,
    compare_trunk,
    head_entries,
    head_tensors,
    layer_of_head,
)
from retrofit.progress import Progress
from retrofit.reading import (
    CONFIG,
    INDEX,
    Checkpoint,
    check_small_files,
    headers_sha256,
    open_checkpoint,
    read_header,
    read_json,
    read_tensor,
    refuse,
    scan,
)
from retrofit.writing import LOCK, STATE, Partial, ShardWriter, write_json, write_tensors

SHARD = "model-mtp-w4a16.safetensors"
MANIFEST = verify.MANIFEST
SCHEMA_VERSION = 1
PARTS = "parts"  # results of single steps, inside the partial folder
# What Transformers writes from the original's keys in its own terms. vLLM has other terms for them.
DERIVED = ("compress_rates", "layer_types", "mlp_layer_types", "partial_rotary_factor",
           "rope_parameters")  # fmt: skip
# Numbers besides the sizes that quantization does not change.
FIXED = ("compress_rope_theta", "hc_eps", "hc_sinkhorn_iters", "index_topk", "num_key_value_heads",
         "qk_rope_head_dim", "rms_norm_eps", "rope_theta", "routed_scaling_factor",
         "sliding_window", "swiglu_limit")  # fmt: skip
SAMPLE_FACTOR = 2  # rows over all tokens, in units of hidden_size


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


class Files(StrEnum):
    """How the base's weight files come into the result. None of them is ever written to."""

    HARD = "hard"
    SYMBOLIC = "symbolic"
    COPY = "copy"


@dataclass(frozen=True)
class MtpConfig:
    """Options of `mtp`.

    calibration: the folder that `capture` wrote; None rounds to nearest without data.
    experts_per_step: experts in memory at once; more keep a GPU busier.
    allow_uncalibrated: experts without a row are rounded to nearest instead of refused.
    """

    source: Path
    base: Path
    dst: Path
    calibration: Path | None = None
    device: Device = Device.CPU
    scale: Scale = Scale.MSE
    percdamp: float = 0.01
    activation_order: bool = True
    route_weight_in_h2: bool = True
    experts_per_step: int | None = None
    files: Files = Files.HARD
    allow_uncalibrated: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("device", Device), ("scale", Scale), ("files", Files)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        if self.experts_per_step is None:
            steps = 4 if self.device == Device.CUDA else 1
            object.__setattr__(self, "experts_per_step", steps)
        if self.experts_per_step < 1:
            raise BadInput(f"experts_per_step = {self.experts_per_step}; must be positive")
        if self.device == Device.CUDA and not torch.cuda.is_available():
            raise BadInput("device = cuda: torch finds no CUDA device; use cpu")

    def settings(self, model: dict[str, Any]) -> Settings:
        """What the choice of each tensor depends on."""
        limit = model.get("swiglu_limit")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float)):
            raise BadInput(f"config.json: swiglu_limit = {limit!r}; a number is needed")
        try:
            return Settings(
                swiglu_limit=limit,
                percdamp=self.percdamp,
                scale=self.scale,
                activation_order=self.activation_order,
                route_weight_in_h2=self.route_weight_in_h2,
                solve_batch=16 if self.device == Device.CUDA else 1,
            )
        except ValueError as error:
            raise BadInput(str(error)) from error


def run(config: MtpConfig) -> int:
    """See the module."""
    source = open_checkpoint(config.source, partial=True)
    base = open_checkpoint(config.base)
    model = merged_config(source, base)
    check_source(source)
    check_base(base, model)
    check_small_files(base.folder)
    settings = config.settings(model)
    calibration = read_calibration(config, model)
    identity = run_identity(config, settings, source, base)
    # `verify` reads the base's values too, but only when all experts are quantized.
    refuse(base.folder, verify.value_faults(replace(base, config=model)))
    inputs = [path for path in (config.source, config.base, config.calibration) if path]
    files = {"source": head_shards(source), "base": base.shards()}
    if calibration:
        files["calibration"] = calibration.files()
    with Partial(config.dst, inputs, identity, files, PARTS) as partial:
        if not partial.whole:
            link_files(base.folder, partial.folder, config.files)
            parts = quantize(config, settings, model, source, calibration, partial.folder)
            write_head(source, model, parts, partial.folder)
            write_index(base, model, partial.folder)
            write_json(partial.folder / CONFIG, model)
            write_json(partial.folder / MANIFEST, manifest(identity, calibration, parts))
            refuse(config.dst, verify.check(scan(partial.folder)).faults)
        partial.finish()
    print(f"{config.dst}: written; {len(head_tensors(model, Layout.W4A16)):,} tensors in {SHARD}")
    return 0


def merged_config(source: Checkpoint, base: Checkpoint) -> dict[str, Any]:
    """The base's config.json, with what quantization lost from it restored from the original.

    Raises:
        BadInput: the two are different models, or either is none that is known here.
    """
    check_sizes(source.config, source.folder / CONFIG)
    # Bases name what they were made from: fp4, or bf16 after Transformers.
    merged = {**base.config, "expert_dtype": EXPERT_DTYPE}
    for key in DERIVED:
        if key not in source.config:
            merged.pop(key, None)
    for key, theirs in source.config.items():
        if key == "quantization_config":
            continue
        ours = merged.get(key)
        if key == "compress_ratios" and isinstance(ours, list):
            layers = source.config["num_hidden_layers"]
            if ours[:layers] == theirs[:layers] and len(ours) <= len(theirs):
                ours = None
        if key == "num_nextn_predict_layers" and ours == 0:
            ours = None
        if ours is None:
            merged[key] = theirs
        elif ours != theirs and (key in SIZES or (key in FIXED and _is_number(ours))):
            raise BadInput(
                f"{base.folder}: {key} = {ours!r}, and {theirs!r} in {source.folder}; the base "
                "must be a quantization of the original"
            )
    check_sizes(merged, base.folder / CONFIG)
    return merged


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_source(source: Checkpoint) -> None:
    """Whether the original's head is whole and its values are numbers.

    Raises:
        BadInput: the first fault.
    """
    refuse(source.folder, compare_head(source.config, source.entries, Layout.ORIGINAL))
    refuse(source.folder, hole_faults(head_entries(source.entries).values()))
    for weight in head_weights(source.config):
        pack.stored(source, weight)


def check_base(base: Checkpoint, model: dict[str, Any]) -> None:
    """Whether the base is a complete W4A16-FP8 trunk without a head, and its config can have one.

    Raises:
        BadInput: the first fault.
    """
    if found := head_entries(base.entries):
        raise BadInput(
            f"{base.folder}: has a head already: {len(found)} tensors such as {min(found)}; give "
            "the base without one"
        )
    refuse(base.folder, compare_trunk(model, base.entries) + matching.config_faults(model))
    # `verify` asks vLLM too, but only when all experts are quantized.
    refuse(base.folder, matching.vllm_faults(model) or [])
    if (base.folder / SHARD).exists():
        raise BadInput(f"{base.folder}: has a file {SHARD}")


def read_calibration(config: MtpConfig, model: dict[str, Any]) -> Calibration | None:
    """The rows, checked to the last value.

    Raises:
        BadInput: they are not of this model, not numbers, or an expert has none.
    """
    if config.calibration is None:
        return None
    calibration = Calibration(
        config.calibration,
        model["hidden_size"],
        model["n_routed_experts"],
        model["num_experts_per_tok"],
    )
    layers, number = calibration.meta.get("layers"), layer_of_head(model)
    if isinstance(layers, list) and number not in layers:
        raise BadInput(
            f"{config.calibration}: rows of layers {layers}; the MTP head is layer {number}"
        )
    calibration.check_finite()
    empty = [expert for expert, count in enumerate(calibration.counts) if count == 0]
    if empty and not config.allow_uncalibrated:
        raise BadInput(
            f"{config.calibration}: no rows for {len(empty)} experts, the first is {empty[0]}; "
            "capture more prompts, or pass --allow-uncalibrated to round these to nearest"
        )
    return calibration


def head_shards(source: Checkpoint) -> list[Path]:
    """Shards that hold the head: others of the original may come and go."""
    return sorted({entry.path for entry in head_entries(source.entries).values()})


def run_identity(
    config: MtpConfig, settings: Settings, source: Checkpoint, base: Checkpoint
) -> dict[str, Any]:
    """What the bytes of the result depend on."""
    identity: dict[str, Any] = {
        "command": "mtp",
        "source_headers_sha256": headers_sha256(source, head_shards(source)),
        "base_headers_sha256": headers_sha256(base),
        "calibration": read_json(config.calibration / META) if config.calibration else None,
        "device": config.device.value,
        "torch": torch.__version__,
        "experts_per_step": config.experts_per_step,
        "files": config.files.value,
        "settings": asdict(settings),
    }
    return json.loads(json.dumps(identity))


def link_files(base: Path, folder: Path, files: Files) -> None:
    """The base's weights by link or copy where they are not there yet, its small files by copy.

    Raises:
        BadInput: a hard link is not possible here.
    """
    for path in sorted(base.iterdir()):
        target, small = folder / path.name, path.suffix != ".safetensors"
        if not path.is_file() or path.name in (INDEX, CONFIG, MANIFEST, STATE, LOCK):
            continue
        if target.exists() and not small:
            continue
        if small or files == Files.COPY:
            temporary = target.with_name(f".{target.name}.part")
            shutil.copyfile(path, temporary)
            temporary.replace(target)
        elif files == Files.SYMBOLIC:
            target.symlink_to(path.resolve())
        else:
            try:
                os.link(path.resolve(), target)
            except OSError as error:
                raise BadInput(
                    f"{target}: no hard link to {path}: {error.strerror}; pass --files copy or "
                    "--files symbolic"
                ) from error


def quantize(
    config: MtpConfig,
    settings: Settings,
    model: dict[str, Any],
    source: Checkpoint,
    calibration: Calibration | None,
    folder: Path,
) -> list[Path]:
    """Quantize experts_per_step experts at a time; each step leaves one file of its results."""
    total = model["n_routed_experts"]
    steps = [
        range(first, min(first + config.experts_per_step, total))
        for first in range(0, total, config.experts_per_step)
    ]
    parts = [folder / PARTS / f"experts-{step.start:05d}.safetensors" for step in steps]
    (folder / PARTS).mkdir(exist_ok=True)
    there = [is_whole(part) for part in parts]
    done = sum(len(step) for step, whole in zip(steps, there, strict=True) if whole)
    progress = Progress("quantize experts", total, done)
    if done == total:
        return parts
    rows = torch.empty(0, model["hidden_size"], dtype=torch.bfloat16)
    if calibration is not None:
        rows = calibration.sample(SAMPLE_FACTOR * model["hidden_size"])
    sample = Sample(rows.to(config.device))
    with torch.inference_mode():
        for step, part, whole in zip(steps, parts, there, strict=True):
            if whole:
                continue
            batch = [read_expert(config, model, source, calibration, e) for e in step]
            try:
                results = experts.quantize_experts(batch, sample, settings)
            except ValueError as error:
                raise BadInput(f"{config.calibration}: {error}") from error
            write_part(part, step, results)
            if config.device == Device.CUDA:
                torch.cuda.empty_cache()  # steps differ in size: what is cached does not fit again
            progress.step(len(step))
    return parts


def is_whole(part: Path) -> bool:
    """Whether a step's two files are there and can be read: a power cut may leave empty ones."""
    try:
        read_json(part.with_suffix(".json"))
        read_header(part)
    except BadInput:
        return False
    return True


def read_expert(
    config: MtpConfig,
    model: dict[str, Any],
    source: Checkpoint,
    calibration: Calibration | None,
    number: int,
) -> Expert:
    """One expert's weights and rows, on the device."""
    device = config.device.value
    weights = {
        name: pack.expert_values(
            source, Weight(f"{HEAD_PREFIX}ffn.experts.{number}.{name}", Kind.EXPERT, shape)
        ).to(device)
        for name, shape in expert_shapes(model).items()
    }
    if calibration is None:
        empty = torch.empty(0, model["hidden_size"], dtype=torch.bfloat16, device=device)
        return Expert(number, weights, empty, torch.empty(0, device=device))
    rows, route = calibration.rows_of(number)
    return Expert(number, weights, rows.to(device), route.to(device))


def write_part(part: Path, step: range, results: list[dict[str, Quantized]]) -> None:
    """Packed tensors and records of one step."""
    stored: dict[str, torch.Tensor] = {}
    records: dict[str, Any] = {}
    for number, result in zip(step, results, strict=True):
        for name in PROJECTIONS:
            stem = f"{HEAD_PREFIX}ffn.experts.{number}.{name}"
            found = result[name]
            stored |= pack.expert_tensors(stem, found.codes.cpu(), found.scale.cpu())
            records[stem] = asdict(found.choice)
    write_json(part.with_suffix(".json"), records)
    write_tensors(part, stored)


def write_head(source: Checkpoint, model: dict[str, Any], parts: list[Path], folder: Path) -> None:
    """The head's shard: experts from the parts, the rest from the original."""
    specs = {n: (s.dtypes[0], s.shape) for n, s in head_tensors(model, Layout.W4A16).items()}
    with ShardWriter(folder / SHARD, specs) as writer:
        for part in parts:
            for name, entry in read_header(part).items():
                writer.write(name, read_tensor(entry))
        for weight in head_weights(model):
            if weight.kind != Kind.EXPERT:
                for name, tensor in pack.convert(source, weight, Scale.MSE).items():
                    writer.write(name, tensor)


def write_index(base: Checkpoint, model: dict[str, Any], folder: Path) -> None:
    """The base's index with the head's shard added."""
    weight_map = {name: entry.path.name for name, entry in base.entries.items()}
    weight_map |= dict.fromkeys(head_tensors(model, Layout.W4A16), SHARD)
    size = sum(entry.num_bytes for entry in base.entries.values())
    size += sum(entry.num_bytes for entry in read_header(folder / SHARD).values())
    write_json(
        folder / INDEX,
        {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))},
    )


def manifest(
    identity: dict[str, Any], calibration: Calibration | None, parts: list[Path]
) -> dict[str, Any]:
    """What was done to each tensor, and from what. No times: the same run gives the same bytes."""
    records: dict[str, Any] = {}
    for part in parts:
        records |= read_json(part.with_suffix(".json"))
    return {
        "schema_version": SCHEMA_VERSION,
        **{key: value for key, value in identity.items() if key != "command"},
        "w2_inputs": "from the quantized w1 and w3, with the model's clamp",
        "attention": "FP8 bytes of the original, scale as float32 weight_scale",
        "experts_with_few_rows": list(experts_with_few_rows(calibration, identity)),
        "tensors": records,
    }


def experts_with_few_rows(
    calibration: Calibration | None, identity: dict[str, Any]
) -> Iterator[int]:
    """Experts below `min_rows`, which got no GPTQ."""
    if calibration is not None:
        for expert, count in enumerate(calibration.counts):
            if count < identity["settings"]["min_rows"]:
                yield expert
