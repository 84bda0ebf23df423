"""Sizes, configuration, prompts, intervals, counters, journal: what needs no server."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from bench.load import config as config_module
from bench.load import corpus, counters, intervals, origin, telemetry
from bench.load import progress as progress_module
from bench.load.config import Cell, LoadConfig, Text
from bench.load.counters import Counters
from bench.load.errors import LoadError
from bench.load.journal import Journal
from bench.load.progress import Progress, duration
from bench.load.prompts import ChatPrompts, TokenPrompts
from bench.load.rounds import Round
from bench.load.sizes import format_size, parse_size, parse_sizes
from bench.load.stream import encode
from bench.load.trace import Chunk, Trace
from bench.load.warmup import is_settled, warm_up_cells
from tests.bench.load.calls import Calls
from tests.bench.load.fake_nvml import FakeNvml


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("2048", 2048), ("128k", 128_000), ("524k", 524_000), ("512K", 524_288), ("1M", 1_048_576),
     ("1m", 1_000_000), ("1.5k", 1500)],
)  # fmt: skip
def test_sizes_are_read_as_vllm_reads_them(text, tokens):
    assert parse_size(text) == tokens
    assert parse_size(format_size(tokens)) == tokens


@pytest.mark.parametrize("text", ["", "k", "12g", "-1", "0", "1.5", "1.0001k", "2,4"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_lists_of_sizes():
    assert parse_sizes("2k,4k") == (2000, 4000)
    assert parse_sizes("") == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": 1}, "output = 1"),
        ({"repeats": 0}, "repeats = 0"),
        ({"streams": ()}, "streams"),
        ({"streams": (0,)}, "streams"),
        ({"max_warm_up_rounds": -1}, "max_warm_up_rounds = -1"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"url": "localhost:8000"}, "must start with http"),
        ({"mode": "hot"}, "hot"),
        ({"api": "chat", "mode": "followup"}, "followup needs api = completions"),
        ({"api": "chat", "text": "random"}, "random needs api = completions"),
        ({"goodput": (("itl_ms", 1.0),)}, "itl_ms=1"),
        ({"goodput": (("ttft_ms", 0.0),)}, "ttft_ms=0"),
    ],
)
def test_bad_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LoadConfig(**change)


def test_window_context_and_depth_are_three_numbers():
    config = LoadConfig(contexts=(1000,), depths=(100, 500), output=50)
    assert config.cells(4096) == [Cell(4096, 1000, 100, 1), Cell(4096, 1000, 500, 1)]
    assert LoadConfig(output=96).cells(4096) == [Cell(4096, 4096, 4000, 1)]


def test_a_configuration_survives_the_journal_without_user_and_folder(tmp_path):
    config = LoadConfig(
        url="http://me:secret@host:1/x", contexts=(9,), goodput=(("ttft_ms", 5.0),),
        tokenizer=tmp_path / "tok", mode="warm",
    )  # fmt: skip
    record = config_module.to_json(config)
    assert record["url"] == "http://host:1/x"
    assert record["tokenizer"] == "tok"
    again = config_module.from_json(record, None)
    assert (again.contexts, again.goodput, again.mode) == ((9,), (("ttft_ms", 5.0),), "warm")


class TestPrompts:
    prompts = TokenPrompts(np.arange(100, 1100), (1,), Text.NOVELS, seed=3)

    def test_the_text_is_consecutive_and_the_length_exact(self):
        made = self.prompts.make(200, "a")
        assert len(made) == 200
        assert made[0] == 1
        body = made[17:]
        assert body == list(range(body[0], body[0] + 183))

    def test_a_prompt_longer_than_the_text_starts_over(self):
        body = self.prompts.make(2500, "a")[17:]
        assert body[:3] == [100, 101, 102]
        assert body[1000:1003] == [100, 101, 102]

    def test_another_purpose_or_seed_is_another_text(self):
        other = TokenPrompts(self.prompts.corpus, (1,), Text.NOVELS, seed=4)
        bodies = {tuple(p.make(50, name)[17:]) for p in (self.prompts, other) for name in "ab"}
        assert len(bodies) == 4

    def test_random_tokens_are_not_consecutive(self):
        prompts = TokenPrompts(np.arange(100, 1100), (), Text.RANDOM, seed=3)
        body = np.array(prompts.make(500, "a")[16:])
        assert (np.diff(body) != 1).sum() > 400

    def test_no_room_for_the_nonce_is_refused(self):
        with pytest.raises(LoadError, match="must be at least 18"):
            self.prompts.make(17, "a")

    def test_a_prompt_of_524000_tokens_takes_no_call_for_each_token(self):
        """It takes fifty; `results/bench-client-*.json` has the time of a whole run of four."""
        self.prompts.make(50, "what is imported at first use")
        calls = Calls()
        calls.begin()
        encode({"prompt": self.prompts.make(524_000, "a")})
        calls.end()
        assert calls.count < 1000


def test_short_prompts_stay_in_the_novel_that_the_tiny_model_has_not_seen():
    async def words(text: str) -> list[int]:
        return list(range(len(text.split())))

    novels = corpus.novels()
    assert novels[0].startswith("NORTHANGER ABBEY")
    assert len(novels) == 6
    few = asyncio.run(corpus.tokens_for(4096, words))
    assert len(few) == pytest.approx(len(novels[0].split()), abs=5)
    assert len(asyncio.run(corpus.tokens_for(300_000, words))) > 600_000


@pytest.mark.parametrize("depth", [60, 500, 3001])
def test_a_chat_is_fitted_to_the_count(depth):
    async def count(text: str) -> int:  # three characters a token, and a template of 11
        return 11 + len(text) // 3

    chats = ChatPrompts("some text of words " * 100, 0, count)
    made = asyncio.run(chats.make(depth, "a"))
    assert 0 <= depth - asyncio.run(count(made)) <= 8


def test_a_chat_that_is_too_short_for_its_nonce_is_refused():
    async def count(text: str) -> int:
        return len(text)

    with pytest.raises(LoadError, match="an empty chat with its nonce has 40"):
        asyncio.run(ChatPrompts("text", 0, count).make(39, "a"))


class TestIntervals:
    def test_the_interval_holds_the_median_and_narrows_with_agreement(self):
        wide = intervals.median([1.0, 2.0, 3.0, 4.0, 5.0])
        close = intervals.median([2.9, 3.0, 3.0, 3.0, 3.1])
        assert wide.value == close.value == 3
        assert wide.low <= 3 <= wide.high
        assert close.high - close.low < wide.high - wide.low

    def test_few_repeats_have_no_interval_and_none_measured_no_estimate(self):
        assert intervals.median([1.0, None, 2.0]) == intervals.Estimate(1.5, None, None, 2)
        assert intervals.median([None]) is None

    def test_a_ratio_of_pairs_cancels_what_both_share(self):
        base = [1.0, 2.0, 4.0, 8.0, 16.0]
        paired = intervals.ratio_of_medians(base, [2 * x for x in base])
        assert (paired.value, paired.low, paired.high) == (2, 2, 2)
        mixed = intervals.ratio_of_medians(base, [2.0 * x for x in reversed(base)])
        assert mixed.high - mixed.low > 1

    def test_what_was_not_measured_leaves_its_pair_out(self):
        assert intervals.ratio_of_medians([1.0, None, 2.0], [2.0, 9.0, None]).num == 1
        assert intervals.ratio_of_medians([None], [1.0]) is None
        with pytest.raises(ValueError, match="1 repeats and 2"):
            intervals.ratio_of_medians([1.0], [1.0, 2.0])


class TestCounters:
    PAGE = """\
vllm:generation_tokens_total{engine="0"} 96.0
vllm:spec_decode_num_drafts_total{engine="0"} 55.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 40.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 9.0
vllm:spec_decode_num_accepted_tokens_per_pos_created{engine="0",position="0"} 1.7e+09
"""

    def test_positions_are_kept_apart(self):
        read = counters.read(self.PAGE)
        assert read.accepted_per_position == (40, 9)
        assert (read.num_drafts, read.num_draft_tokens) == (55, None)

    def test_differences_and_sums(self):
        a, b = Counters(5, num_drafts=1, accepted_per_position=(1,)), counters.read(self.PAGE)
        assert b.since(a).generation_tokens == 91
        assert b.since(a).accepted_per_position == (39, 9)
        assert counters.total([a, a]).num_drafts == 2
        assert counters.total([]) == Counters()

    def test_a_counter_that_went_backwards_is_refused(self):
        with pytest.raises(ValueError, match="the engine restarted"):
            Counters(1).since(Counters(2))


class TestJournal:
    def test_a_line_that_was_cut_off_is_dropped(self, tmp_path):
        path = tmp_path / "j.jsonl"
        journal = Journal.start(path, {"config": {}})
        journal.add(Round(0, 0, (), Counters(3), 0, 1.0))
        with path.open("a") as file:
            file.write('{"cell": 0, "rep')
        again = Journal.load(path)
        assert again.done == journal.done
        again.add(Round(1, 0, (), Counters(), 0, 1.0))
        assert [d.cell for d in Journal.load(path).done] == [0, 1]

    def test_another_version_or_file_is_refused(self, tmp_path):
        path = tmp_path / "j.jsonl"
        path.write_text('{"schema_version": 9}\n')
        with pytest.raises(LoadError, match="schema version 9; this program has 1"):
            Journal.load(path)
        path.write_text("words\n")
        with pytest.raises(LoadError, match="not a journal"):
            Journal.load(path)
        with pytest.raises(LoadError, match="No such file"):
            Journal.load(tmp_path / "absent")

    def test_an_existing_one_is_not_overwritten(self, tmp_path):
        Journal.start(tmp_path / "j.jsonl", {})
        with pytest.raises(LoadError, match="--resume"):
            Journal.start(tmp_path / "j.jsonl", {})


def test_time_left_scales_cells_that_were_not_measured_yet(monkeypatch):
    now_s = 0.0
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    cells = [Cell(9, 9, 1000, 1), Cell(9, 9, 4000, 1)]
    progress = Progress(cells, [(0, 0), (1, 0)])
    assert progress.left_s() is None

    async def one() -> None:
        nonlocal now_s
        async with progress.round(0, 0, 1):
            now_s = 20.0

    asyncio.run(one())
    assert progress.left_s() == pytest.approx(80)


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.4, "12 s"), (185, "3 min 05 s"), (3720, "1 h 02 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_warm_up_is_settled_when_two_medians_agree():
    assert is_settled([20.0, 10.0, 10.2])
    assert not is_settled([20.0, 10.0, 10.4])
    assert not is_settled([10.0])
    assert not is_settled([10.0, None])


def test_warm_up_covers_each_number_of_streams_and_is_never_deep():
    cells = [Cell(9, 9, d, s) for d in (100, 500_000) for s in (1, 2)]
    assert [(c.depth, c.streams) for c in warm_up_cells(cells)] == [(8192, 1), (8192, 2)]


async def watch(nvml: FakeNvml) -> telemetry.Watch:
    async with telemetry.Telemetry(nvml, [1, 2]).watching() as watch:
        while len(watch.samples) < 6:
            await asyncio.sleep(0.01)
    return watch


class Ticking(FakeNvml):
    """Whose clock, 10 ms a sample, stands still while a sample is taken."""

    def __init__(self, counts: bool) -> None:
        self.now_s = 0.0
        super().__init__(counts, clock=lambda: self.now_s)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        self.now_s += 0.01 * (handle == 1)
        return super().nvmlDeviceGetPowerUsage(handle)


@pytest.mark.parametrize(("counts", "watts"), [(True, 3000), (False, 300)])
def test_energy_is_that_of_the_gpus_counters_where_they_count(monkeypatch, counts, watts):
    monkeypatch.setattr(telemetry, "SAMPLE_S", 0.01)
    nvml = Ticking(counts)
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(perf_counter=nvml.clock))
    seen = asyncio.run(watch(nvml))
    energy = seen.energy_j([Trace(0.01, (Chunk(0.04, 1),))], seen.samples[0][0] + 0.002)
    assert energy == pytest.approx(watts * 0.03, rel=0.001)


def test_power_is_summed_over_gpus_and_throttling_is_named(monkeypatch):
    monkeypatch.setattr(telemetry, "SAMPLE_S", 0.01)

    seen = asyncio.run(watch(FakeNvml()))
    assert {watts for _, watts in seen.samples} == {300.0}
    assert len(seen.samples) > 3
    assert seen.throttle_reasons() == ("sw_power_cap",)
    assert seen.sm_clock_mhz() == {"low": 1000, "median": 1500, "high": 2000}


@pytest.mark.parametrize(
    ("url", "local"),
    [("http://127.0.0.1:8000", True), ("http://localhost", True), ("http://[::1]:1", True),
     ("http://10.0.0.3:8000", False), ("http://gpu-box", False)],
)  # fmt: skip
def test_gpus_are_read_only_of_a_server_on_this_machine(url, local):
    assert telemetry.is_local(url) is local


def test_a_large_checkpoint_is_known_by_its_index(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12")
    small = origin.checkpoint_hashes(tmp_path)
    monkeypatch.setattr(origin, "MOST_BYTES_HASHED", 1)
    large = origin.checkpoint_hashes(tmp_path)
    assert small["checkpoint_sha256"]
    assert large["checkpoint_sha256"] is None
    assert large["checkpoint_index_sha256"] == small["checkpoint_index_sha256"]
    assert set(origin.checkpoint_hashes(None).values()) == {None}
