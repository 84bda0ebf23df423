import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = [
    "help",
    "setup",
    "demo",
    "kernels",
    "kernels-report",
    "test",
    "test-docker",
    "test-gpu",
    "bench-kernels",
    "lint",
    "patches-check",
    "patches-mutation",
    "serve",
    "bench",
    "bench-compare",
    "report",
    "eval",
    "image",
    "up",
    "down",
    "logs",
    "tiny-train",
    "clean",
]

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def make(*arguments: str) -> str:
    done = subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_alone_lists_every_target_with_a_line():
    assert re.findall(r"^([a-z-]+) +\S", make(), re.MULTILINE) == TARGETS


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "help"])
def test_each_target_expands(target):
    assert make("--dry-run", target)
