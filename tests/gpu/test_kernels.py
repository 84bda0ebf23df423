"""The W4A16 kernels on a GPU: as exact as PyTorch in BF16, the same bits each time, in any company.

Every call of `Problem.run` writes into an output between guard rows, all poisoned, and takes a
poisoned workspace with a guard behind it, but for the tests of streams and graphs, where torch's
allocator must serve.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch

from kernels import ops, reference, tiled
from kernels.ops import ALIGNMENT

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BF16 = torch.bfloat16
POISON = 0xFF  # NaN as BF16 and FP32, -1 as an integer
GUARD_BYTES = 4096


@dataclass(frozen=True)
class Shape:
    hidden: int
    inter: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.hidden}x{self.inter}-{self.top_k}of{self.experts}"


DEEPSEEK = [Shape(4096, 2048, 256, 6), Shape(4096, 1024, 256, 6)]  # TP 1 and 2
ODD = [
    Shape(128, 128, 3, 1),
    Shape(256, 128, 8, 2),
    Shape(384, 384, 5, 3),
    Shape(1152, 640, 16, 6),
]
WIDEST = Shape(256, 128, ops.MAX_EXPERTS, ops.MAX_TOP_K)
SMALL = ODD[2]

# Those of decode, verify and prefill, and both sides of every edge: 8 columns of an mma, tiles of
# 16, 32 and 64, the end of the unsorted path (8) and of the FP32 sums (256).
TOKENS = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 100, 256, 257, 2048]
ROUTINGS = ["uniform", "skewed", "one", "masked", "repeated"]


# ------------------------------------------------------------------------------- problems


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def random_weight(
    g: torch.Generator, experts: int, size_n: int, size_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight_packed of all codes alike, and scales that keep the size of what they multiply."""
    shape = (experts, size_n, size_k // 8)
    packed = torch.randint(
        -(2**31), 2**31 - 1, shape, dtype=torch.int32, device=DEVICE, generator=g
    )
    scale = 0.5 + torch.rand(experts, size_n, size_k // 128, device=DEVICE, generator=g)
    return packed, (scale / (3 * math.sqrt(size_k))).to(BF16)  # a code's spread is 4.6


@dataclass(frozen=True)
class Layer:
    shape: Shape
    stored: reference.Experts
    tiled: dict[str, torch.Tensor]


@functools.cache
def layer(shape: Shape) -> Layer:
    """Made once for all tests of a shape: 6 GB at TP 1, as stored and as tiled."""
    g = generator(shape.hidden + shape.inter)
    w13, w13_scale = random_weight(g, shape.experts, 2 * shape.inter, shape.hidden)
    w2, w2_scale = random_weight(g, shape.experts, shape.hidden, shape.inter)
    tiles = {
        "w13": tiled.tile_weight(w13, gated=True),
        "w13_scale": tiled.tile_scale(w13_scale, gated=True),
        "w2": tiled.tile_weight(w2),
        "w2_scale": tiled.tile_scale(w2_scale),
    }
    return Layer(shape, reference.Experts(w13, w13_scale, w2, w2_scale), tiles)


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    yield
    layer.cache_clear()
    linear.cache_clear()
    torch.cuda.empty_cache()


def route(kind: str, tokens: int, shape: Shape, g: torch.Generator) -> torch.Tensor:
    """int32 (tokens, top_k) expert ids."""
    experts, top_k = shape.experts, shape.top_k
    size = (tokens, experts)
    chance = torch.rand(size, device=DEVICE, generator=g)
    if kind == "one":  # the same experts for all
        ids = torch.arange(experts - top_k, experts, device=DEVICE).expand(tokens, top_k)
    elif kind == "repeated":  # with repetition, also within a token
        ids = torch.randint(0, min(experts, 3), (tokens, top_k), device=DEVICE, generator=g)
    elif kind == "skewed":  # Zipf, drawn without repetition (Gumbel)
        rank = torch.arange(1, experts + 1, device=DEVICE)
        ids = (-1.5 * rank.log() - (-chance.log()).log()).topk(top_k).indices
    else:
        ids = chance.topk(top_k).indices
    ids = ids.to(torch.int32).contiguous()
    if kind == "masked":  # -1, and ids that no expert has: both are skipped
        choice = torch.rand(ids.shape, device=DEVICE, generator=g)
        ids[choice < 0.4] = -1
        ids[choice < 0.15] = experts
        ids[choice < 0.10] = -7
        ids[choice < 0.05] = 2**31 - 1
        if tokens > 1:
            ids[tokens // 2] = -1  # a token without experts
    return ids


@dataclass(frozen=True)
class Problem:
    layer: Layer
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    limit: float | None

    def run(self, out: torch.Tensor | None = None) -> torch.Tensor:
        return ops.moe_w4a16(
            self.hidden,
            self.ids,
            self.weights,
            **self.layer.tiled,
            swiglu_limit=self.limit,
            out=out,
        )

    def refer(self, dtype: torch.dtype) -> torch.Tensor:
        hidden = self.hidden.to(dtype)
        return reference.moe(hidden, self.layer.stored, self.ids, self.weights, self.limit)


def make_problem(
    shape: Shape,
    tokens: int,
    routing: str = "uniform",
    limit: float | None = 10.0,
    seed: int = 0,
    size: float = 1.0,
) -> Problem:
    g = generator(1000 * seed + tokens)
    hidden = (size * torch.randn(tokens, shape.hidden, device=DEVICE, generator=g)).to(BF16)
    weights = torch.rand(tokens, shape.top_k, device=DEVICE, generator=g) + 0.05
    return Problem(layer(shape), hidden, route(routing, tokens, shape, g), weights, limit)


# -------------------------------------------------------------------------- what is asserted


def poisoned(rows: int, columns: int, byte: int = POISON) -> tuple[torch.Tensor, torch.Tensor]:
    """A BF16 output between two guard rows, and the buffer of all of it."""
    buffer = torch.full((rows + 2, 2 * columns), byte, dtype=torch.uint8, device=DEVICE)
    return buffer.view(BF16)[1:-1], buffer


class Poison:
    """Stands in for `ops._workspace`; `check` looks behind each workspace that it gave."""

    def __init__(self) -> None:
        self.byte = POISON
        self.given: list[tuple[torch.Tensor, int, int]] = []

    def __call__(self, size_bytes: int, device: torch.device) -> torch.Tensor:
        shape = size_bytes + GUARD_BYTES
        buffer = torch.full((shape,), self.byte, dtype=torch.uint8, device=device)
        self.given.append((buffer, size_bytes, self.byte))
        return buffer[:size_bytes]

    def check(self) -> None:
        assert self.given, "no workspace was asked for"
        for buffer, size_bytes, byte in self.given:
            assert bool((buffer[size_bytes:] == byte).all()), "written behind the workspace"
        self.given.clear()


@pytest.fixture
def poison(monkeypatch):
    stand_in = Poison()
    monkeypatch.setattr(ops, "_workspace", stand_in)
    return stand_in


def guarded(run, rows: int, columns: int, byte: int = POISON) -> torch.Tensor:
    """The output of run(out), after a look at the guard rows."""
    out, buffer = poisoned(rows, columns, byte)
    run(out)
    assert bool((buffer[[0, -1]] == byte).all()), "written outside the output"
    return out


def run_guarded(problem: Problem, byte: int = POISON) -> torch.Tensor:
    return guarded(problem.run, *problem.hidden.shape, byte)


def assert_at_most_twice_the_error(
    ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor
) -> None:
    """Of the largest error and of the root mean square."""
    assert bool(ours.isfinite().all()), "not every element is a finite number"
    ours_error, plain_error = (x.double() - exact for x in (ours, plain))
    tiny = 1e-6 * float(exact.abs().max())
    for name, size in (
        ("max", lambda e: e.abs().max()),
        ("rms", lambda e: e.square().mean().sqrt()),
    ):
        got, allowed = float(size(ours_error)), 2 * float(size(plain_error)) + tiny
        assert got <= allowed, f"{name} error {got:.3g}, allowed {allowed:.3g}"


def assert_as_good_as_pytorch(problem: Problem, ours: torch.Tensor) -> None:
    exact = problem.refer(torch.float64)
    assert_at_most_twice_the_error(ours, problem.refer(BF16), exact)
    idle = ((problem.ids < 0) | (problem.ids >= problem.layer.shape.experts)).all(dim=1)
    assert bool((ours[idle] == 0).all()), "a token without experts is not zero"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


# ------------------------------------------------------------------------------------- MoE


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("routing", ["uniform", "skewed", "one"])
@pytest.mark.parametrize("shape", DEEPSEEK, ids=str)
def test_moe_error_is_at_most_twice_that_of_pytorch(shape, routing, tokens, poison):
    problem = make_problem(shape, tokens, routing)
    assert_as_good_as_pytorch(problem, run_guarded(problem))
    poison.check()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_moe_of_an_odd_shape_is_as_exact(shape, routing, tokens, poison):
    problem = make_problem(shape, tokens, routing, limit=2.0)
    assert_as_good_as_pytorch(problem, run_guarded(problem))
    poison.check()


@pytest.mark.parametrize("tokens", [1, 8, 9, 100])
@pytest.mark.parametrize("routing", ["uniform", "masked", "repeated"])
def test_moe_of_the_most_experts_and_slots_is_as_exact(routing, tokens, poison):
    problem = make_problem(WIDEST, tokens, routing)
    assert_as_good_as_pytorch(problem, run_guarded(problem))
    poison.check()


@pytest.mark.parametrize("tokens", [1, 4, 8, 9, 100])
@pytest.mark.parametrize("limit", [0.25, 3.0, None])
def test_moe_clamps_gate_and_up_at_the_limit(limit, tokens, poison):
    problem = make_problem(SMALL, tokens, limit=limit, size=4.0)
    ours = run_guarded(problem)
    assert_as_good_as_pytorch(problem, ours)
    other = make_problem(SMALL, tokens, limit=1.0, size=4.0)
    assert (ours.float() - run_guarded(other).float()).abs().max() > 0.05


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("routing", ["skewed", "repeated"])
@pytest.mark.parametrize("shape", [DEEPSEEK[1], SMALL], ids=str)
def test_moe_gives_the_same_bits_whatever_lay_in_output_and_workspace(
    shape, routing, tokens, poison
):
    problem = make_problem(shape, tokens, routing)
    first = run_guarded(problem)
    for byte in (POISON, 0x00, 0x7F, POISON, 0x80, 0x01):
        poison.byte = byte
        assert same_bits(run_guarded(problem, byte), first)
    poison.check()


@pytest.mark.parametrize("tokens", [2, 8, 9, 64, 300])
def test_a_token_of_nan_spoils_no_other(tokens, poison):
    problem = make_problem(SMALL, tokens)
    good = run_guarded(problem)
    problem.hidden[1] = math.nan
    bad = run_guarded(problem)
    assert bool(bad[1].isnan().all())
    others = torch.arange(tokens, device=DEVICE) != 1
    assert same_bits(bad[others], good[others])


@pytest.mark.parametrize("tokens", [3, 100])
def test_checked_ids_are_named_and_unchecked_ones_skipped(tokens):
    problem = make_problem(SMALL, tokens)
    problem.ids[2, 1] = SMALL.experts
    arguments = (problem.hidden, problem.ids, problem.weights)
    with pytest.raises(ValueError, match=r"moe_w4a16: topk_ids\[2, 1\] = 5; an id is -1"):
        ops.moe_w4a16(*arguments, **problem.layer.tiled, check_ids=True)
    outside = problem.run()
    problem.ids[2, 1] = -1
    assert same_bits(problem.run(), outside)


def test_tensors_that_are_not_on_this_gpu_are_refused():
    problem = make_problem(SMALL, 2)
    with pytest.raises(ValueError, match="moe_w4a16: w13 has device cpu, the first argument cuda:"):
        ops.moe_w4a16(
            problem.hidden,
            problem.ids,
            problem.weights,
            **{**problem.layer.tiled, "w13": problem.layer.tiled["w13"].cpu()},
        )
    shifted = torch.empty(2 * SMALL.hidden + 1, dtype=BF16, device=DEVICE)[1:]
    with pytest.raises(ValueError, match=f"out has address .* multiple of {ALIGNMENT} bytes"):
        problem.run(shifted.view(2, -1))


def test_no_tokens_give_an_empty_output():
    assert make_problem(SMALL, 0).run().shape == (0, SMALL.hidden)


# ------------------------------------------------------------------------ GEMM, activation


@functools.cache
def linear(size_n: int, size_k: int) -> tuple[torch.Tensor, ...]:
    """weight_packed, weight_scale, and both tiled."""
    packed, scale = (t[0] for t in random_weight(generator(size_n + size_k), 1, size_n, size_k))
    return packed, scale, tiled.tile_weight(packed), tiled.tile_scale(scale)


GEMM_ROWS = [1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 64, 100, 257, 2048]
GEMM_SIZES = [(64, 128), (192, 384), (320, 1152), (1024, 4096), (4096, 1024), (7168, 2048)]


@pytest.mark.parametrize("size_m", GEMM_ROWS)
@pytest.mark.parametrize(("size_n", "size_k"), GEMM_SIZES)
def test_gemm_error_is_at_most_twice_that_of_pytorch(size_n, size_k, size_m, poison):
    packed, scale, weight, tiled_scale = linear(size_n, size_k)
    a = torch.randn(size_m, size_k, device=DEVICE, generator=generator(size_m)).to(BF16)

    def run(out):
        ops.gemm_w4a16(a, weight, tiled_scale, out)

    ours = guarded(run, size_m, size_n)
    exact = reference.gemm(a.double(), packed, scale)
    assert_at_most_twice_the_error(ours, reference.gemm(a, packed, scale), exact)
    for byte in (0x00, 0x7F, 0x01):
        poison.byte = byte
        assert same_bits(guarded(run, size_m, size_n, byte), ours)
    poison.check()


@pytest.mark.parametrize("limit", [0.5, 10.0, None])
@pytest.mark.parametrize(("rows", "inter"), [(1, 32), (7, 96), (6, 1024), (600, 2048)])
def test_silu_error_is_at_most_twice_that_of_pytorch(rows, inter, limit):
    g = generator(rows)
    gate_up = (3 * torch.randn(rows, 2 * inter, device=DEVICE, generator=g)).to(BF16)
    ours = guarded(lambda out: ops.silu_interleaved(gate_up, limit, out), rows, inter)
    exact = reference.silu_interleaved(gate_up.double(), limit)
    assert_at_most_twice_the_error(ours, reference.silu_interleaved(gate_up, limit), exact)


def test_silu_of_a_gated_gemm_is_the_activation_of_the_rows_as_stored():
    size = SMALL
    stored, tiles = layer(size).stored, layer(size).tiled
    a = torch.randn(5, size.hidden, device=DEVICE, generator=generator(5)).to(BF16)
    rows = ops.gemm_w4a16(a, tiles["w13"][0], tiles["w13_scale"][0])
    gate, up = reference.gemm(a.double(), stored.w13_packed[0], stored.w13_scale[0]).chunk(2, -1)
    exact = reference.swiglu(gate, up, 2.0)
    error = (ops.silu_interleaved(rows, 2.0).double() - exact).abs().max()
    assert error < 2**-6 * exact.abs().max()


# -------------------------------------------------------------------------- streams, graphs


class Watched:
    """A call whose output is compared on the GPU, so that nothing waits for the host."""

    def __init__(self, call, out: torch.Tensor) -> None:
        self.call, self.out = call, out
        call(out)
        self.expected = out.clone()
        self.differences = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def step(self) -> None:
        self.out.fill_(math.nan)
        self.call(self.out)
        differs = self.out.view(torch.int16) != self.expected.view(torch.int16)
        self.differences.add_(differs.sum())


def watch(problem: Problem) -> Watched:
    return Watched(problem.run, torch.empty_like(problem.hidden))


def watch_gemm(size_m: int, size_n: int, size_k: int) -> Watched:
    _, _, weight, scale = linear(size_n, size_k)
    a = torch.randn(size_m, size_k, device=DEVICE, generator=generator(size_m)).to(BF16)
    out = torch.empty(size_m, size_n, dtype=BF16, device=DEVICE)
    return Watched(lambda out: ops.gemm_w4a16(a, weight, scale, out), out)


def capture(steps, stream: torch.cuda.Stream | None = None) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for step in steps:
            step()
    return graph


PAIRS = {
    "decode beside decode": lambda: (
        watch(make_problem(DEEPSEEK[1], 2)),
        watch(make_problem(DEEPSEEK[1], 4, seed=1)),
    ),
    "decode beside sorted": lambda: (
        watch(make_problem(DEEPSEEK[1], 1)),
        watch(make_problem(SMALL, 100, "skewed")),
    ),
    "sorted beside sorted": lambda: (
        watch(make_problem(SMALL, 17)),
        watch(make_problem(ODD[3], 300, seed=1)),
    ),
    "gemm beside gemm": lambda: (watch_gemm(2, 1024, 4096), watch_gemm(5, 4096, 1024)),
    "gemm beside decode": lambda: (
        watch_gemm(1, 1024, 4096),
        watch(make_problem(DEEPSEEK[1], 3)),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_streams_at_once_give_what_each_gives_alone(pair):
    sides = PAIRS[pair]()
    streams = [torch.cuda.Stream() for _ in sides]
    torch.cuda.synchronize()
    for _ in range(100):
        for side, stream in zip(sides, streams, strict=True):
            with torch.cuda.stream(stream):
                side.step()
    graphs = [capture([s.step] * 50, stream) for s, stream in zip(sides, streams, strict=True)]
    for _ in range(10):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert [int(side.differences) for side in sides] == [0, 0]


def test_ten_thousand_graph_replays_equal_the_eager_call():
    watched = [
        watch(make_problem(DEEPSEEK[1], 1)),
        watch(make_problem(DEEPSEEK[1], 2)),
        watch(make_problem(SMALL, 17, "skewed")),
        watch(make_problem(ODD[3], 8, "repeated")),
        watch_gemm(2, 1024, 4096),
        watch_gemm(17, 192, 384),
    ]
    graph = capture([w.step for w in watched])
    for _ in range(10_000):
        graph.replay()
    torch.cuda.synchronize()
    assert [int(w.differences) for w in watched] == [0] * len(watched)


@pytest.mark.parametrize("tokens", [2, 17])
def test_a_replay_works_on_what_its_inputs_hold_then(tokens):
    problem = make_problem(SMALL, tokens)
    out = torch.empty_like(problem.hidden)
    problem.run(out)
    graph = capture([lambda: problem.run(out)])
    for seed, routing in enumerate(["uniform", "masked", "repeated"], 1):
        other = make_problem(SMALL, tokens, routing, seed=seed)
        problem.hidden.copy_(other.hidden)
        problem.ids.copy_(other.ids)
        problem.weights.copy_(other.weights)
        out.fill_(math.nan)
        graph.replay()
        assert same_bits(out, other.run())


# ---------------------------------------------------------------------------------- PyTorch


def test_the_operators_do_to_tensors_what_their_schemas_say():
    problem = make_problem(SMALL, 3)
    _, _, weight, scale = linear(192, 384)
    out = torch.empty_like(problem.hidden)
    tensors = (problem.hidden, problem.ids, problem.weights, *problem.layer.tiled.values())
    operators = torch.ops.dsv4_maxq
    a, rows = problem.hidden, torch.empty(3, 192, dtype=BF16, device=DEVICE)
    calls = [
        (operators.moe_w4a16.default, (*tensors, 10.0, out)),
        (operators.gemm_w4a16.default, (a, weight, scale, rows)),
        (operators.silu_interleaved.default, (a, None, rows)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_compiled_function_gives_what_the_eager_one_gives():
    problem = make_problem(SMALL, 3)
    compiled = torch.compile(lambda: problem.run() + 1, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(), problem.run() + 1)
