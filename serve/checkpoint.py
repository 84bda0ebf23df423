"""Preflight of a checkpoint: config, index and safetensors headers. No tensor data is read."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from serve.errors import CheckpointError

MODEL_TYPES = ("deepseek_v4",)
INDEX_NAME = "model.safetensors.index.json"
MTP_PREFIX = "mtp.0."
HEADER_LEN_BYTES = 8


def check_checkpoint(folder: Path, num_speculative_tokens: int) -> None:
    """Refuse a checkpoint that vLLM would refuse late, or load in part without a word.

    Raises:
        CheckpointError: the folder or its config is missing or unusable; the index and the shards
            on disk differ; a shard is truncated; a tensor is not where the index says; there is
            no MTP tensor although speculation is asked for.
    """
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder}: no such folder")
    check_config(folder / "config.json")
    tensors = read_tensors(folder)
    if num_speculative_tokens and not any(name.startswith(MTP_PREFIX) for name in tensors):
        raise CheckpointError(
            f"checkpoint {folder}: num_speculative_tokens = {num_speculative_tokens}, and no "
            f"tensor is named {MTP_PREFIX}*; restore the MTP head or ask for 0"
        )


def check_config(path: Path) -> None:
    """Check that config.json parses and names a model type that is served here."""
    config = read_json(path)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"checkpoint config {path}: model_type = {model_type!r}; "
            f"must be one of {', '.join(MODEL_TYPES)}"
        )


def read_tensors(folder: Path) -> dict[str, str]:
    """Return tensor name -> shard name, from the shards' own headers, checked with the index."""
    shards = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    if not shards:
        raise CheckpointError(f"checkpoint {folder}: no *.safetensors file")
    headers = {name: read_header(path) for name, path in shards.items()}
    index_path = folder / INDEX_NAME
    if index_path.exists():
        check_index(index_path, headers)
    elif len(shards) > 1:
        raise CheckpointError(f"checkpoint {folder}: {len(shards)} shards and no {INDEX_NAME}")
    return {tensor: shard for shard, names in headers.items() for tensor in names}


def check_index(path: Path, headers: Mapping[str, set[str]]) -> None:
    """Check the index against the tensors that each shard's header lists."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"checkpoint index {path}: no weight_map")
    listed = set(weight_map.values())
    if missing := sorted(listed - headers.keys()):
        raise CheckpointError(f"checkpoint index {path}: lists {missing[0]}, which does not exist")
    if extra := sorted(headers.keys() - listed):
        raise CheckpointError(
            f"checkpoint index {path}: does not list {extra[0]}; vLLM would drop the file silently"
        )
    for tensor, shard in sorted(weight_map.items()):
        if tensor not in headers[shard]:
            raise CheckpointError(f"checkpoint index {path}: {tensor} is not in {shard}")


def read_header(path: Path) -> set[str]:
    """Return the tensor names in a safetensors file whose size agrees with its header."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(HEADER_LEN_BYTES)
        if len(prefix) < HEADER_LEN_BYTES:
            raise CheckpointError(f"checkpoint shard {path}: truncated: {size_bytes} bytes")
        (header_len,) = struct.unpack("<Q", prefix)
        data_bytes = size_bytes - HEADER_LEN_BYTES - header_len
        if data_bytes < 0:
            raise CheckpointError(
                f"checkpoint shard {path}: truncated: a header of {header_len} bytes in a file "
                f"of {size_bytes}"
            )
        try:
            header = json.loads(file.read(header_len))
            header.pop("__metadata__", None)
            end_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint shard {path}: its header is not safetensors JSON"
            ) from error
    if end_bytes != data_bytes:
        what = "truncated" if end_bytes > data_bytes else "too long"
        raise CheckpointError(
            f"checkpoint shard {path}: {what}: the header describes {end_bytes} bytes of tensor "
            f"data, the file holds {data_bytes}"
        )
    return set(header)


def read_json(path: Path) -> dict:
    """Return the object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path.parent}: {path.name} is missing") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"checkpoint {path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint {path}: not a JSON object")
    return value
