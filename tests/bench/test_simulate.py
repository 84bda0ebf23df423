"""The roofline against figures published for two RTX PRO 6000 Max-Q, and against its own table."""

import json
from pathlib import Path

import pytest

from bench.load.cli import main
from bench.simulate import FP8, LABEL, Machine, acceptance_length, layer_bytes, predict

CONFIG_PATH = Path(__file__).parents[2] / "serve" / "flash.json"
CONFIG = json.loads(CONFIG_PATH.read_text())
AS_SERVED = Machine(efficiency=0.62, all_reduce_us=9, gaps_ms=1.0)
GOOD = Machine(efficiency=0.75, all_reduce_us=6, gaps_ms=0.7)
STRETCH = Machine(efficiency=0.85, all_reduce_us=5, gaps_ms=0.4)
IDEAL = Machine(efficiency=1.0, all_reduce_us=4, gaps_ms=0.0)
MTP = (0.86, 0.52)  # the published head's acceptance


def rate(machine: Machine, per_position=(), **options) -> float:
    return predict(CONFIG, machine, per_position, **options)["decode_tok_s"]


@pytest.mark.parametrize(
    ("per_position", "measured"), [((), 123.8), (MTP, 203), (MTP, 210)], ids=str
)
def test_published_measurements_are_met_within_10_percent(per_position, measured):
    assert rate(AS_SERVED, per_position) == pytest.approx(measured, rel=0.1)


def test_parts_have_the_bytes_that_the_checkpoints_tensors_have():
    size = layer_bytes(CONFIG)
    megabytes = {
        "routed": 38.9, "shared": 25.2, "attention": 56.6, "compressor": 12.1, "indexer": 4.3,
        "hyper_connections": 3.15, "router": 2.1, "lm_head": 530,
    }  # fmt: skip
    for name, expected in megabytes.items():
        assert getattr(size, name) / 1e6 == pytest.approx(expected, rel=0.02), name
    assert predict(CONFIG, IDEAL)["gb_per_token_per_card"] == pytest.approx(6.65, rel=0.01)


@pytest.mark.parametrize(
    ("machine", "none", "k1", "k2"),
    [(IDEAL, 247, 347, 389), (STRETCH, 192, 274, 309), (GOOD, 162, 233, 265),
     (AS_SERVED, 129, 186, 213)],
)  # fmt: skip
def test_the_table_is_met_within_2_percent(machine, none, k1, k2):
    assert rate(machine) == pytest.approx(none, rel=0.02)
    assert rate(machine, (0.8,)) == pytest.approx(k1, rel=0.02)
    assert rate(machine, (0.8, 0.64)) == pytest.approx(k2, rel=0.02)


def test_eight_bit_dense_parts_are_faster():
    assert rate(STRETCH, dense=FP8) == pytest.approx(222, rel=0.02)


def test_a_measured_kernel_stands_for_its_bytes():
    bytes_us = layer_bytes(CONFIG).routed / (1792 * 0.62 * 1e3)
    same = Machine(kernel_us={"routed": bytes_us})
    assert rate(same) == pytest.approx(rate(AS_SERVED))
    slower = Machine(kernel_us={"routed": bytes_us + 10})
    steps = [predict(CONFIG, machine)["step_ms"] for machine in (slower, AS_SERVED)]
    assert steps[0] - steps[1] == pytest.approx(0.43)  # 43 layers


def test_every_all_reduce_counts():
    steps = [predict(CONFIG, Machine(all_reduce_us=us))["step_ms"] for us in (39.0, 9.0)]
    assert steps[0] - steps[1] == pytest.approx(86 * 0.030)


def test_acceptance_is_unconditional_and_falls():
    assert acceptance_length(MTP) == pytest.approx(2.38)
    assert acceptance_length(()) == 1
    for bad in [(1.1,), (-0.1,), (0.5, 0.6)]:
        with pytest.raises(ValueError, match="must fall"):
            acceptance_length(bad)


@pytest.mark.parametrize(
    "bad",
    [{"efficiency": 0.0}, {"efficiency": 1.1}, {"bandwidth_gb_s": 0.0}, {"gaps_ms": -1.0},
     {"all_reduce_us": -1.0}, {"kernel_us": {"mtp": 1.0}}],
)  # fmt: skip
def test_bad_values_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Machine(**bad)


def test_the_command_labels_what_it_prints(capsys):
    options = ["--config", str(CONFIG_PATH), "--acceptance", "0.86,0.52", "--kernel", "routed=54"]
    assert main(["simulate", *options]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed)
    assert result["label"] == LABEL
    assert result["num_speculative_tokens"] == 2
    assert main(["simulate", "--config", str(CONFIG_PATH), "--efficiency", "2"]) == 2
    assert main(["simulate", "--config", "absent.json"]) == 2
