"""The commands in docs/retrofit.md, run in their order on the tiny model."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from pathlib import Path

import pytest

import serve.__main__ as serve
from retrofit import __main__ as retrofit
from retrofit import capture
from tests.retrofit.folders import write_calibration

DOCS = Path(__file__).parents[2] / "docs"


def commands(page: str) -> list[str]:
    """Lines of the page's code blocks."""
    blocks = re.findall(r"```\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture
def server(monkeypatch, tmp_path) -> dict[str, str]:
    """The environment that `serve run` would start vLLM with; `capture` writes rows to its folder.

    The checkpoint is checked as ever, so a folder that cannot be served with MTP is refused.
    """
    environment: dict[str, str] = {}
    monkeypatch.setattr(serve, "check_engine", lambda: None)
    monkeypatch.setattr(serve, "check_port", lambda host, port: None)  # 8000 may be in use
    # It would wait in the background for the engine that `execve` starts.
    monkeypatch.setattr(serve, "start_summary", lambda *_: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "execve", lambda path, command, env: environment.update(env))

    def run(config: capture.CaptureConfig) -> int:
        assert environment["DSV4_CAPTURE_DIR"] == str(config.out)
        write_calibration(config.out)
        return 0

    monkeypatch.setitem(retrofit.CONFIGS, "capture", (capture.CaptureConfig, run))
    return environment


def test_every_command_on_the_page_works(original, tmp_path, server):
    places = {name: str(tmp_path / name) for name in ("BASE", "RTN", "ROWS", "RESULT")}
    places |= {"ORIGINAL": str(original), "PROFILE": "cpu-tiny", "cuda": "cpu"}
    lines = commands("retrofit.md")
    assert len(lines) == 8
    # BASE is inspected where there is one already; here it is made first.
    for line in sorted(lines, key=lambda line: line.endswith("inspect BASE")):
        python, _, module, *arguments = shlex.split(line)
        assert python == "python"
        run = {"retrofit": retrofit, "serve": serve}[module].main
        assert run([places.get(word, word) for word in arguments]) == 0, line


def test_the_page_on_capture_has_the_same_commands():
    whole = commands("retrofit.md")
    first = whole.index("python -m retrofit mtp ORIGINAL BASE RTN --rtn")
    assert commands("capture.md") == whole[first : first + 3]
