from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiny import export
from tiny.__main__ import CHECKPOINT
from tiny.config import TinyConfig
from tiny.data import Data
from tiny.model import DeepseekV4
from tiny.plot import loss_curve
from tiny.train import TrainConfig, Trainer


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        out=tmp_path / "out",
        results=tmp_path / "r.json",
        cache=tmp_path,
        tokenizer=CHECKPOINT,
        pretrain_steps=2,
        qat_steps=1,
        head_steps=1,
        rows=1,
        length=24,
        long_rows=1,
        long_length=40,
        long_every=1,
        warmup_steps=1,
        generated_rows=2,
        generated_length=16,
        save_every=2,
    )


def make_trainer(config):
    generator = torch.Generator().manual_seed(0)
    plain = torch.randint(2, 2048, (2000,), generator=generator)
    torch.manual_seed(config.seed)
    model = DeepseekV4(TinyConfig())
    return Trainer(config, model, Data(plain, plain[:200], plain[:1024].view(2, 512), bos=0))


class Interrupted(Exception):
    pass


def test_an_interrupted_run_gives_the_same_bytes(config, monkeypatch):
    whole = make_trainer(config)
    whole.run()
    export.export(whole.model, config.out)
    expected = export.checkpoint_sha256(config.out)

    first = make_trainer(config)

    def stop():
        raise Interrupted

    step = first.joint_step
    monkeypatch.setattr(first, "joint_step", lambda: stop() if first.step == 2 else step())
    with pytest.raises(Interrupted):
        first.run()
    second = make_trainer(config)
    second.run()
    assert second.step == 4
    export.export(second.model, config.out)
    assert export.checkpoint_sha256(config.out) == expected


def test_a_state_of_other_options_is_refused(config):
    trainer = make_trainer(config)
    trainer.save()
    other = make_trainer(replace(config, lr=1e-4))
    with pytest.raises(ValueError, match="other options"):
        other.resume()


def test_the_head_phase_leaves_the_target_alone(config):
    trainer = make_trainer(config)
    trainer.step = config.joint_steps
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.model.train()
    trainer.head_step()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(n.startswith("mtp.0.") for n in changed)


def test_the_budget_stops_the_run(config):
    trainer = make_trainer(config)
    trainer.deadline = 0.0
    trainer.run()
    assert trainer.step == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_steps": -1}, "head_steps = -1"),
        ({"rows": 0}, "rows = 0"),
        ({"shared_dropout": 1.0}, "shared_dropout = 1.0"),
        ({"budget_s": -1.0}, "budget_s"),
    ],
)
def test_bad_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(out=Path("o"), results=Path("r"), **change)


def test_the_plot_draws_one_line_per_series():
    curve = [{"step": 25, "loss": 5.0, "mtp_loss": 6.0}, {"step": 50, "loss": 4.0, "mtp_loss": 5.5}]
    assert loss_curve(curve).count("<polyline") == 2
    with pytest.raises(ValueError, match="none of the 1 entries"):
        loss_curve([{"step": 1, "head_loss_1": 2.0}])
