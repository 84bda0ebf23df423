"""Guard of moe-let-moe-backend-ask-for-a-plugins-experts.patch."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine


class Offered:
    """An experts class of a plugin that is made for one device, and asked for on another."""

    @staticmethod
    def is_supported_config(cls, config, weight_key, activation_key, activation_format):
        asked = config.moe_backend == "external"
        return asked, None if asked else "another device"


def select(moe_backend: str):
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16
    from vllm.model_executor.layers.quantization.utils.quant_utils import kInt4Static

    config = SimpleNamespace(
        moe_backend=moe_backend,
        moe_parallel_config=SimpleNamespace(use_batched_activation_format=False),
    )
    scheme = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=128)
    return int_wna16.select_wna16_moe_backend(
        config, kInt4Static, scheme, may_have_zp=False, may_have_bias=False
    )


@pytest.fixture
def offered(monkeypatch):
    from vllm.model_executor.layers.fused_moe.oracle import base, int_wna16

    monkeypatch.setitem(base.EXTERNAL_EXPERTS, "wna16", [Offered])
    monkeypatch.setattr(int_wna16, "_get_priority_backends", list)


@pytest.mark.usefixtures("offered")
def test_a_plugins_experts_can_be_asked_for_by_name():
    assert select("external")[1] is Offered


@pytest.mark.usefixtures("offered")
def test_what_is_not_asked_for_is_not_taken():
    with pytest.raises(NotImplementedError):
        select("auto")


def test_the_command_line_takes_the_name():
    from vllm.config import KernelConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    assert parser.parse_args(["--moe-backend", "external"]).moe_backend == "external"
    assert KernelConfig(moe_backend="external").moe_backend == "external"
