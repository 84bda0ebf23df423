"""What can be said of the container's files without an engine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docker"))

import image  # noqa: E402
import settings  # noqa: E402
import stack  # noqa: E402

from serve.doctor.checks import OLDEST_NCCL  # noqa: E402
from serve.environment import read_env_file  # noqa: E402
from serve.settings import all_settings, resolve  # noqa: E402
from serve.supervisor import Limits  # noqa: E402

COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SUITABLE = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition, 12.0, 97887\n"


def test_each_setting_is_explained_once_in_env_example():
    text = settings.env_example()
    for setting in all_settings().values():
        expected = 0 if setting.name in settings.IN_THE_IMAGE else 1
        found = re.findall(rf"^# {setting.variable}=", text, re.MULTILINE)
        assert len(found) == expected, setting.variable


def test_defaults_in_env_example_are_values_that_serve_takes(tmp_path):
    given = [
        line.removeprefix("# ")
        for line in settings.env_example().splitlines()
        if re.match(r"# SERVE_\w+=.", line)
    ]
    assert len(given) > 5
    path = tmp_path / ".env"
    path.write_text("\n".join(["SERVE_PROFILE=cpu-tiny", *given]), encoding="utf-8")
    found = resolve({}, {}, read_env_file(path))
    for line in given:
        name = line.partition("=")[0].removeprefix("SERVE_").lower()
        assert found[name] == all_settings()[name].default


def test_a_file_that_differs_from_the_schema_is_named(tmp_path, monkeypatch, capsys):
    stale = tmp_path / ".env.example"
    stale.write_text(settings.env_example() + "# more\n", encoding="utf-8")
    monkeypatch.setattr(settings, "ENV_EXAMPLE", stale)
    monkeypatch.setattr(settings, "FILES", (stale, settings.COMPOSE))
    assert settings.main(["--check"]) == 1
    assert ".env.example: is not what serve/settings.py says" in capsys.readouterr().err
    assert stale.read_text(encoding="utf-8").endswith("# more\n")
    assert settings.main([]) == 0
    assert settings.main(["--check"]) == 0


def test_both_files_are_what_the_schema_says():
    assert settings.main(["--check"]) == 0


def test_grace_is_longer_than_the_drain_and_the_engine_s_end():
    [minutes] = re.findall(r"stop_grace_period: \$\{STOP_GRACE:-(\d+)m\}", COMPOSE)
    drain = all_settings()["shutdown_timeout"].default
    assert int(minutes) * 60 > drain + Limits().stop_s


def test_bases_are_the_dockerfile_s():
    bases = json.loads((ROOT / "docker" / "bases.json").read_text(encoding="utf-8"))
    defaults = dict(re.findall(r"^ARG (\w+_BASE)=(\S+)$", DOCKERFILE, re.MULTILINE))
    assert bases["cpu"]["name"] == bases["router"]["name"] == defaults["CPU_BASE"]
    assert bases["gpu"]["name"] == defaults["GPU_BASE"]
    for base in bases.values():
        assert base["digest"] is None or re.fullmatch(r"sha256:[0-9a-f]{64}", base["digest"])


def test_both_images_have_the_same_version_of_what_both_have():
    def versions(name):
        text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
        found = {}
        for package, version in re.findall(r"^([a-z0-9._-]+)==([^ ;]+)", text, re.MULTILINE):
            found.setdefault(package, set()).add(version)
        return found

    cpu, cuda = versions("cpu.txt"), versions("cuda.txt")
    differ = {name for name in cpu.keys() & cuda.keys() if not cuda[name] <= cpu[name]}
    assert differ == {"apache-tvm-ffi"}  # vLLM's CUDA wheel asks for the older one
    assert len(cpu.keys() & cuda.keys()) > 100


def test_the_gpu_image_has_an_nccl_that_the_doctor_takes_and_its_build_checks():
    lock = (ROOT / "requirements" / "cuda.txt").read_text(encoding="utf-8")
    override = (ROOT / "requirements" / "cuda-override.txt").read_text(encoding="utf-8")
    [version] = re.findall(r"^nvidia-nccl-cu13==([0-9.]+) ", lock, re.MULTILINE)
    assert f"nvidia-nccl-cu13=={version}\n" in override
    assert tuple(map(int, version.split("."))) >= OLDEST_NCCL
    major, minor, patch = OLDEST_NCCL
    code = major * 10000 + minor * 100 + patch  # as ncclGetVersion says it
    assert f"found.value >= {code}," in DOCKERFILE


def test_the_gpu_image_has_one_version_of_the_cuda_bindings():
    """Below 13, cuda-python is a second package of the files of cuda-bindings."""
    lock = (ROOT / "requirements" / "cuda.txt").read_text(encoding="utf-8")
    found = re.findall(r"^cuda-(?:bindings|python)==([0-9.]+) ", lock, re.MULTILINE)
    assert len(found) == 2
    assert found[0] == found[1] >= "13"


@pytest.mark.parametrize(
    ("cards", "toolkit", "profile", "reason"),
    [
        (SUITABLE * 2, True, "gpu", "2 x NVIDIA RTX PRO 6000"),
        (SUITABLE * 2, False, "cpu", "no NVIDIA container toolkit"),
        (SUITABLE, True, "cpu", "1 of 2 cards"),
        ("NVIDIA H100 80GB HBM3, 9.0, 81559\n" * 2, True, "cpu", "H100 80GB HBM3 9.0 81559"),
        ("NVIDIA RTX PRO 4000, 12.0, 24467\n" * 2, True, "cpu", "0 of 2 cards"),
        ("", True, "cpu", "found: none"),
    ],
)
def test_up_takes_gpu_for_two_suitable_cards_and_says_why(cards, toolkit, profile, reason):
    choice = stack.choose_by(cards, toolkit)
    assert choice.profile == profile
    assert reason in choice.reason


def test_up_writes_env_once_and_never_changes_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / ".env"
    monkeypatch.setattr(stack, "ENV_FILE", path)
    monkeypatch.delenv("COMPOSE_PROFILES", raising=False)
    monkeypatch.setattr(stack, "choose", lambda: stack.Choice("gpu", "because"))
    assert stack.prepare()["COMPOSE_PROFILES"] == "gpu"
    assert "profile gpu: because" in capsys.readouterr().out
    written = path.read_text(encoding="utf-8").splitlines()
    assert {"COMPOSE_PROFILES=gpu", "CPU_SERVERS=0"} <= set(written)
    path.write_text("COMPOSE_PROFILES=cpu\nSERVE_PORT=9000\n", encoding="utf-8")
    known = stack.prepare()
    assert (known["COMPOSE_PROFILES"], known["SERVE_PORT"]) == ("cpu", "9000")
    assert known["CPU_SERVERS"] == "1"
    assert "profile cpu (.env)" in capsys.readouterr().out
    assert path.read_text(encoding="utf-8") == "COMPOSE_PROFILES=cpu\nSERVE_PORT=9000\n"


@pytest.mark.parametrize("place", [".env", "environment"])
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("SERVE_MAX_SEQS", "no such setting; .env.example has all of them"),
        ("SERVE_REPORT_DIR", "is /caches/reports in the container"),
    ],
)
def test_up_refuses_a_setting_that_would_not_reach_serve(
    tmp_path, monkeypatch, capsys, place, name, rule
):
    path = tmp_path / ".env"
    path.write_text("COMPOSE_PROFILES=cpu\n")
    monkeypatch.setattr(stack, "ENV_FILE", path)
    if place == ".env":
        path.write_text(f"COMPOSE_PROFILES=cpu\nexport {name}=1\n")
    else:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(stack.engine, "inspect", lambda _: pytest.fail("it goes on"))
    assert stack.main(["up"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"up: {place}: {name}: {rule}"


def test_up_reads_env_as_serve_does(tmp_path, monkeypatch, capsys):
    path = tmp_path / ".env"
    path.write_text("export SERVE_PORT='8001' # why\nHF_HOME=x\nCOMPOSE_PROFILES=cpu\n")
    monkeypatch.setattr(stack, "ENV_FILE", path)
    monkeypatch.delenv("HF_HOME", raising=False)
    known = stack.variables()
    assert (known["SERVE_PORT"], known["HF_HOME"]) == ("8001", "x")
    path.write_text("SERVE_PORT\n")
    assert stack.main(["up"]) == 2
    assert capsys.readouterr().err == f"up: {path}: line 1: must be NAME=VALUE\n"


@pytest.mark.parametrize(
    ("created_by", "shown"),
    [
        ("RUN /bin/sh -c apt-get  update # buildkit", "RUN apt-get update"),
        ("RUN |2 A= B=1 /bin/sh -c pip install x # buildkit", "RUN pip install x"),
        ("COPY . . # buildkit", "COPY . ."),
        ("", "the base"),
    ],
)
def test_layers_are_named_by_their_instruction(created_by, shown):
    assert image.instruction(created_by) == shown


def test_plain_compose_starts_the_cpu_service_alone(tmp_path):
    (tmp_path / "empty.env").touch()
    command = [Path(sys.executable).parent / "docker-compose", "--env-file", "empty.env"]
    command += ["--file", ROOT / "docker-compose.yml", "config", "--services"]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu"]


def test_without_docker_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setenv("DOCKER", "no-such-docker")
    assert stack.main(["down"]) == 1
    assert capsys.readouterr().err == "docker: there is no no-such-docker on PATH; install Docker\n"


@pytest.mark.parametrize("tool", ["hadolint", "check-jsonschema", "docker-compose"])
def test_lint_sees_a_fault(tool, tmp_path):
    binary = Path(sys.executable).parent / tool
    compose = tmp_path / "docker-compose.yml"
    compose.write_text(COMPOSE.replace("read_only: true", "readonly: true"), encoding="utf-8")
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(DOCKERFILE.replace("--no-install-recommends", ""), encoding="utf-8")
    commands = {
        "hadolint": ["--config", ROOT / "docker" / "hadolint.yaml", dockerfile],
        "check-jsonschema": ["--builtin-schema", "vendor.compose-spec", compose],
        "docker-compose": ["--file", compose, "--profile", "*", "config", "--quiet"],
    }
    done = subprocess.run([binary, *commands[tool]], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.search(r"DL3015|readonly|read_only", done.stdout + done.stderr)
