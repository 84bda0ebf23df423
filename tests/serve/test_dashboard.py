"""The Grafana dashboard and Prometheus's configuration: what they name is there."""

import re
from pathlib import Path

import pytest
import yaml

from tests.serve.dashboard import (
    FOLDER,
    board,
    labels,
    metric_names,
    page_names,
    targets,
)
from tests.serve.front_process import running_front, wait_until

OURS = "dsv4_serve_"
# Of a page of the real engine with MTP; tests/serve/test_clients.py asks a running one.
VLLM_NAMES = Path(__file__).with_name("vllm_metric_names.txt").read_text().split()
KINDS = {"row", "stat", "timeseries", "state-timeline"}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Our page after a request and drafts."""
    folder = tmp_path_factory.mktemp("f")
    (folder / "keys").write_text("alice 0123456789abcdef\n")
    with running_front(folder, [{}], keys=str(folder / "keys"), monitor_interval_s=0.05) as front:
        front.wait_until_ready()
        job = {"events": 1, "drafts": 10, "accepted": 8}
        front.ask("POST", "/v1/completions", job, {"x-api-key": "0123456789abcdef"})

        def drafted():
            text = front.ask("GET", "/metrics")[2].decode()
            return text if f"{OURS}mtp_acceptance_length" in text else None

        return wait_until(drafted, "drafts are counted")


def test_every_metric_it_names_exists(page):
    ours = {name for name in page_names(page) if name.startswith(OURS)}
    for title, target in targets():
        names = metric_names(target["expr"])
        assert names, title
        for name in names:
            known = ours if name.startswith(OURS) else VLLM_NAMES
            assert name in known, f"{title}: {name}"


def test_every_label_it_names_exists(page):
    """Of ours; the histograms' `le` among them. A machine without GPUs has no sample of theirs."""
    for title, target in targets():
        for name in metric_names(target["expr"]):
            samples = [x for x in page.splitlines() if re.match(rf"{name}[ {{]", x)]
            if not name.startswith(OURS + "gpu_") and name.startswith(OURS):
                assert samples, name
                assert labels(target) <= set(re.findall(r"[{,](\w+)=", samples[0])), title


def test_it_shows_every_metric_of_ours(page):
    """But those that a kind of fault on the board says already."""
    families = set(re.findall(rf"^# TYPE ({OURS}\w+) (?:gauge|counter|histogram)$", page, re.M))
    asked = {name for _, target in targets() for name in metric_names(target["expr"])}
    shown = {re.sub(r"_(total|bucket)$", "", name) for name in asked}
    left = {re.sub(r"_total$", "", name) for name in families if not name.endswith("_created")}
    assert left - shown == {OURS + name for name in ("canaries", "faults", "mtp_enabled")}


def test_grafana_can_import_it():
    """The fields that its import needs; data sources by variable, so that any Prometheus fits."""
    given = board()
    assert given["id"] is None
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", given["uid"])
    assert given["title"]
    assert given["schemaVersion"] >= 36
    assert {"from", "to"} <= given["time"].keys()
    variables = {variable["name"]: variable for variable in given["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["instance"]["datasource"]["uid"] == "${datasource}"
    assert variables["instance"]["definition"] == f"label_values({OURS}info, instance)"
    panels = given["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["type"] in KINDS
        assert panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["fieldConfig"].keys() == {"defaults", "overrides"}
        refs = [target["refId"] for target in panel["targets"]]
        assert refs
        assert len(set(refs)) == len(refs)
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            for opening, closing in ("()", "[]", "{}"):
                assert target["expr"].count(opening) == target["expr"].count(closing)


def test_panels_lie_in_the_grid_and_over_no_other():
    taken = set()
    for panel in board()["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_prometheus_reads_our_path_and_port():
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    [job] = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": ["localhost:8000"]}]


def test_alerts_name_what_is_there(page):
    """Metrics, and the values of labels that they wait for."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    [path] = [path for pattern in config["rule_files"] for path in FOLDER.glob(pattern)]
    rules = yaml.safe_load(path.read_text(encoding="utf-8"))["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 3
    for rule in rules:
        [name] = metric_names(rule["expr"])
        samples = [line for line in page.splitlines() if line.startswith(name)]
        assert samples, rule
        for wanted in re.findall(r'\w+="[^"]*"', rule["expr"]):
            assert any(wanted in line for line in samples), rule
        shown = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert shown - {"instance"} <= set(re.findall(r"[{,](\w+)=", samples[0])), rule


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (le) (rate(a_bucket{x="y"}[5m]))', {"a_bucket"}),
        ("1 + sum(vllm:a_total) / b", {"vllm:a_total", "b"}),
        ("a{b=~'c'} == 1", {"a"}),
    ],
)
def test_names_are_found_in_expressions(expression, names):
    assert metric_names(expression) == names
