"""What was loaded and which kernels were chosen for it: a log line, and a JSON file for others.

The file's path is in the environment variable `DSV4_LOAD_RECORD`; unset, no file is written. Rank 0
writes it after the target and again after the draft, under a temporary name and then renamed.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from kernels.loading import LoadReport

ENV = "DSV4_LOAD_RECORD"
SCHEMA_VERSION = 1


def record_path() -> Path | None:
    """The only reader of the variable.

    Raises:
        ValueError: the folder does not exist.
    """
    value = os.environ.get(ENV)
    if not value:
        return None
    path = Path(value)
    if not path.parent.is_dir():
        raise ValueError(f"{ENV} = {value!r}; its folder does not exist")
    return path


def module_schemes(model: nn.Module) -> list[dict[str, Any]]:
    """How each kind of quantizable module is stored and computed.

    Returns:
        one entry for each (module without its layer number, scheme, kernel), with their `count`.
    """
    counts: Counter[tuple[str, str, str]] = Counter()
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        scheme = getattr(module, "scheme", None)
        kernel = getattr(scheme, "fp8_linear", None) or getattr(method, "fp8_linear", None)
        experts = getattr(method, "experts_cls", None)
        counts[
            re.sub(r"\blayers\.\d+\.(mtp_block\.)?", "layers.*.", name),
            type(scheme or method).__name__,
            experts.__name__ if experts else type(kernel).__name__ if kernel else "",
        ] += 1
    return [
        {"module": module, "scheme": scheme, "kernel": kernel, "count": count}
        for (module, scheme, kernel), count in counts.items()
    ]


def attention_classes(model: nn.Module) -> dict[str, int]:
    """Class of the attention module of each decoder layer, counted."""
    return dict(
        Counter(
            type(module).__name__
            for name, module in model.named_modules()
            if re.fullmatch(r".*\blayers\.\d+\.(mtp_block\.)?attn", name)
        )
    )


def all_reduce_paths(group: Any) -> list[str]:
    """Ways in which the tensor-parallel group can reduce, in no order; one rank has none."""
    if group.world_size == 1:
        return []
    communicator = group.device_communicator
    paths = [type(communicator).__name__]
    for name, value in vars(communicator).items():
        if name.endswith("_comm") and value is not None and not getattr(value, "disabled", False):
            tier = getattr(value, "tier", None)  # of our own
            paths.append(type(value).__name__ + (f" ({tier})" if tier else ""))
    return paths


def describe(model: nn.Module, report: LoadReport, group: Any) -> dict[str, Any]:
    """The record of one loaded model."""
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "num_parameters": len(report.parameters),
        "num_tensors": report.num_tensors,
        "dequantized": sorted(report.dequantized),
        "attention": attention_classes(model),
        "modules": module_schemes(model),
        "all_reduce": all_reduce_paths(group),
        "tensor_parallel_size": group.world_size,
    }


def summary(part: str, entry: dict[str, Any]) -> str:
    """One line for the log."""
    schemes = Counter()
    for module in entry["modules"]:
        kernel = f" ({module['kernel']})" if module["kernel"] else ""
        schemes[module["scheme"] + kernel] += module["count"]
    text = (
        f"{part} loaded: {entry['num_parameters']} params from {entry['num_tensors']} tensors, "
        f"none missing; attention {', '.join(entry['attention'])}; "
        + ", ".join(f"{count} {scheme}" for scheme, count in sorted(schemes.items()))
        + f"; all-reduce {', '.join(entry['all_reduce']) or 'none'}"
    )
    if entry["dequantized"]:
        text += f"; {len(entry['dequantized'])} FP8 weights dequantized to BF16"
    return text


class LoadRecord:
    """The record of this process, grown by each model that is loaded."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}

    def add(self, key: str, entry: dict[str, Any], write: bool) -> None:
        """Keep one entry; write the file if it is asked for and this rank is the one to do so."""
        self.entries[key] = entry
        path = record_path()
        if path is None or not write:
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        body = {"schema_version": SCHEMA_VERSION, **self.entries}
        temporary.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)


RECORD = LoadRecord()
