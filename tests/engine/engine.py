"""Runs of the patched engine, each in a process of its own, and the plain model beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# A newly trained checkpoint can be tried before it replaces the committed one.
CHECKPOINT = Path(os.environ.get("TINY_CHECKPOINT", ROOT / "tiny" / "checkpoint"))
TIMEOUT_S = 900
LOG_END = 30_000  # characters: where ranks fail together, what one says first is far from the end


@dataclass
class EngineRun:
    """What one engine life returned."""

    result: dict[str, np.ndarray]
    log: str

    @property
    def counters(self) -> dict[str, Any]:
        return json.loads(str(self.result["counters"]))

    @property
    def ops(self) -> dict[str, str]:
        return json.loads(str(self.result["ops"]))

    @property
    def acceptance_rate(self) -> float:
        counters = self.counters
        return (
            counters["spec_decode_num_accepted_tokens"] / counters["spec_decode_num_draft_tokens"]
        )

    def tokens(self, request: int) -> list[int]:
        return self.result[f"tokens_{request}"].tolist()

    def logprobs(self, request: int) -> torch.Tensor:
        """Log p of the next token at the last positions: float32 (positions, vocabulary).

        All positions of prompt and output where they were asked, else the output's.
        """
        parts = [self.result[f"output_{request}"]]
        if f"prompt_{request}" in self.result:
            # Row 0 would be the prediction of the first token.
            parts.insert(0, self.result[f"prompt_{request}"][1:])
        return torch.from_numpy(np.concatenate(parts))


def request(ids: list[int], max_tokens: int, logprobs: str | int | None = None) -> dict[str, Any]:
    """A job's request; logprobs: None, how many of the best, "output" or "all"."""
    return {"ids": ids, "max_tokens": max_tokens, "logprobs": logprobs}


def run_script(script: str, job: Path, result: Path, env: dict[str, str]) -> str:
    """Run one of the scripts beside this on a job; its log. Fails with the log's end."""
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # One process starts in 8 s, three in 30 s; the demo's server runs the usual three.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else two engines may share one core
        "HF_HUB_OFFLINE": "1",
        **env,
    }
    done = subprocess.run(
        [sys.executable, str(HERE / script), str(job), str(result)],
        env=environment,
        text=True,
        errors="replace",  # processes that write at once may cut each other's characters
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-LOG_END:]
    return done.stdout


class Engines:
    """Starts engines, one process each; jobs and results go to `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def __call__(
        self,
        model: Path,
        requests: list[dict[str, Any]],
        batches: list[list[int]] | None = None,
        env: dict[str, str] | None = None,
        **engine: Any,
    ) -> EngineRun:
        """Run the requests; `engine` are vLLM's arguments. Fails with the log's end."""
        self.count += 1
        job, result = self.folder / f"{self.count}.json", self.folder / f"{self.count}.npz"
        body = {"model": str(model), "engine": engine, "requests": requests}
        if batches is not None:
            body["batches"] = batches
        job.write_text(json.dumps(body))
        log = run_script("run_engine.py", job, result, env or {})
        with np.load(result) as arrays:
            return EngineRun(dict(arrays), log)
