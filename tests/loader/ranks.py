"""Runs the loader harness once per rank, all ranks at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.loader.conftest import ROOT


def command(folder: Path, rank: int, *options: str) -> list[str]:
    """The harness's: results under `folder`."""
    start = [sys.executable, "-m", "tests.loader.harness", str(folder / f"{rank}.json")]
    return [*start, "--save", str(folder / str(rank)), "--rank", str(rank), *options]


def run_ranks(
    folder: Path, ranks: int, *options: str, timeout_s: float, env: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """What each rank's harness saw. Fails when one does not end in time."""
    shared = ["--world-size", str(ranks), "--rendezvous", str(folder / "rendezvous")]
    if ranks == 1:
        shared = []
    processes = [
        subprocess.Popen(
            command(folder, rank, *shared, *options),
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, output[-6000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
