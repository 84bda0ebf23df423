"""What vLLM's NVIDIA classes do with each scenario's checkpoint, without a GPU.

    python -m tests.loader.harness RESULT.json [--capability 9.0] [--stock] [--only "B FP8"]

--stock leaves our classes out and shows what vLLM does by itself. For each model of a scenario the
result has `outcome`: "complete", "SILENT" (loaded without an error, but `unset` parameters hold
uninitialised memory), or the exception's name with its `message`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.loader import fake_cuda


def attempt(config: Any, model_config: Any) -> dict[str, Any]:
    from kernels.load_record import attention_classes, module_schemes
    from tests.loader import engine

    try:
        model = engine.construct(config, model_config)
        engine.mark(model)
        loaded = engine.load(model, model_config)
    except Exception as error:  # noqa: BLE001 - whatever the engine raises is the outcome
        return {"outcome": type(error).__name__, "message": str(error)}
    unset = engine.still_marked(model)
    scales = {
        name: parameter.flatten()[0].item()
        for name, parameter in model.named_parameters()
        if name.endswith("mtp_block.attn.wq_b.weight_scale")
    }
    return {
        "outcome": "SILENT" if unset else "complete",
        "unset": unset,
        "num_loaded": len(loaded),
        "num_parameters": len(dict(model.named_parameters())),
        "scale": next(iter(scales.values()), None),
        "modules": module_schemes(model),
        "attention": attention_classes(model),
    }


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="harness", description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--capability", default="12.0")
    parser.add_argument("--only", help="scenarios whose name has this text")
    parser.add_argument("--stock", action="store_true", help="vLLM's own classes")
    args = parser.parse_args(argv)
    major, _, minor = args.capability.partition(".")
    fake_cuda.install((int(major), int(minor)))
    logging.disable(logging.WARNING)

    from tests.loader import engine
    from tests.loader.scenarios import SCENARIOS, write

    if not args.stock:
        from kernels.plugin import register

        register()
    results = {}
    for name, scenario in SCENARIOS.items():
        if args.only and args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), scenario)
            config, models = engine.make_configs(Path(folder))
            results[name] = {part: attempt(config, models[part]) for part in scenario.parts}
        for part, result in results[name].items():
            print(f"{name} | {part} | {result['outcome']} | {result.get('message', '')[:150]}")
    args.result.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
