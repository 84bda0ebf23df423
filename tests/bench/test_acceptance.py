import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import acceptance
from bench.acceptance import AcceptanceConfig, AcceptanceError, Counts, run
from bench.controls import HEAD_SHARD, Control, make_control
from tests.bench.fake_openai import FakeEngine, fake_openai
from tests.bench.test_demo import FakeRetrofit

ACCEPT_EVERY = {
    "original": 2, "rtn": 2, "gptq": 2, "zeroed": 4, "shuffled": 0, "scales-halved": 5,
}  # fmt: skip


def head(experts: int = 4) -> dict[str, torch.Tensor]:
    tensors = {"mtp.0.norm.weight": torch.ones(2)}
    for e in range(experts):
        for w in ("w1", "w2", "w3"):
            stem = f"mtp.0.ffn.experts.{e}.{w}"
            tensors[f"{stem}.weight_packed"] = torch.full((1, 2), e + 1, dtype=torch.int32)
            tensors[f"{stem}.weight_scale"] = torch.full((1, 2), e + 1.0).bfloat16()
    return tensors


class RetrofitWithHead(FakeRetrofit):
    def __call__(self, arguments, log, say) -> str:
        said = super().__call__(arguments, log, say)
        if arguments[0] == "mtp":
            save_file(head(), f"{arguments[3]}/{HEAD_SHARD}")
        return said


@pytest.fixture
def config(tmp_path, model, prompts):
    return AcceptanceConfig(
        model=model, prompts=prompts, runs=5, prompts_per_run=1, max_tokens=25,
        work=tmp_path / "work", output=tmp_path / "result.json",
    )  # fmt: skip


def launcher(accept_every):
    @contextlib.contextmanager
    def launch(service):
        every = accept_every[service.checkpoint.name]
        engine = FakeEngine(num_speculative_tokens=1, accept_every=every)
        with fake_openai(engine) as url:
            yield url

    return launch


def test_heads_and_controls_are_measured_and_judged(config, capsys, monkeypatch):
    monkeypatch.setattr(acceptance, "RESAMPLES", 200)
    run(config, launcher(ACCEPT_EVERY), RetrofitWithHead())
    result = json.loads(config.output.read_text())
    assert list(result["heads"]) == [
        "original", "rtn", "gptq", "zeroed", "shuffled", "scales halved",
    ]  # fmt: skip
    gptq = result["heads"]["gptq"]
    assert gptq["acceptance_rate"] == pytest.approx(0.5, abs=0.05)
    assert len(gptq["runs"]) == 5
    assert [prompt["prompt_id"] for prompt in gptq["prompts"]] == [f"p{i}" for i in range(5)]
    assert result["heads"]["shuffled"]["acceptance_rate"] == 0
    assert all(entry.get("holds", True) for entry in result["comparisons"].values())
    assert "| gptq / original | +1.0000 |" in capsys.readouterr().out
    assert config.output.with_suffix(".md").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gptq": 3}, "gptq - rtn, gptq / original"),
        ({"original": 1}, "gptq / original"),
        ({"zeroed": 2}, "zeroed - gptq"),
    ],
)
def test_a_requirement_that_does_not_hold_fails_after_writing(config, monkeypatch, change, message):
    monkeypatch.setattr(acceptance, "RESAMPLES", 200)
    with pytest.raises(AcceptanceError, match=f"does not hold: {message}"):
        run(config, launcher(ACCEPT_EVERY | change), RetrofitWithHead())
    assert config.output.exists()


def test_the_interval_narrows_with_more_prompts():
    def width(n: int) -> float:
        counts = [Counts(str(i), 10, 4 + 2 * (i % 2)) for i in range(n)]
        low, high = acceptance.head_summary(counts, 5, 0)["interval"]
        return high - low

    assert 0 < width(40) < width(10)


@pytest.mark.parametrize(
    ("option", "value"), [("--runs", "4"), ("--prompts-per-run", "0"), ("--max-tokens", "1")]
)
def test_a_bad_option_is_exit_status_2(option, value):
    with pytest.raises(SystemExit, match="2"):
        acceptance.main([option, value])


def test_too_few_prompts_are_refused(config):
    config.prompts.write_text('{"id": "a", "text": "b"}\n')
    with pytest.raises(AcceptanceError, match="holds 1; 5 needed"):
        run(config, launcher(ACCEPT_EVERY), RetrofitWithHead())


class TestControls:
    @pytest.fixture
    def source(self, tmp_path):
        folder = tmp_path / "source"
        folder.mkdir()
        save_file(head(), folder / HEAD_SHARD)
        save_file({"a": torch.ones(1)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        return folder

    def made(self, source, control) -> dict[str, torch.Tensor]:
        target = make_control(source, source.parent / "target", control)
        assert {p.name for p in target.iterdir()} == {p.name for p in source.iterdir()}
        assert [p.name for p in source.parent.iterdir() if p.name.startswith(".")] == []
        return load_file(target / HEAD_SHARD)

    @pytest.mark.parametrize(("control", "factor"), [(Control.ZEROED, 0), (Control.HALVED, 0.5)])
    def test_scales_change_and_nothing_else_does(self, source, control, factor):
        made = self.made(source, control)
        for name, tensor in head().items():
            expected = tensor * factor if name.endswith("weight_scale") else tensor
            assert torch.equal(made[name], expected), name
            assert made[name].dtype == tensor.dtype

    def test_shuffled_experts_are_all_of_another_and_none_is_lost(self, source):
        made = self.made(source, Control.SHUFFLED)
        for w in ("w1", "w2", "w3"):
            values = [made[f"mtp.0.ffn.experts.{e}.{w}.weight_packed"][0, 0] for e in range(4)]
            assert sorted(values) == [1, 2, 3, 4]
            assert all(value != e + 1 for e, value in enumerate(values))

    def test_a_head_without_packed_experts_is_refused(self, source):
        save_file({"mtp.0.norm.weight": torch.ones(2)}, source / HEAD_SHARD)
        with pytest.raises(ValueError, match=r"no tensor mtp\.0\.ffn\.experts"):
            make_control(source, source.parent / "target", Control.ZEROED)
