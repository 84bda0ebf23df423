"""What a run that was cut short goes on with: the same server, and the same settings."""

import json
from dataclasses import replace

import pytest

from bench.load import run as run_module
from bench.load import summary
from bench.load.cli import main
from bench.load.config import Cell, LoadConfig
from bench.load.counters import Counters
from bench.load.errors import ServerUnusable
from bench.load.trace import Speculation, Trace
from tests.bench.load.fake_server import FakeServer, serving
from tests.bench.load.results import TOKENS, make_result, make_round

CONFIG = LoadConfig(contexts=(300,), output=9, repeats=3, max_warm_up_rounds=0)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory) -> str:
    """The journal of a run whose server died in its last round."""
    output = tmp_path_factory.mktemp("begun") / "load.json"
    with serving(FakeServer(die_at=2)) as url, pytest.raises(ServerUnusable):
        run_module.run(replace(CONFIG, url=url), output)
    return output.with_suffix(".rounds.jsonl").read_text()


@pytest.fixture
def journal(tmp_path, rounds):
    path = tmp_path / "load.rounds.jsonl"
    path.write_text(rounds)
    return path


def refusal(server: FakeServer, journal, *options: str, capsys) -> str:
    with serving(server) as url:
        assert main(["run", "--url", url, "--resume", str(journal), *options]) == 2
    assert server.bodies == []
    assert journal.exists()
    (line,) = (s for s in capsys.readouterr().err.splitlines() if s.startswith("bench: "))
    return line


class MorePositions(FakeServer):
    def page(self) -> str:
        return super().page() + (
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 0.0\n'
        )


@pytest.mark.parametrize(
    ("server", "told"),
    [
        (FakeServer(num_speculative_tokens=1), "num_speculative_tokens = 0, now 1"),
        (MorePositions(num_speculative_tokens=2), "num_speculative_tokens = 0, now 2"),
        (FakeServer(metrics_page=False), "num_speculative_tokens = 0, now None"),
        (FakeServer(window=8192), "window = 4096, now 8192"),
    ],
    ids=["mtp", "another k", "no counters", "window"],
)
def test_rounds_of_two_servers_are_not_mixed(journal, capsys, server, told):
    assert told in refusal(server, journal, capsys=capsys)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("commit", "abc", "commit = abc, now "),
        ("checkpoint_sha256", "def", "checkpoint_sha256 = def, now None"),
        ("device", "another CPU", "device = another CPU, now "),
        (
            "gpus",
            [{"name": "GPU", "driver": "580", "power_limit_w": 300, "pcie_generation": 5}],
            "gpus = ['GPU, driver 580, 300 W'], now []",
        ),
    ],
)
def test_nor_those_of_two_machines_or_commits(journal, capsys, name, value, told):
    header, *rounds = journal.read_text().splitlines()
    record = json.loads(header)
    record["provenance"][name] = value
    journal.write_text("\n".join([json.dumps(record), *rounds, ""]))
    assert told in refusal(FakeServer(), journal, capsys=capsys)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--repeats", "9"), "was begun with repeats = 3, not 9; a resumed run keeps its settings"),
        (("--context", "400"), "was begun with contexts = 300, not 400"),
        (("--quick",), "was begun with most_depth = None, not 8192"),
        (("--result", "x.json"), "goes without --result and --engine"),
        (("--engine", "vllm"), "goes without --result and --engine"),
    ],
)
def test_other_options_beside_resume_are_refused(journal, capsys, options, told):
    assert told in refusal(FakeServer(), journal, *options, capsys=capsys)


def test_the_same_options_beside_resume_are_taken(journal):
    with serving(FakeServer()) as url:
        options = ["--repeats", "3", "--context", "300", "--output", "9"]
        assert main(["run", "--url", url, "--resume", str(journal), *options]) == 0


def test_other_options_beside_the_arms_are_refused(tmp_path, capsys):
    begun = tmp_path / "x.arms.json"
    record = {"profile": "p", "checkpoint": None, "num_speculative_tokens": [1],
              "start_timeout_s": 1.0, "tokenizer": None, "schema_version": 1,
              "config": make_result()["config"]}  # fmt: skip
    begun.write_text(json.dumps(record))
    assert main(["run", "--resume", str(begun), "--output", "77"]) == 2
    assert f"was begun with output = {TOKENS}, not 77" in capsys.readouterr().err


def test_rounds_with_and_without_drafts_in_a_cell_are_a_problem():
    rounds = [make_round(0, i, 1, 991, 0.01, 0.1, mtp=i == 0) for i in range(3)]
    config = LoadConfig(contexts=(1000,), output=TOKENS)
    entry = summary.summarize(Cell(4096, 1000, 991, 1), rounds, config)
    assert entry["acceptance"] is None
    assert entry["problems"] == ["speculation: 1 of 3 rounds have counters of drafts"]


def test_acceptance_is_of_the_requests_only_where_each_of_them_tells():
    told, silent = Trace(0.0, speculation=Speculation(4, 4, 2)), Trace(0.0)
    failed = Trace(0.0, error="HTTP 500")
    assert summary.acceptance(Counters(), [told, told, failed])["num_drafts"] == 8
    assert summary.acceptance(Counters(), [told, silent]) is None
