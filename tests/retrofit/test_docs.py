"""The commands in docs/retrofit.md, run in their order on the tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from retrofit.__main__ import main

PAGE = Path(__file__).parents[2] / "docs" / "retrofit.md"


def test_every_command_on_the_page_works(original, calibration, tmp_path):
    places = {
        "ORIGINAL": str(original),
        "BASE": str(tmp_path / "base"),
        "RESULT": str(tmp_path / "result"),
        "ROWS": str(calibration),
        "cuda": "cpu",
    }
    blocks = re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) == 5
    for line in sorted(lines, key=lambda line: line.endswith("inspect BASE")):
        python, _, module, *arguments = shlex.split(line)
        assert (python, module) == ("python", "retrofit")
        assert main([places.get(word, word) for word in arguments]) == 0, line
