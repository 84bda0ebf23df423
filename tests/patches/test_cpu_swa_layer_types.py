"""Guard of cpu-name-every-layer-type-of-deepseek-v4-in-the-swa-metadata.patch."""

import pytest

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine


def test_the_cpu_builder_plans_every_layer_type_that_the_shared_builder_reads():
    from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder
    from vllm.v1.attention.backends.mla import sparse_swa

    builder = object.__new__(DeepseekV4CPUSparseSWAMetadataBuilder)
    read = {value for name, value in vars(sparse_swa).items() if name.startswith("_LAYER_TYPE_")}
    assert len(read) == 5
    assert builder.build_tile_scheduler(1) == dict.fromkeys(read)
