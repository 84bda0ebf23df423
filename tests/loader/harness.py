"""What vLLM's NVIDIA classes do with each scenario's checkpoint, without a GPU.

    python -m tests.loader.harness RESULT.json [--capability 9.0] [--stock] [--only "B FP8"]

--stock leaves our classes out and shows what vLLM does by itself. Our experts are considered as on
a GPU: they need a dispatch table (DSV4_DISPATCH_TABLE) and a library (DSV4_KERNELS_DIR). With
--moe-backend each scenario runs once for each name; other names than "auto" are added to its own.
For each model of a scenario the result has `outcome`: "complete", "SILENT" (loaded without an
error, but `unset` parameters hold uninitialised memory), or the exception's name with a `message`.
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


def attempt(config: Any, model_config: Any, rank: Any, saved: Path | None) -> dict[str, Any]:
    """Load one model; a complete one is kept under `saved`, our experts laid out."""
    import torch

    from kernels.load_record import RECORD, attention_classes, module_schemes
    from tests.loader import engine

    RECORD.entries.clear()
    try:
        model = engine.construct(config, model_config, rank)
        engine.mark(model)
        loaded = engine.load(model, model_config)
        unset = engine.still_marked(model)
        engine.process_experts(model)
    except Exception as error:  # noqa: BLE001 - whatever the engine raises is the outcome
        return {"outcome": type(error).__name__, "message": str(error)}
    if saved is not None:
        saved.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: p.data.clone() for name, p in model.named_parameters()}, saved)
    scales = {
        name: parameter.flatten()[0].item()
        for name, parameter in model.named_parameters()
        if name.endswith("mtp_block.attn.wq_b.weight_scale")
    }
    return {
        "outcome": "SILENT" if unset else "complete",
        "unset": unset,
        "num_loaded": len(loaded),
        "num_tensors": sum(entry["num_tensors"] for entry in RECORD.entries.values()),
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
    parser.add_argument("--only", nargs="*", help="scenarios whose name has one of these texts")
    parser.add_argument("--stock", action="store_true", help="vLLM's own classes")
    parser.add_argument("--save", type=Path, help="folder for the parameters of complete loads")
    parser.add_argument("--rank", type=int, default=0, help="this process, of --world-size")
    parser.add_argument("--world-size", type=int, default=1, help="tensor-parallel processes")
    parser.add_argument("--rendezvous", type=Path, help="file that the ranks share")
    parser.add_argument("--expert-parallel", action="store_true")
    parser.add_argument("--moe-backend", nargs="+", default=["auto"], help="vLLM's, one by one")
    args = parser.parse_args(argv)
    major, _, minor = args.capability.partition(".")
    fake_cuda.install((int(major), int(minor)))
    logging.disable(logging.WARNING)

    from tests.loader import engine
    from tests.loader.scenarios import SCENARIOS, write

    if not args.stock:
        from kernels.plugin import register

        register()
    rank = engine.Rank(args.rank, args.world_size, args.rendezvous, args.expert_parallel)
    results = {}
    for name, scenario in SCENARIOS.items():
        if args.only and not any(text in name for text in args.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), scenario)
            for backend in args.moe_backend:
                key = name if backend == "auto" else f"{name}, {backend}"
                config, models = engine.make_configs(Path(folder), rank, backend)
                results[key] = {
                    part: attempt(
                        config, models[part], rank, args.save and args.save / key / f"{part}.pt"
                    )
                    for part in scenario.parts
                }
                for part, result in results[key].items():
                    message = result.get("message", "")[:150]
                    print(f"{key} | {part} | {result['outcome']} | {message}")
    args.result.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
