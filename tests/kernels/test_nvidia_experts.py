"""Our experts behind vLLM's interface, with our operators and Marlin's replaced by PyTorch."""

from __future__ import annotations

import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("vllm")

from kernels import build, dispatch, ops, reference
from kernels.dispatch import Kernel
from kernels.formats import dequantize_int4, quantize_int4
from kernels.tiled import tile_scale, tile_weight, untile_scale, untile_weight
from tests.kernels.library_folder import write_library

pytestmark = pytest.mark.engine

EXPERTS, HIDDEN, INTER, TOP_K, LIMIT = 4, 256, 384, 2, 3.0
SIZES = dict(hidden_size=HIDDEN, inter_size=INTER, num_experts=EXPERTS, top_k=TOP_K)
MAXQ, H100 = ("RTX PRO 6000 Max-Q", (12, 0)), ("H100", (9, 0))
OURS_TO_4 = [{"max_tokens": 4, "kernel": "ours"}, {"max_tokens": None, "kernel": "marlin"}]
ALWAYS_OURS = [{"max_tokens": None, "kernel": "ours"}]


# ---------------------------------------------------------------------------- surroundings


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch, tmp_path):
    """A built library, no dispatch table, an RTX PRO 6000."""
    monkeypatch.setenv(build.FOLDER_ENV, str(write_library(tmp_path / "library")))
    monkeypatch.setattr(dispatch, "FOLDER", tmp_path / "tables")
    monkeypatch.delenv(dispatch.ENV, raising=False)
    monkeypatch.delenv("VLLM_MARLIN_INPUT_DTYPE", raising=False)
    set_device(monkeypatch, *MAXQ)
    torch.manual_seed(0)


def set_device(monkeypatch, name: str, capability: tuple[int, int]) -> None:
    from vllm.platforms.interface import DeviceCapability

    from kernels.nvidia import experts, selection

    platform = SimpleNamespace(
        is_cuda=lambda: True,
        get_device_name=lambda: name,
        get_device_capability=lambda: DeviceCapability(*capability),
    )
    monkeypatch.setattr(selection, "current_platform", platform)
    monkeypatch.setattr(experts, "current_platform", platform)


def write_table(segments, device=MAXQ, **sizes) -> None:
    """A table that ships; the folder is this test's."""
    dispatch.FOLDER.mkdir(exist_ok=True)
    name, capability = device
    body = {
        "schema_version": 1,
        "device": name,
        "capability": "{}.{}".format(*capability),
        "tables": [{**SIZES, **sizes, "segments": segments}],
    }
    (dispatch.FOLDER / f"{name}.json").write_text(json.dumps(body))


@pytest.fixture
def warnings(caplog):
    """Messages of our log at warning level; each is logged once a process, so that is undone."""
    from vllm import logger

    logger._print_warning_once.cache_clear()
    root = logging.getLogger("vllm")
    before, root.propagate = root.propagate, True
    yield lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    root.propagate = before


def moe_config(backend="auto", **changes):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    group_size = changes.pop("weight_group_size", 128)
    arguments = dict(
        num_experts=EXPERTS,
        experts_per_token=TOP_K,
        hidden_dim=HIDDEN,
        intermediate_size=INTER,
        num_local_experts=EXPERTS,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.DeepseekV4,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        moe_backend=backend,
        swiglu_limit=LIMIT,
    )
    config = FusedMoEConfig(**arguments | changes)
    config.weight_group_size = group_size
    return config


def supported(config, weight_key=None):
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.quantization.utils.quant_utils import kInt4Static

    from kernels.nvidia.experts import Dsv4MaxqExperts

    standard = mk.FusedMoEActivationFormat.Standard
    key = weight_key or kInt4Static
    return Dsv4MaxqExperts.is_supported_config(Dsv4MaxqExperts, config, key, None, standard)


# ------------------------------------------------------------------------------- selection


def test_they_are_chosen_by_themselves_on_sm_120_where_a_table_says_when():
    assert supported(moe_config())[0] is False
    write_table(OURS_TO_4)
    assert supported(moe_config()) == (True, None)


def test_elsewhere_they_are_chosen_only_when_asked_for(monkeypatch, warnings):
    set_device(monkeypatch, *H100)
    write_table(OURS_TO_4, H100)
    taken, reason = supported(moe_config())
    assert (taken, warnings()) == (False, [])
    assert reason == (
        "compute capability 9.0; they are chosen by themselves on 12.0 only, elsewhere with "
        "--moe-backend external"
    )
    assert supported(moe_config("external")) == (True, None)


def test_another_backend_that_is_asked_for_is_not_taken_over(warnings):
    write_table(OURS_TO_4)
    assert supported(moe_config("marlin"))[0] is False
    assert warnings() == []


@pytest.mark.parametrize("capability", [(7, 5), (10, 0), (12, 1)])
def test_a_gpu_without_code_is_refused_also_when_asked_for(monkeypatch, capability):
    set_device(monkeypatch, "another", capability)
    taken, reason = supported(moe_config("external"))
    assert not taken
    assert "compute capability {}.{}; the library has code for".format(*capability) in reason


def test_a_shape_that_nobody_measured_is_left_to_marlin_and_the_log_says_so(warnings):
    write_table(OURS_TO_4, hidden_size=512)
    taken, reason = supported(moe_config())
    assert not taken
    assert reason.startswith("no dispatch table has Shape(hidden_size=256, inter_size=384")
    [message] = warnings()
    assert message == f"INT4 experts: vLLM's own serve, not Dsv4MaxqExperts: {reason}"


def test_asked_for_without_a_table_they_serve_every_batch():
    from kernels.nvidia.selection import choose_dispatch

    assert supported(moe_config("external")) == (True, None)
    found = choose_dispatch(moe_config("external"))
    assert found.kernels == {Kernel.OURS}
    assert found.measured_on is None
    assert found.source.startswith("asked for, and no table is of a layer like Shape(")


def test_asked_for_with_a_table_the_table_holds():
    from kernels.nvidia.selection import choose_dispatch

    write_table(OURS_TO_4, H100)
    assert choose_dispatch(moe_config("external")).kernel(5) is Kernel.MARLIN


def test_marlin_serves_no_layer_of_a_single_group():
    """It reads the scales of k = 128 in another order than ours."""
    from kernels.nvidia.selection import choose_dispatch

    config = {"intermediate_size": 128}
    write_table(OURS_TO_4, inter_size=128)
    assert supported(moe_config(**config)) == (
        False,
        "Shape(hidden_size=256, inter_size=128, num_experts=4, top_k=2): Marlin reads the scales "
        "of a single group in another order",
    )
    assert choose_dispatch(moe_config("external", **config)).kernels == {Kernel.OURS}
    write_table(ALWAYS_OURS, inter_size=128)
    assert supported(moe_config(**config)) == (True, None)


def parallel(**changes):
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    config = FusedMoEParallelConfig.make_no_parallel()
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_on_two_ranks_the_table_is_that_of_a_ranks_part():
    config = {"moe_parallel_config": parallel(tp_size=2), "intermediate_size": 2 * INTER}
    write_table(OURS_TO_4)
    assert supported(moe_config(**config)) == (True, None)
    write_table(OURS_TO_4, inter_size=2 * INTER)
    assert supported(moe_config(**config))[0] is False


REFUSED = {
    "groups of 64": ({"weight_group_size": 64}, "weight_group_size = 64; 128 is needed"),
    "not compressed-tensors": ({"weight_group_size": None}, "weight_group_size = None; 128 is"),
    "fp16": ({"in_dtype": torch.float16}, "activations are torch.float16; bfloat16 is needed"),
    "expert parallel": (
        lambda: {"moe_parallel_config": parallel(use_ep=True)},
        "expert parallelism; each rank must hold a part of every expert",
    ),
    "bias": ({"has_bias": True}, "the experts have a bias"),
    "alpha": ({"swiglu_alpha": 1.7, "swiglu_beta": 1.0}, r"swiglu_alpha, swiglu_beta = \(1.7, 1"),
    "hidden": ({"hidden_dim": 320}, "hidden_size=320.*must be multiples of 128"),
    "inter": ({"intermediate_size": 192}, "inter_size=192.*must be multiples of 128"),
    "experts": ({"num_local_experts": 1025}, "at most 1024 experts and top_k 16 are supported"),
    "top_k": ({"experts_per_token": 17}, "at most 1024 experts and top_k 16 are supported"),
    "activation": (lambda: {"activation": activation("GELU")}, "MoEActivation.GELU activation"),
    "LoRA": ({"is_lora_enabled": True}, "LoRA"),
}


def activation(name: str):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    return MoEActivation[name]


@pytest.mark.parametrize("backend", ["auto", "external"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_do_not_compute_is_refused_with_the_reason(name, backend, warnings):
    changes, message = REFUSED[name]
    changes = changes() if callable(changes) else changes
    write_table(ALWAYS_OURS)
    assert supported(moe_config(backend)) == (True, None)
    taken, reason = supported(moe_config(backend, **changes))
    assert not taken
    assert re.search(message, reason)
    # Asked for, vLLM's oracle makes an error of the reason; else Marlin serves, and the log says it
    assert len(warnings()) == (backend == "auto")


def test_zero_points_are_refused():
    from vllm.model_executor.layers.quantization.utils.quant_utils import kInt4StaticAsym

    write_table(ALWAYS_OURS)
    taken, reason = supported(moe_config(), kInt4StaticAsym)
    assert not taken
    assert "quantization scheme" in reason


def test_activations_in_another_type_are_marlins(monkeypatch):
    write_table(ALWAYS_OURS)
    monkeypatch.setenv("VLLM_MARLIN_INPUT_DTYPE", "int8")
    assert supported(moe_config()) == (
        False,
        "VLLM_MARLIN_INPUT_DTYPE = 'int8'; activations stay BF16",
    )


# --------------------------------------------------------------------------------- library

LINE = r"run `make kernels`, or take vLLM's own with --moe-backend marlin$"


@pytest.mark.parametrize("backend", ["auto", "external"])
def test_without_the_library_the_load_fails_with_one_line(monkeypatch, tmp_path, backend):
    write_table(OURS_TO_4)
    monkeypatch.setenv(build.FOLDER_ENV, str(tmp_path / "empty"))
    with pytest.raises(RuntimeError, match=rf"^kernels: .*\.so is not built; {LINE}"):
        supported(moe_config(backend))
    assert supported(moe_config("marlin"))[0] is False


def test_a_library_without_code_for_the_gpu_fails_the_load(monkeypatch, tmp_path):
    write_table(OURS_TO_4)
    monkeypatch.setenv(build.FOLDER_ENV, str(write_library(tmp_path / "some", ("sm_80", "sm_90"))))
    with pytest.raises(RuntimeError, match=rf"has code for sm_80, sm_90, none for sm_120a; {LINE}"):
        supported(moe_config())
    set_device(monkeypatch, "A6000", (8, 6))
    assert supported(moe_config("external")) == (True, None)


def test_a_layer_that_is_not_ours_needs_no_library(monkeypatch, tmp_path):
    write_table(OURS_TO_4)
    monkeypatch.setenv(build.FOLDER_ENV, str(tmp_path / "empty"))
    assert supported(moe_config(weight_group_size=64))[0] is False


def test_they_are_offered_once():
    from vllm.model_executor.layers.fused_moe.oracle import base

    from kernels.nvidia.experts import Dsv4MaxqExperts, offer_experts

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(base.EXTERNAL_EXPERTS, "wna16", [])
        offer_experts()
        offer_experts()
        assert base.EXTERNAL_EXPERTS["wna16"] == [Dsv4MaxqExperts]


# ----------------------------------------------------------------------------- computation


@pytest.fixture
def stored() -> reference.Experts:
    """Experts as compressed-tensors stores them."""

    def quantized(*shape):
        pairs = [quantize_int4(torch.randn(shape))[:2] for _ in range(EXPERTS)]
        return [torch.stack(tensors) for tensors in zip(*pairs, strict=True)]

    return reference.Experts(*quantized(2 * INTER, HIDDEN), *quantized(HIDDEN, INTER))


@pytest.fixture
def layer(stored) -> torch.nn.Module:
    """What the loader leaves."""
    module = torch.nn.Module()
    for name in ("w13", "w2"):
        for stem, leaf in (("packed", "weight_packed"), ("scale", "weight_scale")):
            tensor = getattr(stored, f"{name}_{stem}").clone()
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            module.register_parameter(f"{name}_{leaf}", parameter)
        setattr(module, f"{name}_weight", getattr(module, f"{name}_weight_packed"))
    return module


@pytest.fixture
def kernel(layer, monkeypatch):
    """kernel(segments, **config): vLLM's kernel on the layer, weights laid out."""
    from vllm.model_executor.layers.fused_moe.oracle import base, int_wna16

    from kernels.nvidia.experts import Dsv4MaxqExperts

    monkeypatch.setitem(base.EXTERNAL_EXPERTS, "wna16", [Dsv4MaxqExperts])

    def make(segments, **config):
        write_table(segments)
        quant_config = int_wna16.make_wna16_moe_quant_config(
            layer.w13_weight_scale,
            layer.w2_weight_scale,
            group_size=128,
            num_bits=4,
            gemm1_clamp_limit=LIMIT,
        )
        made = int_wna16.make_wna16_moe_kernel(
            quant_config,
            moe_config(**config),
            Dsv4MaxqExperts,
            int_wna16.WNA16MoEBackend.EXTERNAL,
        )
        made.fused_experts.process_weights_after_loading(layer)
        return made

    return make


@pytest.fixture
def our_operators():
    """`torch.ops.dsv4_maxq.*` on a CPU, computed by the reference."""

    def moe(hidden, ids, weights, w13, w13_scale, w2, w2_scale, limit, out):
        ops.check_moe(hidden, ids, weights, w13, w13_scale, w2, w2_scale, limit, out)
        experts = reference.Experts(
            untile_weight(w13, gated=True),
            untile_scale(w13_scale, gated=True),
            untile_weight(w2),
            untile_scale(w2_scale),
        )
        out.copy_(reference.moe(hidden, experts, ids, weights, limit))

    def silu(gate_up, limit, out):
        ops.check_silu(gate_up, limit, out)
        out.copy_(reference.silu_interleaved(gate_up, limit))

    library = torch.library.Library("dsv4_maxq", "IMPL")
    library.impl("moe_w4a16", moe, "CPU", allow_override=True)
    library.impl("silu_interleaved", silu, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.fixture
def marlins_operators(monkeypatch):
    """vLLM's, as they are documented: alignment by expert, GEMM over aligned rows, sum."""
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe
    from vllm.scalar_type import scalar_types

    def align(topk_ids, block, num_experts, expert_map, ignore_invalid_experts):
        assert (num_experts, expert_map, ignore_invalid_experts) == (EXPERTS, None, True)
        flat, rows, owners = topk_ids.flatten().tolist(), [], []
        for expert in range(num_experts):
            mine = [i for i, e in enumerate(flat) if e == expert]
            mine += [len(flat)] * (-len(mine) % block)
            rows += mine
            owners += [expert] * (len(mine) // block)
        return torch.tensor(rows), torch.tensor(owners), torch.tensor([len(rows)])

    def gemm(a, c, weight, bias, scale, *none, **given):
        a_scale, global_scale, zeros, locks, rows, owners, count, route = none
        assert (bias, a_scale, global_scale, zeros) == (None,) * 4
        assert given["b_q_type"] == scalar_types.uint4b8
        assert (given["size_m"], given["size_k"]) == tuple(a.shape)
        assert given["size_n"] == c.shape[1]
        assert locks is LOCKS
        c.fill_(float("nan"))
        size = given["moe_block_size"]
        assert int(count) == len(rows)
        for place, row in enumerate(rows.tolist()):
            if row < len(c):
                expert = owners[place // size]
                values = dequantize_int4(untile_weight(weight[expert]), untile_scale(scale[expert]))
                out = values @ a[row // given["top_k"]].float()
                c[row] = out * (route.flatten()[row] if given["mul_topk_weights"] else 1)
        return c

    monkeypatch.setattr(marlin_moe, "moe_align_block_size", align)
    monkeypatch.setattr(marlin_moe, "get_marlin_workspace", lambda device: LOCKS)
    monkeypatch.setattr("vllm._custom_ops.moe_wna16_marlin_gemm", gemm)
    monkeypatch.setattr(
        "vllm._custom_ops.moe_sum", lambda slots, out: out.copy_(slots.float().sum(1))
    )


LOCKS = torch.zeros(8, dtype=torch.int32)


def batch(tokens: int):
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).int()
    return torch.randn(tokens, HIDDEN).bfloat16(), ids, torch.rand(tokens, TOP_K)


def run(made, layer, x, ids, weights):
    return made.apply(
        x,
        layer.w13_weight,
        layer.w2_weight,
        topk_weights=weights,
        topk_ids=ids,
        activation=made.moe_config.activation,
        global_num_experts=EXPERTS,
        expert_map=None,
        apply_router_weight_on_input=False,
    )


def relative(out, exact) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 17])
@pytest.mark.usefixtures("our_operators", "marlins_operators")
def test_a_batch_comes_out_as_float64_says_by_either_kernel(kernel, layer, stored, tokens):
    made = kernel(OURS_TO_4)
    x, ids, weights = batch(tokens)
    out = run(made, layer, x, ids, weights)
    exact = reference.moe(x.double(), stored, ids, weights, LIMIT)
    plain = reference.moe(x, stored, ids, weights, LIMIT)
    assert relative(out, exact) < 2 * relative(plain, exact)
    # The clamp is not idle on these values.
    assert relative(out, reference.moe(x.double(), stored, ids, weights, None)) > 0.1


@pytest.mark.parametrize(
    ("tokens", "name"), [(1, "ours"), (4, "ours"), (5, "marlin"), (6, "marlin"), (7, "ours")]
)
def test_the_table_says_which_kernel_runs(kernel, layer, monkeypatch, tokens, name):
    from kernels.nvidia import marlin

    calls = []
    monkeypatch.setattr(ops, "moe_w4a16", lambda *_, out: calls.append("ours"))
    monkeypatch.setattr(marlin, "moe", lambda *_, out: calls.append("marlin"))
    segments = [
        {"max_tokens": 4, "kernel": "ours"},
        {"max_tokens": 6, "kernel": "marlin"},
        {"max_tokens": None, "kernel": "ours"},
    ]
    run(kernel(segments), layer, *batch(tokens))
    assert calls == [name]


def test_no_token_runs_nothing(kernel, layer):
    out = run(kernel(OURS_TO_4), layer, *batch_of_none())
    assert out.shape == (0, HIDDEN)


def batch_of_none():
    ids = torch.empty(0, TOP_K, dtype=torch.int32)
    return torch.empty(0, HIDDEN, dtype=torch.bfloat16), ids, torch.empty(0, TOP_K)


def test_weights_are_laid_out_where_they_lie(kernel, layer, stored):
    addresses = {name: p.data_ptr() for name, p in layer.named_parameters()}
    made = kernel(OURS_TO_4)
    experts = made.fused_experts
    for name, gated, scale in (("w13", True, experts.w1_scale), ("w2", False, experts.w2_scale)):
        weight = getattr(layer, f"{name}_weight_packed")
        assert torch.equal(weight, tile_weight(getattr(stored, f"{name}_packed"), gated))
        assert torch.equal(scale, tile_scale(getattr(stored, f"{name}_scale"), gated))
        assert getattr(layer, f"{name}_weight") is weight
        assert getattr(layer, f"{name}_weight_scale") is scale
    assert {name: p.data_ptr() for name, p in layer.named_parameters()} == addresses


def test_weights_that_are_laid_out_already_are_refused(kernel, layer):
    made = kernel(OURS_TO_4)
    before = layer.w13_weight_packed.clone()
    with pytest.raises(ValueError, match=r"w13_weight_packed has shape \(4, 16, 1536\), .* as sto"):
        made.fused_experts.process_weights_after_loading(layer)
    assert torch.equal(layer.w13_weight_packed, before)


def test_the_log_says_which_kernel_serves_which_batch(kernel, warnings, caplog):
    from vllm import logger

    logger._print_info_once.cache_clear()
    caplog.set_level(logging.INFO)
    kernel(OURS_TO_4)
    line = "INT4 experts: ours for 1 to 4 tokens, marlin for 5 and more tokens (RTX PRO 6000 Max-Q."
    assert any(r.getMessage().startswith(line) for r in caplog.records)
    assert warnings() == []


def test_a_table_of_another_device_is_named(kernel, monkeypatch, warnings):
    set_device(monkeypatch, "RTX PRO 6000 Server", (12, 0))
    kernel(OURS_TO_4)
    [message] = warnings()
    assert "that was measured on RTX PRO 6000 Max-Q; `python -m bench.kernels" in message
    assert message.endswith("measures it on this RTX PRO 6000 Server")


def test_vllms_shared_workspace_is_not_used(kernel):
    made = kernel(OURS_TO_4)
    shapes = made.fused_experts.workspace_shapes(7, 1, HIDDEN, TOP_K, 4, 4, None, None)
    assert shapes == ((0,), (0,), (7, HIDDEN))


@pytest.mark.parametrize(
    "changes", [{"expert_map": torch.arange(EXPERTS)}, {"apply_router_weight_on_input": True}]
)
def test_what_vllm_must_not_ask_of_a_batch_is_refused(kernel, layer, changes):
    experts = kernel(OURS_TO_4).fused_experts
    x, ids, weights = batch(1)
    arguments = dict(
        output=torch.empty_like(x),
        hidden_states=x,
        w1=layer.w13_weight,
        w2=layer.w2_weight,
        topk_weights=weights,
        topk_ids=ids,
        activation=None,
        global_num_experts=EXPERTS,
        expert_map=None,
        a1q_scale=None,
        a2_scale=None,
        workspace13=None,
        workspace2=None,
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    with pytest.raises(ValueError, match="Dsv4MaxqExperts: expert_map = .*; no map and False are"):
        experts.apply(**arguments | changes)


def test_fake_tensors_pass_through(kernel, layer):
    made = kernel(OURS_TO_4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = run(made, layer, *batch(3))
    assert out.shape == (3, HIDDEN)
    assert out.dtype == torch.bfloat16


@pytest.mark.usefixtures("our_operators")
def test_a_compiled_graph_holds_the_operator(kernel, layer):
    made = kernel(OURS_TO_4)
    x, ids, weights = batch(3)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(made, layer, x, ids, weights), run(made, layer, x, ids, weights))
