import contextlib
import json
from pathlib import Path

import pytest

from bench import demo
from bench.demo import DemoConfig, DemoError, run_demo
from tests.bench.fake_openai import FakeEngine, fake_openai


@pytest.fixture
def config(tmp_path, model, prompts):
    return DemoConfig(
        model=model, prompts=prompts, num_prompts=3, max_tokens=9, output=tmp_path / "out"
    )


def launcher(base: FakeEngine, mtp: FakeEngine):
    @contextlib.contextmanager
    def launch(service):
        engine = mtp if service.num_speculative_tokens else base
        with fake_openai(engine) as url:
            yield url

    return launch


class FakeRetrofit:
    """Makes the folders that the commands would make."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, arguments, log, say) -> str:
        self.commands.append(arguments)
        made = {"quantize-base": 2, "mtp": 3}.get(arguments[0])
        if made:
            folder = Path(arguments[made])
            folder.mkdir()
            (folder / "config.json").write_text("{}")
        return "done"


def run(config, base: FakeEngine, mtp: FakeEngine):
    return run_demo(config, launcher(base, mtp), FakeRetrofit())


def engines(**mtp):
    return FakeEngine(), FakeEngine(num_speculative_tokens=1, **mtp)


def test_the_demo_measures_all_profiles_and_writes_the_result(config, capsys):
    run(config, *engines())
    result = json.loads((config.output / "result.json").read_text())
    assert result["schema_version"] == 1
    assert [profile["name"] for profile in result["profiles"]] == [
        "cpu-tiny (no MTP)",
        "cpu-tiny MTP k=1, RTN head",
        "cpu-tiny MTP k=1, GPTQ head",
        "cpu-tiny MTP k=1, original",
    ]
    assert list(result["checkpoints"]) == ["original", "base", "rtn", "gptq"]
    base, mtp = result["profiles"][:2]
    assert base["passes_per_token"] == 1
    assert base["acceptance_rate"] is None
    assert base["acceptance_length"] is None
    assert mtp["passes_per_token"] < 1
    assert 0 < mtp["acceptance_rate"] < 1
    assert mtp["acceptance_length"] == 1 + mtp["acceptance_rate"]
    assert base["decode_tok_s"] > 0
    assert len(base["requests"]) == 3
    assert result["differences"] == []
    assert set(result["provenance"]) == {
        "commit", "dirty", "vllm", "series_sha256", "checkpoint_sha256", "device", "cores",
        "command", "date",
    }  # fmt: skip
    printed = capsys.readouterr()
    assert "acceptance length" in printed.out
    assert "GPTQ head: 3 of 3 greedy answers of 9 tokens are the same" in printed.out
    assert "3/3 answered" in printed.err


def test_warm_up_is_not_in_the_counters(config):
    base, mtp = engines()
    result = run(config, base, mtp)
    assert result["profiles"][0]["counters"]["generation_tokens"] == 3 * 9
    assert base.generated == 5 * 9


def test_nothing_of_a_temporary_file_is_left(config):
    run(config, *engines())
    names = sorted(str(path.relative_to(config.output)) for path in config.output.rglob("*"))
    folders = [f"checkpoints/{name}" for name in ("base", "gptq", "original", "rtn")]
    files = [f"{folder}/config.json" for folder in folders]
    assert names == sorted(["checkpoints", "result.json", *folders, *files])


def test_the_steps_are_in_order_and_an_earlier_run_is_replaced(config, capsys):
    old = config.output / "checkpoints" / "rtn" / "old"
    old.mkdir(parents=True)
    retrofit = FakeRetrofit()
    services = []

    @contextlib.contextmanager
    def launch(service):
        services.append(service)
        with launcher(*engines())(service) as url:
            yield url

    run_demo(config, launch, retrofit)
    assert [command[0] for command in retrofit.commands] == [
        "quantize-base", "mtp", "capture", "mtp", "verify",
    ]  # fmt: skip
    assert not old.exists()
    first, *others = services
    assert (first.checkpoint.name, first.capture) == ("rtn", config.output / "calibration")
    assert [service.checkpoint.name for service in others] == ["base", "rtn", "gptq", "original"]
    assert not any(service.capture for service in others)
    said = capsys.readouterr().err
    assert "step 6/6: is it sound? (retrofit verify)" in said


def test_different_answers_fail_with_prompt_and_position(config):
    with pytest.raises(
        DemoError, match=r"differ for 3 of 3 prompts .* 0.0000: p2 at token 4 \(gap 5.0000\)"
    ):
        run(config, *engines(change_token=4))


def test_a_near_tie_within_the_noise_is_accepted_and_recorded(config, capsys):
    base = FakeEngine(gaps={4: 0.01}, moved_together=0.02)
    result = run(config, base, engines(change_token=4)[1])
    assert result["gap_noise"] == pytest.approx(0.02)
    assert result["gap_noise_max_concurrency"] == 4
    first = json.loads((config.output / "result.json").read_text())["differences"][0]
    assert first["gap"] == pytest.approx(0.01)
    assert {key: first[key] for key in ("prompt_id", "position", "near_tie")} == {
        "prompt_id": "p2", "position": 4, "near_tie": True,
    }  # fmt: skip
    assert "p2 parts at token 4: a near-tie, gap 0.0100, noise 0.0200" in capsys.readouterr().out


def test_a_gap_beyond_the_noise_fails(config):
    base = FakeEngine(gaps={4: 0.03}, moved_together=0.02)
    with pytest.raises(DemoError, match=r"noise of 0.0200: p2 at token 4 \(gap 0.0300\)"):
        run(config, base, engines(change_token=4)[1])


def test_a_token_that_is_not_one_of_the_two_best_is_no_near_tie(config):
    base = FakeEngine(gaps={4: 0.01}, moved_together=0.02)
    mtp = FakeEngine(num_speculative_tokens=1, change_token=4, change_by=2)
    with pytest.raises(DemoError, match=r"p2 at token 4 \(gap not known\)"):
        run(config, base, mtp)


def test_the_gaps_are_asked_for_outside_the_measured_requests(config):
    base, mtp = engines()
    result = run(config, base, mtp)
    assert result["profiles"][0]["counters"]["generation_tokens"] == 3 * 9
    assert [bool(body.get("logprobs")) for body in base.bodies] == [False] * 5 + [True] * 6
    assert not any(body.get("logprobs") for body in mtp.bodies)


def test_without_token_ids_the_position_is_a_character(config):
    base = FakeEngine(token_ids=False)
    mtp = FakeEngine(num_speculative_tokens=1, token_ids=False, change_token=4)
    with pytest.raises(DemoError, match="p2 at character 4"):
        run(config, base, mtp)


def test_an_inert_head_fails_the_demo(config):
    with pytest.raises(DemoError, match="num_accepted_tokens is 0; the MTP head is inert"):
        run(config, *engines(accept_every=0))


def test_a_server_without_speculation_counters_fails_the_demo(config):
    with pytest.raises(DemoError, match="num_drafts is absent"):
        run(config, FakeEngine(), FakeEngine())


def test_too_few_prompts_are_refused(config):
    config.prompts.write_text('{"id": "a", "text": "b"}\n')
    with pytest.raises(DemoError, match="holds 1 prompts; 5 are asked for"):
        run(config, *engines())


def test_a_server_that_fails_is_exit_status_1_with_its_log(config, capsys):
    options = ["--model", str(config.model / "absent"), "--prompts", str(config.prompts)]
    status = demo.main([*options, "--num-prompts", "1", "--output", str(config.output)])
    assert status == 1
    assert "no such folder" in capsys.readouterr().err


def test_a_step_that_fails_is_exit_status_1_with_its_log(config, capsys):
    """An empty config.json is no checkpoint."""
    options = ["--model", str(config.model), "--prompts", str(config.prompts)]
    status = demo.main([*options, "--num-prompts", "1", "--output", str(config.output)])
    assert status == 1
    said = capsys.readouterr().err
    assert "retrofit quantize-base: exit status 2" in said
    assert "no *.safetensors file" in said


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--calibration-prompts", "0"),
        ("--num-prompts", "0"),
        ("--max-tokens", "1"),
        ("--num-speculative-tokens", "4"),
    ],
)
def test_a_bad_option_is_exit_status_2(option, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.main([option, value])
    assert option.strip("-").replace("-", "_") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--num-prompts", "3", "num_prompts"),
        ("--calibration-prompts", "9", "calibration_prompts"),
        ("--calibration-max-tokens", "9", "calibration_max_tokens"),
        ("--max-tokens", "5", "max_tokens"),
        ("--num-speculative-tokens", "2", "num_speculative_tokens"),
        ("--profile", "other", "profile"),
        ("--start-timeout-s", "9", "start_timeout_s"),
    ],
)
def test_each_option_reaches_the_configuration(option, value, field):
    assert str(getattr(demo.parse_config([option, value]), field)).removesuffix(".0") == value
