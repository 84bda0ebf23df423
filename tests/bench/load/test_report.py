"""Markdown, HTML, charts and README tables from hand-made results."""

import contextlib
import json
import re
import xml.etree.ElementTree as ET

import pytest

from bench.load import html, markdown, readme, result, speculative, svg
from bench.load.cli import main
from bench.load.config import LoadConfig
from bench.load.errors import LoadError, Unbelievable
from bench.load.svg import Series, chart, ticks
from bench.server import ServerError
from tests.bench.load.fake_server import FakeServer, serving
from tests.bench.load.results import make_result

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
            "Aggregate against per-stream speed",
        ]

    def test_one_cell_has_no_pareto_plot(self):
        assert len(self.drawings(html.render(make_result(streams=(1,))))) == 3

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

    def test_tables_go_between_the_marks_and_again(self, folder, tmp_path):
        page = tmp_path / "README.md"
        page.write_text(f"before\n{readme.BEGIN}\nstale\n{readme.END}\nafter\n")
        for _ in range(2):
            assert main(["report", "--results", str(folder), "--write", str(page)]) == 0
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "stale" not in text
        assert text.count("| 4,096 / 991 / 1 |") == 1

    @pytest.mark.parametrize("text", ["", f"{readme.END}{readme.BEGIN}", readme.BEGIN * 2])
    def test_a_page_without_its_marks_is_refused(self, folder, tmp_path, text):
        page = tmp_path / "README.md"
        page.write_text(text)
        assert main(["report", "--results", str(folder), "--write", str(page)]) == 2
        assert page.read_text() == text

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
            speculates = arm.num_speculative_tokens != 0
            server = FakeServer(gap_s=0.004, ttft_s=0.02, **(mtp if speculates else {}))
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
        text = speculative.run(self.CONFIG, tmp_path / "x.json", "524k", start=start)
        assert [arm.num_speculative_tokens for arm in arms] == [0, None]
        base, mtp = (result.read(tmp_path / f"x-{name}.json") for name in ("no-mtp", "mtp"))
        assert base["cells"][0]["acceptance"] is None
        assert mtp["cells"][0]["acceptance"]["length"] == 2
        first, second = text.splitlines()[4:6]
        assert first.startswith("| 524k (no MTP) | 4,096 / 279 / 1 |")
        assert second.startswith("| 524k MTP k=1 | 4,096 / 279 / 1 |")
        gain = float(re.search(r"\+(\d+\.\d)% \[", second)[1])
        assert gain == pytest.approx(100, abs=15)  # two tokens each 4 ms
        assert "<svg" in (tmp_path / "x.html").read_text()
        assert (tmp_path / "x.md").read_text() == text

    def test_an_arm_that_must_speculate_and_does_not_fails(self, tmp_path):
        start, _ = self.launcher()
        with pytest.raises(Unbelievable, match="no acceptance metrics"):
            speculative.run(self.CONFIG, tmp_path / "x.json", "524k", start=start)
        assert not (tmp_path / "x.md").exists()

    def test_it_needs_a_profile(self, capsys):
        assert main(["run", "--compare-speculative"]) == 2
        assert "needs --profile" in capsys.readouterr().err

    def test_a_server_that_does_not_start_is_exit_status_3(self, tmp_path, capsys, monkeypatch):
        def fail(arm):
            raise ServerError("server: ended with exit status 2")

        monkeypatch.setattr(speculative.run, "__defaults__", (None, None, 1.0, fail))
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
