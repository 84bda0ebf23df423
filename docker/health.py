"""Container health check: exit status 0 when PATH (/readyz) answers 200, else 1 with its answer."""

import http.client
import os
import sys


def main() -> int:
    """Ask the server of this container."""
    path = sys.argv[1] if len(sys.argv) > 1 else "/readyz"
    port = int(os.environ.get("SERVE_PORT", "8000"))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        print(answer.status, answer.read(500).decode(errors="replace"))
    except OSError as error:
        print(f"health: port {port}: {error}")
        return 1
    return 0 if answer.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
