"""Targets that name the MTP head, in vLLM's names."""

from types import SimpleNamespace

import pytest

from kernels.quant_targets import align_mtp_targets, align_target


@pytest.mark.parametrize(
    ("target", "aligned"),
    [
        ("mtp.0.attn.wq_a", "model.layers.43.attn.wq_a"),
        ("model.mtp.0.attn.wq_a", "model.layers.43.attn.wq_a"),
        (r"re:.*mtp\..*", r"re:.*layers\.43\..*"),
        (r"re:mtp\.0\.attn\.wq_a$", r"re:(?:model\.)?layers\.43\.attn\.wq_a$"),
        (r"re:mtp\.\d+\.e_proj", r"re:(?:model\.)?layers\.43\.e_proj"),
        (r"re:.*mtp.0.ffn", r"re:.*layers\.43\.ffn"),
        (r"re:.*attn\.(wq_a|wkv)$", r"re:.*attn\.(wq_a|wkv)$"),
        ("Linear", "Linear"),
        ("model.layers.1.attn.wq_a", "model.layers.1.attn.wq_a"),
    ],
)
def test_align_target(target, aligned):
    assert align_target(target, 43, 1) == aligned


def test_several_mtp_layers_are_named_by_number():
    assert align_target("mtp.1.e_proj", 43, 2) == "model.layers.44.e_proj"
    with pytest.raises(ValueError, match=r"re:\.\*mtp.*2 MTP layers; name each by number"):
        align_target(r"re:.*mtp\..*", 43, 2)


def test_the_config_is_rewritten_in_place_and_twice_is_once():
    config = SimpleNamespace(
        target_scheme_map={"mtp.0.attn.wq_a": "fp8", "Linear": "int4"}, ignore=["mtp.0.e_proj"]
    )
    for _ in range(2):
        align_mtp_targets(config, 4, 1)
        assert config.target_scheme_map == {"model.layers.4.attn.wq_a": "fp8", "Linear": "int4"}
        assert config.ignore == ["model.layers.4.e_proj"]


def test_a_config_of_another_kind_is_left_alone():
    align_mtp_targets(None, 4, 1)
    align_mtp_targets(SimpleNamespace(weight_block_size=[128, 128]), 4, 1)
