"""A real Prometheus scrapes a running front, and answers every query of the dashboard."""

import contextlib
import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request

import pytest
import yaml

from bench.server import free_port
from tests.serve.dashboard import FOLDER, metric_names, targets
from tests.serve.front_process import running_front, wait_until

PROMETHEUS = shutil.which("prometheus")
pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="needs Debian's prometheus")
OURS = "dsv4_serve_"
# Of cards, which a CPU has not, and of states that a healthy server is not in.
WITHOUT_SAMPLES = ("_gpu_", '_fault_active{instance=~".*"} == 1')


class Prometheus:
    """Asks a running one."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/api/v1"
        self.time: dict[str, str] = {}  # of the queries; now, where there is none

    def ask(self, path: str, **arguments: str):
        query = urllib.parse.urlencode(arguments)
        with urllib.request.urlopen(f"{self.url}/{path}?{query}", timeout=60) as answer:
            document = json.load(answer)
        assert document["status"] == "success", document
        return document

    def samples(self, expression: str) -> list:
        document = self.ask("query", query=expression, **self.time)
        assert not document.get("warnings"), document
        return document["data"]["result"]

    def scrapes(self) -> int:
        """How often the front was read so far, in time."""
        with contextlib.suppress(urllib.error.URLError):
            found = self.samples("sum_over_time(up[1h])")
            return int(found[0]["value"][1]) if found else 0
        return 0

    def stay(self) -> None:
        """Ask from now on of the time of the latest scrape that came; a later one may fail."""

        def latest() -> str | None:
            found = self.samples("timestamp(up == 1)")
            return found[0]["value"][1] if found else None

        self.time = {"time": wait_until(latest, "a scrape")}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """Reads a front that serves, twice before and twice after requests; our rules are loaded."""
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "front").mkdir()
    (folder / "keys").write_text("alice 0123456789abcdef\n")
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"]["evaluation_interval"] = "100ms"
    config["rule_files"] = [str(FOLDER / pattern) for pattern in config["rule_files"]]
    port = free_port()
    with running_front(
        folder / "front", [{}], keys=str(folder / "keys"), monitor_interval_s=0.05
    ) as front:
        front.wait_until_ready()
        [job] = config["scrape_configs"]
        job |= {"scrape_interval": "400ms", "scrape_timeout": "400ms"}
        job["static_configs"] = [{"targets": [f"127.0.0.1:{front.port}"]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [PROMETHEUS, f"--config.file={folder / 'prometheus.yml'}"]
        command += [
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            found = Prometheus(port)
            for _ in range(2):
                before = found.scrapes()
                wait_until(lambda b=before: found.scrapes() >= b + 2, "two scrapes")
                work = {"events": 2, "drafts": 10, "accepted": 8}
                front.ask("POST", "/v1/completions", work, {"x-api-key": "0123456789abcdef"})
            before = found.scrapes()
            wait_until(lambda: found.scrapes() >= before + 2, "two more scrapes")
            found.stay()
            yield found
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.parametrize(
    "expression", [target["expr"] for _, target in targets()], ids=lambda text: text[:60]
)
def test_it_answers_each_query_of_the_dashboard(prometheus, expression):
    expression = expression.replace("$instance", ".*").replace("$__rate_interval", "1m")
    samples = prometheus.samples(expression)
    ours = all(name.startswith(OURS) for name in metric_names(expression))
    if ours and not any(part in expression for part in WITHOUT_SAMPLES):
        assert samples
        assert all(sample["value"][1] != "NaN" for sample in samples), samples


def test_it_takes_our_alerts_and_none_is_on(prometheus):
    [group] = prometheus.ask("rules")["data"]["groups"]
    assert len(group["rules"]) > 3
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    alerts = prometheus.ask("alerts")["data"]["alerts"]
    # A scrape may fail once; then this one waits for two minutes.
    assert [a for a in alerts if a["labels"]["alertname"] != "ServerDown"] == []
    assert [a for a in alerts if a["state"] == "firing"] == []
