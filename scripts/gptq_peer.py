#!/usr/bin/env python3
"""Output error of our GPTQ beside llm-compressor's and rounding to nearest, same layer and rows.

    python scripts/gptq_peer.py --peer-python VENV/bin/python --out results/gptq-peer-DATE.json

VENV holds llmcompressor (from PyPI); it may be another environment than ours. The layers are w1
and w2 of one expert, the original's FP4 values: of the tiny model with rows captured from it, and
full-size with synthetic rows, once with many and once with few. Errors are squared and relative,
on the rows that were given and on fresh ones. Exit status 1 when ours is more than 1.01 x the
peer's on fresh rows, at the better of the peer's two dampings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PEER_DAMPINGS = (0.01, 0.1)  # llm-compressor's default, and what published recipes use
LARGEST_RATIO = 1.01
SWIGLU_LIMIT = 10.0
NUM_PROMPTS, MAX_TOKENS = 32, 4  # of the tiny model's capture


@dataclass(frozen=True)
class PeerConfig:
    """Which cases are run."""

    peer_python: Path
    checkpoint: Path
    hidden: int = 4096
    inter: int = 2048
    rows: int = 11_000
    few_rows: int = 430
    fresh_rows: int = 2_000
    seed: int = 0


# ------------------------------------------------------------- in the peer's interpreter


def peer_main(folder: Path) -> None:
    """Quantize every case in `folder` with llm-compressor's own modifier; write the values back."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.core import State
    from llmcompressor.modifiers.gptq import GPTQModifier

    for path in sorted(folder.glob("case-*.safetensors")):
        case = load_file(path)
        values = {}
        for damping in PEER_DAMPINGS:
            out_features, in_features = case["weight"].shape
            linear = torch.nn.Linear(in_features, out_features, bias=False)
            linear.weight.data.copy_(case["weight"])
            model = torch.nn.Sequential(linear)
            weights = QuantizationArgs(
                num_bits=4, type="int", strategy="group", group_size=128, symmetric=True,
                actorder="static",
            )  # fmt: skip
            scheme = QuantizationScheme(targets=["Linear"], weights=weights)
            modifier = GPTQModifier(config_groups={"group": scheme}, dampening_frac=damping)
            state = State(model=model)
            modifier.on_initialize(state)
            modifier.on_calibration_start(state, None)
            with torch.no_grad():
                for part in case["rows"].split(2048):
                    # One sample of many tokens at a time, as a dataset gives them.
                    model(part.float()[None])
            modifier.on_sequential_epoch_end(state, None, modules=[linear])
            values[str(damping)] = linear.weight.data.float().contiguous()
        save_file(values, folder / path.name.replace("case-", "peer-"))
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch")}
    (folder / "versions.json").write_text(json.dumps(versions))


# ----------------------------------------------------------------------------------- ours


def tiny_expert(checkpoint: Path):
    """The MTP expert of the tiny model with the most rows, and rows of its held-out prompts."""
    from retrofit.experts import Expert
    from tiny import data, generate, load, tokenizer

    model = load.load(checkpoint)
    moe = model.mtp[0].block.ffn
    captured: list[tuple[torch.Tensor, ...]] = []

    def capture(module: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        x, tokens = inputs
        flat = x.flatten(0, 1)
        captured.append((flat.bfloat16(), *module.gate(flat, tokens.flatten())))

    moe.register_forward_pre_hook(capture)
    words = tokenizer.load(checkpoint)
    prompts = data.read_prompts(ROOT / "tiny" / "heldout.jsonl", words)
    generate.acceptance(model, prompts[:NUM_PROMPTS], 1, MAX_TOKENS)
    rows, route, ids = (torch.cat(parts) for parts in zip(*captured, strict=True))
    number = int(ids.flatten().bincount().argmax())
    row, slot = (ids == number).nonzero(as_tuple=True)
    first = first_of_each(rows[row])  # without a cache every step computes the whole text again
    row, slot = row[first], slot[first]
    experts = moe.experts
    weights = {name: getattr(experts, name)[number].float() for name in ("w1", "w2", "w3")}
    given = len(row) * 4 // 5  # the fresh rows are of other texts
    x, r = rows[row], route[row, slot].float()
    return Expert(number, weights, x[:given], r[:given]), x[given:], r[given:]


def first_of_each(rows: torch.Tensor) -> torch.Tensor:
    """Positions of the rows that no earlier row equals."""
    seen: dict[bytes, int] = {}
    for i, row in enumerate(rows.view(torch.int16).numpy()):
        seen.setdefault(row.tobytes(), i)
    return torch.tensor(list(seen.values()))


def full_size_expert(config: PeerConfig, num_rows: int):
    """One synthetic expert (FP4 values, correlated rows with outlier channels), fresh rows with
    their route weights, and rows of other tokens for the blend: neither given nor fresh.
    """
    from gptq_full_size import BlockConfig, make_rows, make_weights

    from kernels.formats import dequantize_fp4
    from retrofit.experts import Expert

    ends = [num_rows, num_rows + config.fresh_rows]
    total = ends[1] + 2 * config.hidden
    block = BlockConfig(
        experts=2, run_experts=1, hidden=config.hidden, inter=config.inter, topk=1,
        rows=total, min_load=1, max_load=total,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(config.seed)
    weights = {n: dequantize_fp4(*t) for n, t in make_weights(block, generator)[0].items()}
    given, fresh, others = make_rows(block, generator).tensor_split(ends)
    route = torch.rand(ends[1], generator=generator) * 0.5
    expert = Expert(0, weights, given, route[:num_rows])
    return expert, fresh, route[num_rows:], others


def cases_of(name: str, expert, fresh, fresh_route, sample: torch.Tensor) -> list[dict]:
    """Run our policy on an expert; w1 and w2 with their inputs and what we made of them."""
    from retrofit import gptq
    from retrofit.experts import Sample, Settings, quantize_experts, swiglu

    settings = Settings(swiglu_limit=SWIGLU_LIMIT)
    done = quantize_experts([expert], Sample(sample), settings)[0]

    def inner(rows: torch.Tensor, route: torch.Tensor) -> torch.Tensor:
        gate, up = (gptq.product(rows, done[p].values()) for p in ("w1", "w3"))
        values = swiglu(gate, up, SWIGLU_LIMIT).bfloat16()
        return (values.float() * route[:, None]).bfloat16()

    inputs = {
        "w1": (expert.rows, fresh),
        "w2": (inner(expert.rows, expert.route), inner(fresh, fresh_route)),
    }
    cases = []
    for projection, (rows, new) in inputs.items():
        weight = expert.weights[projection]
        absmax = gptq.absmax_scale(weight)
        hessian = gptq.damped(gptq.hessian(rows), settings.percdamp)
        codes = gptq.quantize(weight[None], hessian[None], absmax[None])[0]
        cases.append(
            {
                "name": f"{name}, {projection}",
                "weight": weight,
                "rows": rows,
                "fresh": new,
                "choice": done[projection].choice,
                "values": {
                    "ours": done[projection].values(),
                    "ours, absmax scales, all rows": gptq.dequantize(codes, absmax),
                    "ours, absmax float32 scales, all rows": unrounded_scales(weight, hessian),
                    "rtn": gptq.dequantize(gptq.round_to_nearest(weight, absmax), absmax),
                },
            }
        )
    return cases


def unrounded_scales(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Our algorithm with exactly the peer's scales, which it keeps in the module's float32."""
    from retrofit import gptq

    scale = weight.unflatten(-1, (-1, 128)).abs().amax(-1) / gptq.ABSMAX_STEPS
    codes = gptq.quantize(weight[None], hessian[None], scale[None])[0]
    return gptq.dequantize(codes, scale)


def compare(config: PeerConfig) -> list[dict]:
    """Make the cases, let the peer quantize them, measure."""
    from retrofit import gptq

    cases = []
    expert, fresh, route = tiny_expert(config.checkpoint)
    cases += cases_of("tiny, captured rows", expert, fresh, route, expert.rows)
    for label, rows in (("many", config.rows), ("few", config.few_rows)):
        expert, fresh, route, others = full_size_expert(config, rows)
        cases += cases_of(f"full size, {label} rows", expert, fresh, route, others)
        print(f"{label}: ours is done", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, case in enumerate(cases):
            stored = {key: case[key].contiguous() for key in ("weight", "rows")}
            save_file(stored, folder / f"case-{number}.safetensors")
        command = [str(config.peer_python), __file__, "--peer-child", name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for number, case in enumerate(cases):
            for damping, values in load_file(folder / f"peer-{number}.safetensors").items():
                case["values"][f"llm-compressor, damping {damping}"] = values
        versions = json.loads((folder / "versions.json").read_text())
    results = []
    for case in cases:
        errors = {
            kind: {
                name: gptq.output_error(case["weight"], values, case[kind])
                for name, values in case["values"].items()
            }
            for kind in ("rows", "fresh")
        }
        theirs = min(e for name, e in errors["fresh"].items() if name.startswith("llm-compressor"))
        results.append(
            {
                "layer": case["name"],
                "shape": list(case["weight"].shape),
                "num_rows": len(case["rows"]),
                "num_fresh_rows": len(case["fresh"]),
                "choice": {k: str(v) for k, v in vars(case["choice"]).items()},
                "error_on_given_rows": errors["rows"],
                "error_on_fresh_rows": errors["fresh"],
                "ratio_to_peer": errors["fresh"]["ours"] / theirs,
                "peer_versions": versions,
            }
        )
    return results


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="gptq_peer", description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", type=Path, help="interpreter that has llmcompressor")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "tiny" / "checkpoint")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inter", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=11_000)
    parser.add_argument("--few-rows", type=int, default=430)
    parser.add_argument("--fresh-rows", type=int, default=2_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer-child", type=Path, help=argparse.SUPPRESS)
    options = vars(parser.parse_args(argv))
    child, out = options.pop("peer_child"), options.pop("out")
    if child is not None:
        peer_main(child)
        return 0
    if options["peer_python"] is None:
        parser.error("--peer-python is needed")
    sys.path.insert(0, str(Path(__file__).parent))
    config = PeerConfig(**options)
    with torch.inference_mode():
        results = compare(config)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    report = {
        "schema_version": 1,
        "what": "squared relative output error of one layer quantized to INT4, groups of 128",
        "largest_ratio": LARGEST_RATIO,
        "results": results,
        "config": {k: v for k, v in options.items() if isinstance(v, int)},
        "provenance": {
            "commit": commit or None,
            "torch": torch.__version__,
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }
    text = json.dumps(report, indent=1) + "\n"
    if out is not None:
        out.write_text(text, encoding="utf-8")
    for result in results:
        print(f"{result['layer']}: {result['ratio_to_peer']:.3f} x the peer's")
    return 1 if any(r["ratio_to_peer"] > LARGEST_RATIO for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
