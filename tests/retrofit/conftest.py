"""The tiny model as an original, as a base, and with its head put back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from retrofit import mtp, quantize_base
from tests.retrofit.folders import write_calibration

ROOT = Path(__file__).parents[2]
CHECKPOINT = Path(os.environ.get("TINY_CHECKPOINT", ROOT / "tiny" / "checkpoint"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """The matrices are small: more threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def original() -> Path:
    return CHECKPOINT


@pytest.fixture(scope="session")
def base(tmp_path_factory, original) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    quantize_base.run(quantize_base.QuantizeBaseConfig(original, folder, scale="absmax"))
    return folder


@pytest.fixture(scope="session")
def calibration(tmp_path_factory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("calibration") / "rows")


@pytest.fixture(scope="session")
def good(tmp_path_factory, original, base, calibration) -> Path:
    """The base with its head put back by GPTQ."""
    folder = tmp_path_factory.mktemp("good") / "gptq"
    mtp.run(mtp.MtpConfig(original, base, folder, calibration))
    return folder
