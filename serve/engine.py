"""Check that the installed vLLM is the pinned one with exactly our patch series."""

import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from serve.environment import PLUGIN
from serve.errors import EngineError

REPOSITORY = Path(__file__).resolve().parent.parent
PATCHQ = REPOSITORY / "patches" / "patchq.py"


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
