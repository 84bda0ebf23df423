"""Container health check: exit status 0 when PATH (/readyz) answers 200, else 1 with its answer."""

import http.client
import os
import sys

READY, BARE_VLLM = "/readyz", "/health"


def main() -> int:
    """Ask the server of this container."""
    path = sys.argv[1] if len(sys.argv) > 1 else READY
    port = int(os.environ.get("SERVE_PORT", "8000"))
    try:
        status, body = ask("127.0.0.1", port, path)
    except (OSError, http.client.HTTPException) as error:
        print(f"health: port {port}: {error!r}")
        return 1
    print(status, body[:500].decode(errors="replace"))
    return 0 if status == 200 else 1


def ask(host: str, port: int, path: str = READY) -> tuple[int, bytes]:
    """Status and body; of vLLM's own /health where there is no /readyz, as with SERVE_GATEWAY=off.

    Raises:
        OSError, http.client.HTTPException: nothing answers, or not HTTP.
    """
    connection = http.client.HTTPConnection(host, port, timeout=4)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status == 404 and path == READY:
        return ask(host, port, BARE_VLLM)
    return answer.status, body


if __name__ == "__main__":
    sys.exit(main())
