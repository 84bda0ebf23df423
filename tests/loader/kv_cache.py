"""vLLM's own KV cache groups for DeepSeek-V4's NVIDIA classes, without a GPU.

    python -m tests.loader.kv_cache RESULT.json

For each case: bytes of a block, and blocks that one request can hold at most.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.loader import fake_cuda

# (layers, draft, window, max_num_batched_tokens)
CASES = [(43, True, 524288, 8192), (43, False, 131072, 4096), (43, True, 4096, 8192),
         (5, True, 131072, 2048), (2, False, 8192, 2048)]  # fmt: skip


def measure(layers: int, draft: bool, window: int, batched_tokens: int) -> dict[str, int]:
    from scripts.make_full_size import FullSizeConfig, model_config
    from serve.shapes import flash_config
    from tests.loader import engine
    from tests.loader.scenarios import SMALL

    body = model_config(FullSizeConfig(layers), flash_config() | SMALL)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(body))
        config, models = engine.make_configs(Path(folder))
    config.scheduler_config.max_num_batched_tokens = batched_tokens
    config.model_config.max_model_len = window
    specs: dict[str, Any] = {}
    for part in ("target", "draft") if draft else ("target",):
        engine.construct(config, models[part])
        for name, layer in config.compilation_config.static_forward_context.items():
            spec = layer.get_kv_cache_spec(config) if hasattr(layer, "get_kv_cache_spec") else None
            if spec is not None:
                specs[name] = spec
    return group(config, specs)


def group(config: Any, specs: dict[str, Any]) -> dict[str, int]:
    from vllm.v1.core import kv_cache_utils

    config.cache_config.kv_cache_layout = "BLHNC"  # what DeepSeek-V4's indexer asks for
    groups = kv_cache_utils.get_kv_cache_groups(config, specs)
    block_bytes = kv_cache_utils._pool_bytes_per_block(config, groups)
    most = kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)
    return {
        "block_bytes": block_bytes,
        "request_blocks": most // block_bytes,
        "in_flight_tokens": config.max_in_flight_tokens,
    }


def main(result: str) -> None:
    """Entry point."""
    fake_cuda.install()
    logging.disable(logging.WARNING)
    Path(result).write_text(json.dumps([measure(*case) for case in CASES]))


if __name__ == "__main__":
    main(sys.argv[1])
