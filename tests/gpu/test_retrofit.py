"""`retrofit mtp --device cuda` on the tiny model, beside the same command on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from retrofit.__main__ import main
from tests.retrofit.folders import write_calibration
from tiny.__main__ import CHECKPOINT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory) -> dict[str, dict]:
    """Device -> what the command says of the head that it made and verified."""
    place = tmp_path_factory.mktemp("retrofit")
    rows = write_calibration(place / "rows")
    assert main(["quantize-base", str(CHECKPOINT), str(place / "base"), "--mtp", "drop"]) == 0
    manifests = {}
    for device in ("cpu", "cuda"):
        arguments = [str(CHECKPOINT), str(place / "base"), str(place / device)]
        assert main(["mtp", *arguments, "--calibration", str(rows), "--device", device]) == 0
        assert main(["verify", str(place / device), "--deep", str(CHECKPOINT)]) == 0
        manifests[device] = json.loads((place / device / "mtp_manifest.json").read_text())
    return manifests


def test_both_devices_reach_the_same_error(manifests):
    """Sums in another order round a few codes the other way; the outputs are as good."""
    cpu, cuda = (manifests[device]["tensors"] for device in ("cpu", "cuda"))
    assert cpu.keys() == cuda.keys()
    for name, figures in cpu.items():
        assert cuda[name]["error"] == pytest.approx(figures["error"], rel=0.05), name


def test_the_device_is_recorded(manifests):
    assert {name: body["device"] for name, body in manifests.items()} == {
        "cpu": "cpu",
        "cuda": "cuda",
    }
