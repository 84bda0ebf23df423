"""`serve report`: what a bug report needs, in one redacted archive.

Nothing is sent anywhere. A part that cannot be had is named with the reason: the machine of a bug
report is one on which something does not work.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve.allreduce_tier import FILE_NAME
from serve.engine import REPOSITORY
from serve.environment import (
    api_key,
    cache_path,
    load_record_path,
    our_variables,
    read_env_file,
    run_path,
)
from serve.errors import ConfigError, ServeError
from serve.evidence import run_tool, shown_environment
from serve.keys import MIN_KEY_CHARS
from serve.profiles import profile_names
from serve.redact import Redactor
from serve.settings import Settings, Source, add_env_file, add_flags, all_settings, resolve

SCHEMA_VERSION = 1
DOCTOR_S, ANSWER_S = 900, 10
MAX_LOG_BYTES = 2**20
MAX_FILE_BYTES = 4 * 2**20
MAX_EVIDENCE = 5  # files; the newest
KEY_LABEL = re.compile(r'(?<=[{,]key=")[^"]*')
# Of a line of ours: as JSON, as text.
KEY_FIELD = re.compile(r'(?P<head>"key": ?"|\bkey=)(?P<name>[A-Za-z0-9._-]+)')


class Absent(RuntimeError):
    """A part cannot be had; the message says why."""


class Report:
    """Parts of the archive: redacted bytes under a name, or why there are none."""

    def __init__(self, redactor: Redactor) -> None:
        self.redactor = redactor
        self.files: dict[str, bytes] = {}
        self.absent: dict[str, str] = {}

    def add_json(self, name: str, get: Callable[[], Any]) -> Any:
        """Add a JSON value as it is got; returns it as it was, None where there is none."""
        return self._add(name, get, lambda value: indented(self.redactor.json(value)))

    def add_text(self, name: str, get: Callable[[], str]) -> None:
        """Add text as it is got."""
        self._add(name, get, self.redactor.text)

    def _add(self, name: str, get: Callable[[], Any], show: Callable[[Any], str]) -> Any:
        try:
            value = get()
            self.files[name] = show(value).encode("utf-8", "replace")
        except Absent as reason:
            self.absent[name] = self.redactor.text(str(reason))
            return None
        except (OSError, ValueError, ServeError) as error:
            self.absent[name] = self.redactor.text(f"{type(error).__name__}: {error}")
            return None
        return value

    def contents(self) -> dict[str, Any]:
        """What is in it and what is not."""
        return {
            "schema_version": SCHEMA_VERSION,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": {name: len(data) for name, data in sorted(self.files.items())},
            "absent": dict(sorted(self.absent.items())),
        }

    def archive(self) -> bytes:
        """tar.gz with one folder; nobody's name is in it."""
        self.files["contents.json"] = indented(self.contents()).encode()
        written = io.BytesIO()
        with tarfile.open(fileobj=written, mode="w:gz") as tar:
            for name, data in sorted(self.files.items()):
                entry = tarfile.TarInfo(f"serve-report/{name}")
                entry.size, entry.mtime = len(data), int(time.time())
                tar.addfile(entry, io.BytesIO(data))
        return written.getvalue()


class Server:
    """The server that may run where the settings say."""

    def __init__(self, host: str, port: int, secret: str | None) -> None:
        self._host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self._port = port
        self._headers = {"Authorization": f"Bearer {secret}"} if secret else {}

    def get(self, path: str) -> bytes:
        """The body of a page.

        Raises:
            Absent: nothing answers, or not with status 200.
        """
        connection = http.client.HTTPConnection(self._host, self._port, timeout=ANSWER_S)
        try:
            connection.request("GET", path, headers=self._headers)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Absent(f"port {self._port}: {type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise Absent(f"port {self._port}: {path}: status {response.status}")
        return body

    @property
    def answers(self) -> bool:
        """Whether a server is there, of ours or a bare vLLM."""
        try:
            self.get("/metrics")
        except Absent as reason:
            return "status" in str(reason)
        return True


def gather(arguments: argparse.Namespace) -> Report:
    """settings -> what the machine is -> what runs -> what was written."""
    settings, refused = find_settings(arguments)
    of = value_of(settings, arguments)
    keys = secrets(of("api_key_file"))
    flags = doctors_flags(settings, of)
    env_file = None if settings is None else arguments.env_file
    report = Report(Redactor(keys))
    server = Server(of("host"), of("port"), keys[0] if keys else None)
    report.add_json("settings.json", lambda: shown_settings(settings, refused))
    report.add_json("versions.json", versions)
    report.add_json("doctor.json", lambda: doctor(flags, env_file, quick=server.answers))
    report.add_text("gpus.txt", gpus)
    report.add_json("all_reduce.json", lambda: read_json(cache_path(FILE_NAME)))
    record = arguments.load_record or load_record_path(of("port"))
    report.add_json("load_record.json", lambda: read_json(record))
    report.add_json("status.json", lambda: status(server, report.redactor))
    report.add_text("metrics.txt", lambda: metrics(server, report.redactor))
    report.add_text("log.txt", lambda: log_tail(arguments.log, report.redactor))
    folder = Path(of("report_dir") or run_path("reports"))
    for path in sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime)[-MAX_EVIDENCE:]:
        report.add_json(f"evidence/{path.name}", lambda path=path: evidence(path, report.redactor))
    if not any(name.startswith("evidence/") for name in (*report.files, *report.absent)):
        report.absent["evidence/"] = "no engine has stalled, or report_dir is another"
    return report


def find_settings(arguments: argparse.Namespace) -> tuple[Settings | None, str | None]:
    """What `run` would take; None and the reason where it would refuse."""
    try:
        file = read_env_file(arguments.env_file)
        return resolve(vars(arguments), our_variables(), file), None
    except ConfigError as error:
        return None, str(error)


def value_of(settings: Settings | None, arguments: argparse.Namespace) -> Callable[[str], Any]:
    """Of a setting: its value in force; of refused settings: what was given, if it is sound."""
    known, variables = all_settings(), our_variables()

    def of(name: str) -> Any:
        if settings is not None:
            return settings.values.get(name)
        setting = known[name]
        given = getattr(arguments, name) or variables.get(setting.variable)
        try:
            return setting.default if given is None else setting.parse(given)
        except ValueError:
            return setting.default

    return of


def doctors_flags(settings: Settings | None, of: Callable[[str], Any]) -> dict[str, str]:
    """What `doctor` must be told; what a profile holds it reads itself."""
    chosen = {name: str(of(name)) for name in ("host", "port")}
    for name in ("profile", "model", "allreduce"):
        if settings is None or settings.sources.get(name) not in (Source.PROFILE, Source.DEFAULT):
            chosen |= {name: str(given)} if (given := of(name)) is not None else {}
    if chosen.get("profile") not in profile_names():
        chosen.pop("profile", None)
    return chosen


def secrets(key_file: Path | str | None) -> list[str]:
    """The keys that this process can know: of the file, and the one in its environment.

    Of the file only what `run` takes for a key: it may be another file altogether.
    """
    found = []
    if key_file is not None:
        try:
            lines = Path(key_file).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        rows = [line.split() for line in lines if not line.lstrip().startswith("#")]
        found += [row[1] for row in rows if len(row) > 1 and len(row[1]) >= MIN_KEY_CHARS]
    return found + ([own] if (own := api_key()) else [])


def shown_settings(settings: Settings | None, refused: str | None) -> dict[str, Any]:
    """Each value with its source. Of files with keys and of other hosts only whether they are."""
    variables = shown_environment(os.getpid())
    if settings is None:
        return {"refused": refused, "environment": variables}
    hidden = ("api_key_file", "otlp_traces_endpoint")
    return {
        "values": {
            name: {
                "value": ("given" if value is not None else None)
                if name in hidden
                else plain(value),
                "source": settings.sources[name].value,
            }
            for name, value in sorted(settings.values.items())
        },
        "environment": variables,
    }


def plain(value: Any) -> Any:
    """A setting's value as JSON."""
    value = getattr(value, "value", value)
    return str(value) if isinstance(value, Path) else value


def versions() -> dict[str, Any]:
    """Of the code, the system and every package that is installed."""
    from serve.versions import collect_versions  # pydantic: the other commands do without

    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        system = None
    packages = {
        found.metadata["Name"]: found.version
        for found in importlib.metadata.distributions()
        if found.metadata["Name"]
    }
    return {
        **collect_versions().model_dump(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "system": system,
        "packages": dict(sorted(packages.items())),
    }


def doctor(flags: dict[str, str], env_file: Path | None, quick: bool) -> Any:
    """`serve doctor --json` with these flags.

    env_file: of the settings. None: they are refused, and doctor is told of none but the flags.
    quick: beside a server that runs it must load neither link nor disk.

    Raises:
        Absent: it did not end in time or with JSON.
    """
    command = [sys.executable, "-m", "serve", "doctor", "--json"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    command += [f"--env-file={env_file or os.devnull}"]
    environment = child_environment()
    if env_file is None:
        ours = our_variables()
        environment = {k: v for k, v in environment.items() if k not in ours}
    command += ["--no-probe", "--no-verify"] if quick else []
    try:
        done = subprocess.run(
            command, cwd=Path.cwd(), env=environment, capture_output=True, text=True, check=False,
            timeout=DOCTOR_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Absent(f"not done within {DOCTOR_S} s") from None
    try:
        return json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise Absent(f"exit status {done.returncode}: {said[0]}") from None


def child_environment() -> dict[str, str]:
    """So that the child finds this package from any folder."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path}


def gpus() -> str:
    """The driver's own tables."""

    async def both() -> str:
        return "\n".join([await run_tool("nvidia-smi"), await run_tool("nvidia-smi", "topo", "-m")])

    return asyncio.run(both())


def status(server: Server, redactor: Redactor) -> Any:
    """The document of a running server; keys by number instead of by name."""
    document = json.loads(server.get("/status.json"))
    requests = document.get("requests", {})
    by_key = requests.get("by_key", {})
    requests["by_key"] = {redactor.name(name): count for name, count in by_key.items()}
    return document


def metrics(server: Server, redactor: Redactor) -> str:
    """The page of a running server; keys by number instead of by name."""
    page = server.get("/metrics").decode("utf-8", "replace")
    return KEY_LABEL.sub(lambda found: redactor.name(found[0]), page)


def log_tail(path: Path | None, redactor: Redactor) -> str:
    """The end of a log file; keys by number instead of by name.

    Raises:
        Absent: no file was named.
    """
    if path is None:
        raise Absent("--log was not given; the server writes to stderr")
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_LOG_BYTES))
        data = file.read()
    if size > MAX_LOG_BYTES:
        data = data.partition(b"\n")[2]  # the first line has lost its head
    return without_key_names(data.decode("utf-8", "replace"), redactor)


def without_key_names(text: str, redactor: Redactor) -> str:
    """Our lines name the key that asked."""
    return KEY_FIELD.sub(lambda found: found["head"] + redactor.name(found["name"]), text)


def evidence(path: Path, redactor: Redactor) -> Any:
    """A dump of a stalled engine."""
    value = read_json(path)
    if isinstance(value, dict) and isinstance(value.get("log"), list):
        value["log"] = [without_key_names(str(line), redactor) for line in value["log"]]
    return value


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        Absent: it is not there, or is longer than a file of ours is.
        ValueError: not JSON.
    """
    if not path.is_file():
        raise Absent(f"{path}: no such file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise Absent(f"{path}: {path.stat().st_size} bytes; at most {MAX_FILE_BYTES}")
    return json.loads(path.read_text(encoding="utf-8"))


def indented(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def write(data: bytes, path: Path) -> None:
    """Write under a temporary name, readable by this user alone, and rename.

    Raises:
        ConfigError: it cannot be written there.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            out.write(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"--output {path}: {error.strerror}") from error


def add_report(commands: Any) -> None:
    """The command line of `serve report`: the flags of `run` say what it would run with."""
    parser = commands.add_parser("report", help="a redacted archive to attach to a bug report")
    add_flags(parser)
    add_env_file(parser)
    parser.add_argument("--load-record", type=Path, metavar="FILE", help="as `run` was told")
    parser.add_argument("--log", type=Path, metavar="FILE", help="the server's output; its end")
    parser.add_argument(
        "--output", metavar="FILE", help="serve-report-TIME.tar.gz here; - is standard output"
    )


def run_report(arguments: argparse.Namespace) -> int:
    """gather -> archive -> write -> say what is in it and what is not."""
    report = gather(arguments)
    data = report.archive()
    if arguments.output == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = Path(arguments.output or f"serve-report-{stamp}.tar.gz")
        write(data, path)
        print(path)
    for name in sorted(report.files):
        print(f"report: {name}", file=sys.stderr)
    for name, reason in sorted(report.absent.items()):
        print(f"report: without {name}: {reason}", file=sys.stderr)
    print("report: look through it before you give it away", file=sys.stderr)
    return 0
