"""Fixtures that several folders of tests share."""

import pytest

from tests.engine.engine import Engines


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory):
    """run_engine(model, requests, batches=None, env=None, **vLLM arguments) -> EngineRun."""
    return Engines(tmp_path_factory.mktemp("engine"))
