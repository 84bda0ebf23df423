"""A stack of docker-compose.yml that a test started: its containers, its port, its key."""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.server import free_port
from tests.docker.own_engine import DEBIAN_BIN, OwnEngine, wait_until

MODEL = "dsv4-tiny"


class Stack:
    """What the compose profile `profile` starts, or none (""), under a project name of its own."""

    def __init__(self, engine: OwnEngine, profile: str, folder: Path) -> None:
        self.port = free_port()
        self.project = f"dsv4-test-{profile or 'cpu'}"
        self.key = f"key-{secrets.token_hex(16)}"
        keys = folder / "api_keys"
        keys.write_text(f"tester {self.key}\n", encoding="utf-8")
        keys.chmod(0o644)
        self.no_settings = folder / "empty.env"
        self.no_settings.touch()
        self.engine = OwnEngine(
            engine.environment
            | {
                "COMPOSE_PROFILES": profile,
                "CPU_SERVERS": "0" if profile else "1",
                "COMPOSE_PROJECT_NAME": self.project,
                "SERVE_PORT": str(self.port),
                "SERVE_API_KEY_FILE": str(keys),
            }
        )

    def compose(self, *arguments: str, check: bool = True) -> str:
        """Output of Debian's docker-compose."""
        command = (DEBIAN_BIN / "docker-compose", "--env-file", self.no_settings)
        return self.engine.run(*command, *arguments, check=check)

    def container(self, service: str) -> str:
        """The id of a service's container."""
        return self.compose("ps", "--quiet", service).split()[0]

    def state(self, service: str) -> dict[str, Any]:
        """What the engine says of a container's state: Status, Health, ExitCode, OOMKilled."""
        return self.engine.inspect("container", self.container(service))["State"]

    def healthy(self, service: str) -> bool:
        """Whether the image's own health check holds; a container that ended is an error."""
        state = self.state(service)
        assert state["Status"] == "running", f"{service}: {state}"
        return state["Health"]["Status"] == "healthy"

    def execute(self, service: str, *command: str, check: bool = True) -> str:
        """Output of a command in a container."""
        return self.engine.docker("exec", self.container(service), *command, check=check)

    def ready(self) -> bool:
        """Whether what is published takes requests."""
        try:
            return self.get("/readyz")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def get(self, path: str) -> tuple[int, str]:
        """Status and body."""
        with self.connection() as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def document(self) -> dict[str, Any]:
        """/status.json."""
        status, body = self.get("/status.json")
        assert status == 200, body
        return json.loads(body)

    @contextlib.contextmanager
    def chat(
        self, text: str = "The sea was", max_tokens: int = 40, key: str | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """A streaming chat request, answered to its headers; `events` reads on."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        with self.connection() as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            yield connection.getresponse()

    @contextlib.contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        """A connection to what is published."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            yield connection
        finally:
            connection.close()


@contextlib.contextmanager
def running(
    stack: Stack, services: Sequence[str], within_s: float, say: Callable[[str], None]
) -> Iterator[Stack]:
    """The stack from `up`, as soon as the services are healthy, to `down`."""
    try:
        stack.compose("up", "--detach", "--no-build")
        seconds = wait_until("healthy", lambda: all(map(stack.healthy, services)), within_s)
        say(f"{', '.join(services)}: up to healthy: {seconds:.0f} s")
        yield stack
    except AssertionError:
        say(stack.compose("logs", "--tail", "40", check=False))
        raise
    finally:
        stack.compose("down", "--volumes", check=False)


def events(answer: http.client.HTTPResponse) -> Iterator[str]:
    """The data of an event stream, each as soon as it is there."""
    while line := answer.readline():
        if line.startswith(b"data: "):
            yield line[6:].decode().strip()


def content(event: str) -> str:
    """The text that an event of a chat adds."""
    choices = json.loads(event)["choices"]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
