"""Guard of mhc-let-the-first-layer-run-without-deepgemm.patch."""

import sys
import types

import pytest
import torch

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine
TOKENS, HIDDEN, HC = 3, 1024, 4
KERNELS = "vllm.model_executor.kernels.mhc.tilelang_kernels"


def test_the_first_layer_falls_back_to_tilelang(monkeypatch):
    import vllm.utils.deep_gemm as deep_gemm
    from vllm.model_executor.kernels.mhc.tilelang import mhc_pre_broadcast_tilelang

    seen = {}

    def prenorm_gemm(x, fn, out, sqrsum, hidden_size, hc_mult):
        """What the TileLang kernel computes, and its own check of the sizes."""
        assert x.shape[1] == hc_mult * hidden_size
        out[0] = x.float() @ fn.t()
        sqrsum[0] = x.float().square().sum(-1)

    def fuse(gemm_out, sqrsum, *args, **kwargs):
        seen["gemm"], seen["sqrsum"] = gemm_out, sqrsum

    def refuse(*args):
        raise AssertionError("DeepGEMM was called")

    kernels = types.ModuleType(KERNELS)  # the real one needs TileLang
    kernels.compute_num_split = refuse
    kernels._HC_PRENORM_GEMM_TILELANG_KERNEL = prenorm_gemm
    kernels._MHC_PRE_BIG_FUSE_TILELANG_KERNEL = fuse
    monkeypatch.setitem(sys.modules, KERNELS, kernels)
    monkeypatch.setattr(deep_gemm, "is_deep_gemm_supported", lambda: False)
    monkeypatch.setattr(deep_gemm, "tf32_hc_prenorm_gemm", refuse)
    mix = HC * (2 + HC)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    fn = torch.randn(mix, HC * HIDDEN, generator=generator)
    broadcast = fn.view(mix, HC, HIDDEN).sum(1)
    mhc_pre_broadcast_tilelang(
        x,
        fn,
        torch.ones(3),
        torch.zeros(mix),
        1e-6,
        1e-6,
        1e-6,
        2.0,
        20,
        norm_weight=torch.ones(HIDDEN).bfloat16(),
        fn_broadcast=broadcast,
    )
    # The same as with the stream repeated hc_mult times.
    repeated = x.float().repeat(1, HC) @ fn.t()
    assert seen["gemm"].shape == (1, TOKENS, mix)
    torch.testing.assert_close(seen["gemm"][0], repeated, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(seen["sqrsum"][0], x.float().square().sum(-1))
