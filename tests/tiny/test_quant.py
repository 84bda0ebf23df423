import pytest
import torch

from kernels import formats
from tiny import quant
from tiny.model import DeepseekV4


def random_matrix(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(256, 384, generator=generator) * scale


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_fake_fp4_equals_the_stored_format(scale):
    weight = random_matrix(scale=scale)
    stored = formats.dequantize_fp4(*formats.quantize_fp4(weight))
    assert torch.equal(quant.fake_fp4(weight), stored)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_fake_fp8_equals_the_stored_format(scale):
    weight = random_matrix(scale=scale)
    stored = formats.dequantize_fp8_block(*formats.quantize_fp8_block(weight))
    assert torch.equal(quant.fake_fp8_block(weight), stored)


def test_gradients_pass_straight_through():
    weight = random_matrix().requires_grad_(True)
    (quant.fake_fp4(weight) * 3).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 3.0))


def test_the_kv_cache_keeps_rope_in_bfloat16_and_the_rest_in_fp8_groups_of_64():
    kv = torch.randn(2, 5, 512, generator=torch.Generator().manual_seed(0))
    cached = quant.fake_kv_cache(kv, 64)
    assert torch.equal(cached[..., 448:], kv[..., 448:].bfloat16().float())
    nope = cached[..., :448].unflatten(-1, (7, 64))
    scale = formats.ue8m0_scale(
        kv[..., :448].bfloat16().float().unflatten(-1, (7, 64)).abs().amax(-1, True), 448.0
    )
    codes = nope / scale
    assert torch.equal(codes, codes.to(torch.float8_e4m3fn).float())
    # Half an e4m3 step is 2**-4 of a value, or 2**-10 of the scale near 0; BF16's is 2**-9 of it.
    allowed = 0.07 * kv[..., :448].abs() + (2.0**-10 * scale).expand_as(nope).flatten(-2)
    assert ((cached - kv)[..., :448].abs() <= allowed).all()


def test_small_groups_use_the_floor_of_the_scale():
    x = torch.full((1, 64), 1e-6)
    scale = 2.0**-22  # 1e-4 / 448 rounded up; 1e-6 / scale = 4.19 lies between 4 and 4.5
    assert torch.equal(quant.fake_fp8_groups(x, 64), torch.full((1, 64), 4.0 * scale))


def test_each_switch_changes_the_output(tiny_config):
    torch.manual_seed(0)
    model = DeepseekV4(tiny_config).eval().requires_grad_(False)
    tokens = torch.arange(40)[None]
    outputs = []
    for weights, caches in ((False, False), (True, False), (False, True)):
        model.set_quantization(weights, caches)
        outputs.append(model(tokens))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
