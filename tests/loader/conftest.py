"""One run of the harness for all tests that read its results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900  # of a hang


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Scenario -> model -> what the harness saw, with our classes, as on sm_120."""
    result = tmp_path_factory.mktemp("harness") / "result.json"
    command = [sys.executable, "-m", "tests.loader.harness", str(result)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(result.read_text())
