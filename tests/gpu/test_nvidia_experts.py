"""Our experts inside vLLM's kernel on a GPU: by our operators and by Marlin, from one copy."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from kernels.dispatch import Dispatch, Kernel
from tests.gpu.test_kernels import (
    DEEPSEEK,
    Problem,
    assert_as_good_as_pytorch,
    capture,
    make_problem,
    same_bits,
)

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

SHAPE = DEEPSEEK[1]
LIMIT = 10.0
TOKENS = [1, 2, 4, 5, 16, 64, 300]
REPLAYS = 100


@pytest.fixture(scope="module", autouse=True)
def workspaces():
    """vLLM's, as its model runner makes them: Marlin's locks come from there."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from vllm.v1.worker import workspace

    workspace.init_workspace_manager(torch.device("cuda", torch.cuda.current_device()))
    yield
    workspace.reset_workspace_manager()


@pytest.fixture(scope="module")
def weights() -> torch.nn.Module:
    """A layer as the loader leaves it; the first kernel lays it out."""
    stored = make_problem(SHAPE, 1).layer.stored
    layer = torch.nn.Module()
    for name in ("w13", "w2"):
        for stem, leaf in (("packed", "weight_packed"), ("scale", "weight_scale")):
            tensor = getattr(stored, f"{name}_{stem}").clone()
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(f"{name}_{leaf}", parameter)
    return layer


@pytest.fixture(scope="module")
def made(weights):
    """vLLM's kernel object with our experts, weights laid out."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16

    from kernels.nvidia.experts import Dsv4MaxqExperts, offer_experts

    offer_experts()
    config = FusedMoEConfig(
        num_experts=SHAPE.experts,
        experts_per_token=SHAPE.top_k,
        hidden_dim=SHAPE.hidden,
        intermediate_size=SHAPE.inter,
        num_local_experts=SHAPE.experts,
        num_logical_experts=SHAPE.experts,
        activation=MoEActivation.SILU,
        device="cuda",
        routing_method=RoutingMethodType.DeepseekV4,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        moe_backend="external",
        swiglu_limit=LIMIT,
    )
    config.weight_group_size = 128
    quant_config = int_wna16.make_wna16_moe_quant_config(
        weights.w13_weight_scale,
        weights.w2_weight_scale,
        group_size=128,
        num_bits=4,
        gemm1_clamp_limit=LIMIT,
    )
    kernel = int_wna16.make_wna16_moe_kernel(
        quant_config, config, Dsv4MaxqExperts, int_wna16.WNA16MoEBackend.EXTERNAL
    )
    kernel.fused_experts.process_weights_after_loading(weights)
    return kernel


def serve_with(made, name: str) -> None:
    """Have every batch served by this kernel, whatever tables say."""
    made.fused_experts.dispatch = Dispatch(((None, Kernel(name)),), None, "the test")


def run(made, name: str, weights, problem: Problem) -> torch.Tensor:
    serve_with(made, name)
    return made.apply(
        problem.hidden,
        weights.w13_weight,
        weights.w2_weight,
        topk_weights=problem.weights,
        topk_ids=problem.ids,
        activation=made.moe_config.activation,
        global_num_experts=SHAPE.experts,
        expert_map=None,
        apply_router_weight_on_input=False,
    )


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", ["ours", "marlin"])
def test_either_kernel_is_as_exact_as_pytorch_on_the_same_copy(made, weights, name, tokens):
    problem = make_problem(SHAPE, tokens, limit=LIMIT)
    assert_as_good_as_pytorch(problem, run(made, name, weights, problem))


@pytest.mark.usefixtures("made")
def test_the_layout_is_what_vllm_prepares_for_marlin(weights):
    """Of w2, whose rows stay in their order."""
    import vllm._custom_ops as vllm_ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_moe_permute_scales

    stored, sizes = make_problem(SHAPE, 1).layer.stored, (SHAPE.inter, SHAPE.hidden)
    packed = stored.w2_packed.transpose(1, 2).contiguous()  # (experts, k / 8, n)
    theirs = vllm_ops.gptq_marlin_moe_repack(packed, *sizes, 4)
    assert torch.equal(theirs, weights.w2_weight_packed)
    scale = stored.w2_scale.transpose(1, 2).contiguous()
    assert torch.equal(marlin_moe_permute_scales(scale, *sizes, 128), weights.w2_weight_scale)


def test_graphs_of_both_kernels_replay_what_they_gave(made, weights):
    problems = {name: make_problem(SHAPE, tokens) for name, tokens in (("ours", 2), ("marlin", 16))}
    expected = {name: run(made, name, weights, p) for name, p in problems.items()}
    outs: dict[str, torch.Tensor] = {}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for name, problem in problems.items():
            run(made, name, weights, problem)  # warm-up on the stream of the capture

    def step(name: str) -> None:
        outs[name] = run(made, name, weights, problems[name])

    graph = capture([lambda: step("ours"), lambda: step("marlin")], stream)
    for _ in range(REPLAYS):
        graph.replay()
        torch.cuda.synchronize()
        for name, out in outs.items():
            assert same_bits(out, expected[name]), name


@pytest.mark.parametrize("pair", [("ours", "marlin"), ("ours", "ours"), ("marlin", "marlin")])
def test_two_streams_at_once_give_what_each_gives_alone(made, weights, pair):
    """By the experts alone: vLLM's wrapper takes outputs from a workspace of all streams."""
    problems = [make_problem(SHAPE, tokens, seed=tokens) for tokens in (2, 48)]
    expected = [run(made, name, weights, p) for name, p in zip(pair, problems, strict=True)]
    streams = [torch.cuda.Stream() for _ in pair]
    outs: list[list[torch.Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(REPLAYS):
        for i, (name, problem, stream) in enumerate(zip(pair, problems, streams, strict=True)):
            serve_with(made, name)
            with torch.cuda.stream(stream):
                out = torch.empty_like(problem.hidden)
                made.fused_experts.apply(
                    out,
                    problem.hidden,
                    weights.w13_weight,
                    weights.w2_weight,
                    problem.weights,
                    problem.ids,
                    activation=None,
                    global_num_experts=SHAPE.experts,
                    expert_map=None,
                    a1q_scale=None,
                    a2_scale=None,
                    workspace13=None,
                    workspace2=None,
                    expert_tokens_meta=None,
                    apply_router_weight_on_input=False,
                )
                outs[i].append(out)
    torch.cuda.synchronize()
    for given, exact in zip(outs, expected, strict=True):
        assert all(same_bits(out, exact) for out in given)
