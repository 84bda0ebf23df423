"""What the environment asks of a worker is refused before the model is loaded."""

from types import SimpleNamespace

import pytest

from kernels.bounded_worker import BoundedWorker, chosen_tier
from serve.allreduce_tier import Tier

parallel_state = pytest.importorskip("vllm.distributed.parallel_state")


class Device:
    def init_device(self):
        pass


class Worker(BoundedWorker, Device):
    def make_all_reduce(self, group, tier):
        raise AssertionError("made")


@pytest.fixture(autouse=True)
def _two_ranks(monkeypatch):
    group = SimpleNamespace(world_size=2, device_communicator=SimpleNamespace(all_reduce=None))
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: group)


@pytest.mark.parametrize("name", ["host_pinned", "Peer-Push", "nccl", "auto"])
def test_a_tier_that_there_is_not_is_refused(monkeypatch, name):
    """It would be vLLM's own, over a link that nothing has proven."""
    monkeypatch.setenv("DSV4_ALLREDUCE_TIER", name)
    known = ", ".join(sorted(tier.value for tier in Tier))
    with pytest.raises(ValueError, match="must be one of ") as refused:
        Worker().init_device()
    assert f"DSV4_ALLREDUCE_TIER = {name!r}; must be one of " in str(refused.value)
    assert ", ".join(sorted(str(refused.value).partition("one of ")[2].split(", "))) == known


def test_the_tiers_of_others_are_left_to_vllm(monkeypatch):
    for name in ("", "vllm-custom", "nccl-p2p", "nccl-shm"):
        monkeypatch.setenv("DSV4_ALLREDUCE_TIER", name)
        assert chosen_tier() is None
        Worker().init_device()


@pytest.mark.parametrize("which", ["", "EAGER_", "START_"])
@pytest.mark.parametrize(
    ("text", "rule"), [("30s", "a number of seconds is needed"), ("0", "it must be 0.001")]
)
def test_a_wrong_deadline_is_refused_before_anything_is_made(monkeypatch, which, text, rule):
    monkeypatch.setenv("DSV4_ALLREDUCE_TIER", "host-pinned")
    name = f"DSV4_ALLREDUCE_{which}DEADLINE_S"
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=rule) as refused:
        Worker().init_device()
    assert name in str(refused.value)
