"""Markdown, HTML, charts and README tables from hand-made results."""

import contextlib
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from bench.load import html, markdown, readme, result, speculative, svg
from bench.load import run as run_module
from bench.load.cli import main
from bench.load.config import LoadConfig
from bench.load.errors import LoadError, Unbelievable
from bench.load.speculative import Plan
from bench.load.svg import Series, chart, ticks
from bench.server import ServerError
from tests.bench.load.fake_server import FakeServer, serving
from tests.bench.load.results import make_result

ROOT = Path(__file__).parents[3]
BEGIN, END = readme.marks("load")
SVG = "{http://www.w3.org/2000/svg}"


def test_a_cell_is_a_row_with_its_interval():
    text = markdown.render(make_result(mtp=True, streams=(1,)))
    assert "| 4,096 / 991 / 1 | 100 [98, 102] | 5.00 [4.93, 5.07] | 200.0 [" in text
    assert "| 2.000 (1.000, k=1) | 0 / 6 | 6 |" in text
    assert "a CPU; vLLM 0.0; commit cccccccccccc; 2026-11-24" in text


def test_what_was_not_measured_is_a_dash():
    row = markdown.render(make_result(streams=(1,))).splitlines()[4]
    assert row.endswith("| - | 0 / 6 | 6 |")


def test_few_repeats_have_no_interval():
    assert "| 101 | 5.05 |" in markdown.render(make_result(mtp=True, noise=(1.0, 1.02)))


def test_warnings_are_shown_first():
    made = make_result(speculation="on", text="random")
    made["warm_up"][0]["settled"] = False
    for rendered in (markdown.render(made), html.render(made)):
        assert "Not to be believed: speculation: no acceptance metrics" in rendered
        assert "random tokens" in rendered
        assert "still moving" in rendered


class TestHtml:
    def drawings(self, page: str) -> list[ET.Element]:
        return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.S)]

    def test_the_page_fetches_nothing(self):
        page = html.render(make_result())
        assert not re.search(r"<script|<link|<img|@import|src=|href=|url\(", page)
        urls = set(re.findall(r"https?://[^\"'\s<]+", page))
        assert urls == {"http://www.w3.org/2000/svg"}  # a name, not an address

    def test_it_has_the_table_and_the_charts(self):
        page = html.render(make_result())
        assert page.count("<tr>") == 3
        titles = [d.find(f"{SVG}title").text for d in self.drawings(page)]
        assert titles == [
            "decode, tok/s per stream, by repeat",
            "TTFT, ms, by repeat",
            "First round of 991 x 2: tokens received",
            "Aggregate against per-stream speed, depth 991",
        ]

    def test_one_cell_has_no_pareto_plot(self):
        assert len(self.drawings(html.render(make_result(streams=(1,))))) == 3

    def test_the_line_of_a_pareto_plot_leaves_out_what_is_beaten(self):
        points = [(1, 9), (2, 5), (2, 8), (1, 2), (4, 3), (3, 3)]
        assert html.frontier(points) == [(1, 9), (2, 8), (4, 3)]

    def test_depths_have_plots_of_their_own(self):
        made = make_result(streams=(1, 2), depths=(100, 500))
        titles = [title for title, drawing in html.pareto([("a", made)]) if drawing]
        assert titles == [
            f"Aggregate against per-stream speed, depth {depth}" for depth in (100, 500)
        ]

    def test_text_is_escaped(self):
        assert "<b>x" not in html.render(make_result(label="<b>x"))


class TestSvg:
    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [(0, 100, [0, 20, 40, 60, 80, 100]), (0, 1.1, [0, 0.25, 0.5, 0.75, 1, 1.25])],
    )
    def test_ticks_are_round_and_cover(self, low, high, expected):
        assert ticks(low, high) == expected

    def test_ticks_of_one_value_cover_it(self):
        assert ticks(5, 5)[0] <= 5 <= ticks(5, 5)[-1]
        assert ticks(0, 0)[-1] > 0

    def test_points_lie_inside_in_their_order(self):
        text = chart("t", "x", "y", [Series("a", [(0, 1), (1, 4), (2, 2)])])
        points = ET.fromstring(text).find(f"{SVG}polyline").get("points").split()
        xs, ys = zip(*(map(float, p.split(",")) for p in points), strict=True)
        assert list(xs) == sorted(xs)
        assert ys[1] < ys[2] < ys[0]
        assert 0 <= min(xs) <= max(xs) <= svg.WIDTH
        assert 0 <= min(ys) <= max(ys) <= svg.HEIGHT

    def test_dots_have_labels_and_bars(self):
        series = Series("a", [(1, 2)], line=False, bars=[(1, 3)], labels=["two & more"])
        drawn = ET.fromstring(chart("t", "x", "y", [series]))
        assert len(drawn.findall(f"{SVG}circle")) == 1
        assert "two & more" in [t.text for t in drawn.iter(f"{SVG}text")]

    def test_nothing_to_show_is_an_empty_text(self):
        assert chart("t", "x", "y", [Series("a", [])]) == ""


class TestReadme:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "results"
        result.write(folder / "load-a.json", make_result(label="first"))
        result.write(folder / "load-b.json", make_result(label="bad", speculation="on"))
        (folder / "other.json").write_text('{"kind": "kernels"}')
        (folder / "list.json").write_text("[1]")
        return folder

    def test_only_results_that_can_be_believed_become_tables(self, folder, capsys):
        assert main(["report", "--results", str(folder)]) == 0
        printed = capsys.readouterr().out
        assert "**first, cold cache, 9 output tokens**" in printed
        assert "(`results/load-a.json`)" in printed
        assert "**bad" not in printed
        assert "Left out, with problems: `load-b.json`" in printed

    def test_the_arms_of_one_comparison_are_one_table(self, folder, capsys):
        for name, k in (("no-mtp", None), ("mtp-k1", 1)):
            made = make_result(label=f"524k-{name}", mtp=bool(k), streams=(1,))
            result.write(folder / f"c-{name}.json", made)
        text = readme.render(readme.load_results(folder))
        table = text[text.index("**524k: with and without MTP**") :].splitlines()[2:6]
        assert [row.split(" | ")[0] for row in table[2:]] == ["| 524k (no MTP)", "| 524k MTP k=1"]
        assert "(`results/c-*.json`)" in text
        assert text.count("| 4,096 / 991 / 1 |") == 3  # load-a's, and one for each arm

    def test_tables_go_between_the_marks_and_again(self, folder, tmp_path, capsys):
        page = tmp_path / "README.md"
        page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
        options = ["report", "--results", str(folder)]
        assert main([*options, "--check", str(page)]) == 1
        assert capsys.readouterr().err.strip().endswith("run `make report`")
        for _ in range(2):
            assert main([*options, "--write", str(page)]) == 0
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "stale" not in text
        assert text.count("| 4,096 / 991 / 1 |") == 1
        assert main([*options, "--check", str(page)]) == 0
        result.write(folder / "load-c.json", make_result(label="newer"))
        assert main([*options, "--check", str(page)]) == 1

    @pytest.mark.parametrize("text", ["", f"{END}{BEGIN}", BEGIN * 2])
    def test_a_page_without_its_marks_is_refused(self, folder, tmp_path, text):
        page = tmp_path / "README.md"
        page.write_text(text)
        assert main(["report", "--results", str(folder), "--write", str(page)]) == 2
        assert page.read_text() == text

    def test_the_newest_demo_and_kernel_timings_fill_their_marks(self, tmp_path):
        profile = {"name": "tiny", "decode_tok_s": 10.04, "ttft_ms": 5, "passes_per_token": 1,
                   "acceptance_rate": None, "acceptance_length": None}  # fmt: skip
        for day, rate in (("24", 10.04), ("26", 20.0)):
            demo = {"profiles": [profile | {"decode_tok_s": rate}],
                    "provenance": {"date": f"2026-11-{day}T01"}}  # fmt: skip
            (tmp_path / f"demo-cpu-2026-11-{day}.json").write_text(json.dumps(demo))
        case = {"tokens": 1, "routing": "uniform", "serves": "ours",
                "arms": {"ours": {"us": 22.04, "share_of_copy": 0.599}, "marlin": {"us": 35.0}},
                "ratios": {"marlin": {"ratio": 1.587}}}  # fmt: skip
        cases = [case, case | {"routing": "mtp"}, case | {"serves": "marlin"}]
        timings = {"cases": cases, "provenance": {"date": "2026-11-24"}}
        (tmp_path / "kernels-h100-x.json").write_text(json.dumps(timings))
        page = tmp_path / "README.md"
        page.write_text("\n".join(m for name in ("demo", "kernels") for m in readme.marks(name)))
        readme.write(page, tmp_path)
        lines = page.read_text().splitlines()
        assert lines[3:6] == [
            "| tiny | 20.0 | 5 | 1.000 | - | - |", "", "`results/demo-cpu-2026-11-26.json`",
        ]  # fmt: skip
        assert lines[10:13] == [
            "| 1 | 22.0 | 35.0 | 1.59 | 60 % |",
            "",
            "`results/kernels-h100-x.json`",
        ]
        with pytest.raises(LoadError, match=r"no demo-\*.json"):
            readme.render_demo(tmp_path / "..")

    def test_this_repositorys_page_is_current(self):
        readme.check(ROOT / "README.md", ROOT / "results")

    def test_no_result_and_no_folder(self, tmp_path):
        assert readme.render([]) == "No load result yet."
        with pytest.raises(LoadError, match="no such folder"):
            readme.load_results(tmp_path / "absent")


class TestCompareSpeculative:
    CONFIG = LoadConfig(contexts=(300,), output=21, repeats=5, max_warm_up_rounds=1)

    def launcher(self, **mtp):
        arms = []

        @contextlib.contextmanager
        def start(arm):
            arms.append(arm)
            k = arm.num_speculative_tokens
            if k:
                mtp.update(num_speculative_tokens=k, tokens_per_chunk=k + 1)
            server = FakeServer(gap_s=0.004, ttft_s=0.02, **(mtp if k != 0 else {}))
            with serving(server) as url:
                # The arm's port was chosen before; the fake has its own.
                type(arm).url = property(lambda self: url)
                yield

        return start, arms

    @pytest.fixture(autouse=True)
    def _keep_url(self):
        real = speculative.Arm.url
        yield
        speculative.Arm.url = real

    def test_both_arms_are_measured_and_the_delta_is_shown(self, tmp_path, capsys):
        start, arms = self.launcher(num_speculative_tokens=1, tokens_per_chunk=2)
        text = speculative.run(self.CONFIG, tmp_path / "x.json", Plan("524k"), start=start)
        assert [arm.num_speculative_tokens for arm in arms] == [0, None]
        base, mtp = (result.read(tmp_path / f"x-{name}.json") for name in ("no-mtp", "mtp"))
        assert base["cells"][0]["acceptance"] is None
        assert mtp["cells"][0]["acceptance"]["length"] == 2
        first, second = text.splitlines()[4:6]
        assert first.startswith("| 524k (no MTP) | 4,096 / 279 / 1 |")
        assert second.startswith("| 524k MTP k=1 | 4,096 / 279 / 1 |")
        # No interval behind it where this machine held a whole answer up: then it has no rate.
        gain = float(re.search(r"\+(\d+\.\d)%", second)[1])
        slow, fast = (one["cells"][0]["decode_tok_s"]["value"] for one in (base, mtp))
        assert gain == pytest.approx(100 * (fast / slow - 1), abs=0.06)
        assert gain > 20  # two tokens each 4 ms, and what this machine adds to both
        assert "<svg" in (tmp_path / "x.html").read_text()
        assert (tmp_path / "x.md").read_text() == text

    def test_an_arm_that_must_speculate_and_does_not_fails(self, tmp_path):
        start, _ = self.launcher()
        with pytest.raises(Unbelievable, match="no acceptance metrics"):
            speculative.run(self.CONFIG, tmp_path / "x.json", Plan("524k"), start=start)
        assert not (tmp_path / "x.md").exists()

    def test_each_k_is_an_arm_and_all_are_in_one_plot(self, tmp_path):
        start, arms = self.launcher()
        config = replace(self.CONFIG, streams=(1, 2), output=25, repeats=1)
        plan = Plan("524k", num_speculative_tokens=(1, 2))
        text = speculative.run(config, tmp_path / "x.json", plan, start=start)
        assert [arm.num_speculative_tokens for arm in arms] == [0, 1, 2]
        found = [line.split(" | ")[:2] for line in text.splitlines()[4:10]]
        assert found == [
            [f"| 524k {name}", f"4,096 / 275 / {streams}"]
            for streams in (1, 2)
            for name in ("(no MTP)", "MTP k=1", "MTP k=2")
        ]
        page = (tmp_path / "x.html").read_text()
        drawing = re.search(r"<svg.*?</svg>", page, re.S)[0]  # the first is of all arms
        assert "Aggregate against per-stream speed, depth 275" in drawing
        assert drawing.count("<circle") == 6
        for k in (1, 2):
            measured = result.read(tmp_path / f"x-mtp-k{k}.json")["cells"][0]["acceptance"]
            assert (measured["num_speculative_tokens"], measured["length"]) == (k, k + 1)

    def test_what_was_cut_short_goes_on_at_its_round_and_measures_no_arm_twice(
        self, tmp_path, monkeypatch, capsys
    ):
        start, arms = self.launcher()
        real = run_module.Journal.add

        def interrupt(journal, done):
            real(journal, done)
            if len(arms) == 2 and len(journal.done) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(run_module.Journal, "add", interrupt)
        plan = Plan("524k", tmp_path / "checkpoint", (1,), 9.0)
        config = replace(self.CONFIG, seed=4)
        with pytest.raises(KeyboardInterrupt):
            speculative.run(config, tmp_path / "x.json", plan, start=start)
        begun = tmp_path / "x.arms.json"
        said = capsys.readouterr().err
        assert f"go on with: python -m bench run --resume {begun}" in said
        assert "--resume x-mtp" not in said
        assert not (tmp_path / "x.md").exists()
        with pytest.raises(LoadError, match="go on with --resume"):
            speculative.run(config, tmp_path / "x.json", plan, start=start)
        monkeypatch.setattr(speculative.resume, "__defaults__", (None, start))
        monkeypatch.setattr(run_module.Journal, "add", real)
        assert main(["run", "--resume", str(begun)]) == 0
        assert [arm.num_speculative_tokens for arm in arms] == [0, 1, 1]
        assert arms[2].checkpoint == tmp_path / "checkpoint"
        base, mtp = (result.read(tmp_path / f"x-{name}.json") for name in ("no-mtp", "mtp-k1"))
        assert [d["repeat"] for d in mtp["cells"][0]["rounds"]] == [0, 1, 2, 3, 4]
        assert base["config"]["seed"] == mtp["config"]["seed"] == 4
        assert (tmp_path / "x.md").exists()
        assert not begun.exists()

    def test_an_arm_that_is_not_to_be_believed_is_not_taken(self, tmp_path):
        bad = make_result(label="bad", speculation="on", streams=(1,))
        result.write(tmp_path / "x-no-mtp.json", bad)
        begun = tmp_path / "x.arms.json"
        record = {"profile": "p", "checkpoint": None, "num_speculative_tokens": [1],
                  "start_timeout_s": 1.0, "tokenizer": None, "config": bad["config"]}  # fmt: skip
        begun.write_text(json.dumps(record | {"schema_version": 1}))
        with pytest.raises(LoadError, match="not to be believed: .*; remove it to measure it"):
            speculative.resume(begun)
        begun.write_text(json.dumps(record | {"schema_version": 2}))
        with pytest.raises(LoadError, match="schema version 2; this program has 1"):
            speculative.resume(begun)
        begun.write_text("{}")
        with pytest.raises(LoadError, match="not what --compare-speculative began"):
            speculative.resume(begun)

    @pytest.mark.parametrize("counts", ["0,1", "1,1"])
    def test_an_arm_without_mtp_is_not_asked_for_and_none_is_twice(self, counts, capsys):
        options = ["--compare-speculative", "--profile", "x", "--num-speculative-tokens", counts]
        assert main(["run", *options]) == 2
        assert "each at least 1, and once" in capsys.readouterr().err

    def test_it_needs_a_profile(self, capsys):
        assert main(["run", "--compare-speculative"]) == 2
        assert "needs --profile" in capsys.readouterr().err

    def test_a_server_that_does_not_start_is_exit_status_3(self, tmp_path, capsys, monkeypatch):
        def fail(arm):
            raise ServerError("server: ended with exit status 2")

        monkeypatch.setattr(speculative.run, "__defaults__", (None, fail))
        options = ["--compare-speculative", "--profile", "x", "--result", str(tmp_path / "x.json")]
        assert main(["run", *options]) == 3
        assert "exit status 2" in capsys.readouterr().err

    def test_the_server_is_started_as_asked(self, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(speculative, "running_server", lambda command, *_: seen.append(command))
        arm = speculative.Arm("mtp", "128k", tmp_path, 2, 81, tmp_path / "log", 9.0)
        speculative.launch(arm)
        assert seen[0][1:] == [
            "-m", "serve", "run", "--profile", "128k", "--port", "81", "--model", str(tmp_path),
            "--num-speculative-tokens", "2",
        ]  # fmt: skip


def test_a_hand_made_result_fits_the_schema(tmp_path):
    result.write(tmp_path / "a.json", make_result(mtp=True))
    assert result.read(tmp_path / "a.json") == json.loads(json.dumps(make_result(mtp=True)))
