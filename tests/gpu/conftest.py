"""Results of `scripts/gpu_check.py`: those that are there, or a run of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu_check import ROOT, read_results

ENV = "DSV4_GPU_RESULTS"  # a folder that `gpu_check.py run` wrote; unset, the cases are run here
LAYERS = 4


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Case -> result."""
    if folder := os.environ.get(ENV):
        return read_results(Path(folder))
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    work = tmp_path_factory.mktemp("gpu")
    make = [ROOT / "scripts" / "make_full_size.py", "--out", work / "checkpoint"]
    check = [ROOT / "scripts" / "gpu_check.py", "run", "--checkpoint", work / "checkpoint"]
    subprocess.run([sys.executable, *make, "--layers", str(LAYERS), "--device", "cuda"], check=True)
    subprocess.run([sys.executable, *check, "--out", work / "out"], check=False)
    return read_results(work / "out")
