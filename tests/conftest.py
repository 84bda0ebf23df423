"""Fixtures that several folders of tests share."""

import os

# Before torch is imported, and for every process that a test starts: two tests run side by side,
# and threads that wait for each other on a busy core spin: a step then takes ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.engine.engine import Engines


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory):
    """run_engine(model, requests, batches=None, env=None, **vLLM arguments) -> EngineRun."""
    return Engines(tmp_path_factory.mktemp("engine"))
