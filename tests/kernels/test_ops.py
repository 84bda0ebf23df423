"""What the operators refuse, trace and hand to the library; all of it without a GPU."""

import contextlib
import ctypes
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kernels import build, ops

TOKENS, TOP_K, EXPERTS, HIDDEN, INTER = 3, 2, 4, 256, 128
BF16, INT32 = torch.bfloat16, torch.int32


def moe_arguments(tokens=TOKENS, device="cpu"):
    """Arguments of `moe_w4a16` by name; values do not matter."""
    shapes = {
        "hidden": ((tokens, HIDDEN), BF16),
        "topk_ids": ((tokens, TOP_K), INT32),
        "topk_weights": ((tokens, TOP_K), torch.float32),
        "w13": ((EXPERTS, HIDDEN // 16, 4 * INTER), INT32),
        "w13_scale": ((EXPERTS, HIDDEN // 128, 2 * INTER), BF16),
        "w2": ((EXPERTS, INTER // 16, 2 * HIDDEN), INT32),
        "w2_scale": ((EXPERTS, INTER // 128, HIDDEN), BF16),
    }
    tensors = {k: torch.zeros(s, dtype=t, device=device) for k, (s, t) in shapes.items()}
    return {**tensors, "swiglu_limit": 10.0, "out": torch.empty_like(tensors["hidden"])}


def gemm_arguments():
    return {
        "a": torch.zeros(5, 256, dtype=BF16),
        "weight": torch.zeros(16, 2 * 192, dtype=INT32),
        "scale": torch.zeros(2, 192, dtype=BF16),
        "out": torch.zeros(5, 192, dtype=BF16),
    }


def silu_arguments():
    gate_up, out = torch.zeros(5, 128, dtype=BF16), torch.zeros(5, 64, dtype=BF16)
    return {"gate_up": gate_up, "swiglu_limit": None, "out": out}


def off_by_two_bytes(tensor):
    """A contiguous copy at an address that is 2 (or, for words, 4) bytes past a multiple of 16."""
    buffer = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    return buffer[1:].view(tensor.shape)


def spread(tensor):
    """The same shape and values with an element's gap between neighbours."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype)


def too_many_rows(rows, columns, dtype=BF16):
    """A tensor of many rows that takes the memory of one."""
    return torch.empty(1, columns, dtype=dtype).expand(rows, columns)


MOE_ERRORS = {
    # dtype
    "hidden fp16": ({"hidden": lambda t: t.half()}, "hidden has dtype torch.float16; torch.bfl"),
    "ids int64": ({"topk_ids": lambda t: t.long()}, "topk_ids has dtype torch.int64; torch.int32"),
    "weights bf16": ({"topk_weights": lambda t: t.bfloat16()}, "topk_weights has dtype torch.bflo"),
    "w13 uint8": ({"w13": lambda t: t.to(torch.uint8)}, "w13 has dtype torch.uint8; torch.int32"),
    "w2 int64": ({"w2": lambda t: t.long()}, "w2 has dtype torch.int64; torch.int32 is needed"),
    "scale fp32": ({"w13_scale": lambda t: t.float()}, "w13_scale has dtype torch.float32"),
    "scale fp16": ({"w2_scale": lambda t: t.half()}, "w2_scale has dtype torch.float16"),
    "out fp32": ({"out": lambda t: t.float()}, "out has dtype torch.float32; torch.bfloat16"),
    # dimensions and shape
    "hidden 3d": ({"hidden": lambda t: t[None]}, r"hidden has shape \(1, 3, 256\); 2 dimensions"),
    "ids 1d": ({"topk_ids": lambda t: t[:, 0]}, r"topk_ids has shape \(3,\); 2 dimensions"),
    "w13 2d": ({"w13": lambda t: t[0]}, r"w13 has shape \(16, 512\); 3 dimensions are needed"),
    "w2 2d": ({"w2": lambda t: t[0]}, r"w2 has shape \(8, 512\); the other arguments need \(4, 8"),
    "scale 2d": ({"w2_scale": lambda t: t[0]}, r"w2_scale has shape \(1, 256\); the other argum"),
    "fewer ids": ({"topk_ids": lambda t: t[1:]}, r"topk_ids has shape \(2, 2\); .* need \(3, 2\)"),
    "other top_k": ({"topk_weights": lambda t: t[:, :1]}, r"topk_weights has shape \(3, 1\)"),
    "other hidden": ({"w13": lambda t: t[:, :8]}, r"w13 has shape \(4, 8, 512\); .* \(4, 16, 512"),
    "other experts": ({"w2": lambda t: t[:3]}, r"w2 has shape \(3, 8, 512\)"),
    "other scales": ({"w13_scale": lambda t: t[:3]}, r"w13_scale has shape \(3, 2, 256\)"),
    "short out": ({"out": lambda t: t[:2]}, r"out has shape \(2, 256\); .* need \(3, 256\)"),
    # sizes
    "hidden 192": ({"hidden": lambda t: t[:, :192]}, "hidden_size = 192 is not a multiple of 128"),
    "hidden 0": ({"hidden": lambda t: t[:, :0]}, "hidden_size = 0 is not a multiple of 128"),
    "inter 64": ({"w13": lambda t: t[..., :256]}, "w13 has 256 words .* inter_size = 64; .* 128"),
    "inter 0": ({"w13": lambda t: t[..., :0]}, "w13 has 0 words .* inter_size = 0; .* 128"),
    "groups of 64": (
        {"w13_scale": lambda t: empty(EXPERTS, HIDDEN // 64, 2 * INTER)},
        "w13_scale has 4 groups along k = 256, group_size = 64; .* support group_size = 128",
    ),
    "one group": (
        {"w13_scale": lambda t: t[:, :1]},
        "w13_scale has 1 groups along k = 256, group_size = 256; .* support group_size = 128",
    ),
    "groups of 32": (
        {"w2_scale": lambda t: empty(EXPERTS, INTER // 32, HIDDEN)},
        "w2_scale has 4 groups along k = 128, group_size = 32",
    ),
    "tokens": (
        {"hidden": lambda t: too_many_rows(ops.MAX_TOKENS + 1, HIDDEN)},
        "num_tokens = 1048577; it must be 0 .. 1048576",
    ),
    "top_k 0": ({"topk_ids": lambda t: t[:, :0]}, "top_k = 0; it must be 1 .. 16"),
    "top_k 17": (
        {"topk_ids": lambda t: empty(TOKENS, 17, dtype=INT32)},
        "top_k = 17; it must be 1 .. 16",
    ),
    "no experts": ({"w13": lambda t: t[:0]}, "num_experts = 0; it must be 1 .. 1024"),
    "experts": (
        {"w13": lambda t: t[:1].expand(1025, -1, -1)},
        "num_experts = 1025; it must be 1 .. 1024",
    ),
    "limit 0": ({"swiglu_limit": lambda _: 0.0}, "swiglu_limit = 0.0; it must be above 0"),
    "limit -1": ({"swiglu_limit": lambda _: -1.0}, "swiglu_limit = -1.0; it must be above 0"),
    "limit nan": ({"swiglu_limit": lambda _: math.nan}, "swiglu_limit = nan; it must be above 0"),
    # stride
    **{
        f"{name} stride": ({name: spread}, rf"{name} has shape .* stride .* must be contiguous")
        for name in ("hidden", "topk_ids", "topk_weights", "w13", "w13_scale", "w2", "w2_scale")
    },
    "out stride": (
        {"out": spread},
        r"out has shape \(3, 256\) and stride \(512, 2\); it must",
    ),
    # alignment
    **{
        f"{name} address": (
            {name: off_by_two_bytes},
            f"{name} has address 0x[0-9a-f]+[24]; it must be a multiple of 16 bytes",
        )
        for name in ("hidden", "w13", "w13_scale", "w2", "w2_scale", "out")
    },
}

GEMM_ERRORS = {
    "a dtype": ({"a": lambda t: t.half()}, "a has dtype torch.float16; torch.bfloat16 is needed"),
    "weight dtype": ({"weight": lambda t: t.long()}, "weight has dtype torch.int64; torch.int32"),
    "scale dtype": ({"scale": lambda t: t.float()}, "scale has dtype torch.float32"),
    "a 1d": ({"a": lambda t: t[0]}, r"a has shape \(256,\); 2 dimensions are needed"),
    "weight 3d": ({"weight": lambda t: t[None]}, r"weight has shape \(1, 16, 384\); 2 dimensions"),
    "scale 1d": ({"scale": lambda t: t[0]}, r"scale has shape \(192,\); the other arguments need"),
    "k 192": ({"a": lambda t: t[:, :192]}, "size_k = 192 is not a multiple of 128"),
    "n 96": ({"weight": lambda t: t[:, :192]}, "weight has 192 words .* size_n = 96; .* of 64"),
    "n 0": ({"weight": lambda t: t[:, :0]}, "weight has 0 words .* size_n = 0; .* of 64"),
    "other k": ({"weight": lambda t: t[:8]}, r"weight has shape \(8, 384\); .* need \(16, 384\)"),
    "other n": ({"scale": lambda t: t[:, :64]}, r"scale has shape \(2, 64\); .* need \(2, 192\)"),
    "groups of 64": (
        {"scale": lambda t: empty(4, 192)},
        "scale has 4 groups along k = 256, group_size = 64; .* support group_size = 128",
    ),
    "no groups": ({"scale": lambda t: t[:0]}, "scale has 0 groups along k = 256"),
    "rows": (
        {"a": lambda t: too_many_rows(ops.MAX_GEMM_ROWS + 1, 256)},
        "size_m = 1048561; it must be 0 .. 1048560",
    ),
    "a stride": ({"a": spread}, r"a has shape \(5, 256\) and stride \(512, 2\); it must"),
    "weight stride": ({"weight": spread}, "weight has shape .* it must be contiguous"),
    "a address": ({"a": off_by_two_bytes}, "a has address .* a multiple of 16 bytes"),
    "weight address": ({"weight": off_by_two_bytes}, "weight has address .* 16 bytes"),
    "out": ({"out": lambda t: t[1:]}, r"out has shape \(4, 192\); the other arguments need \(5,"),
}

SILU_ERRORS = {
    "dtype": ({"gate_up": lambda t: t.half()}, "gate_up has dtype torch.float16; torch.bfloat16"),
    "1d": ({"gate_up": lambda t: t[0]}, r"gate_up has shape \(128,\); 2 dimensions are needed"),
    "columns": ({"gate_up": lambda t: t[:, :96]}, r"2 \* inter_size = 96 is not a multiple of 64"),
    "no columns": ({"gate_up": lambda t: t[:, :0]}, r"2 \* inter_size = 0 is not a multiple of 64"),
    "rows": (
        {"gate_up": lambda t: too_many_rows(2**31, 64)},
        "num_rows = 2147483648; it must be 0 .. 2147483647",
    ),
    "stride": ({"gate_up": spread}, "gate_up has shape .* it must be contiguous"),
    "address": ({"gate_up": off_by_two_bytes}, "gate_up has address .* a multiple of 16 bytes"),
    "out": ({"out": lambda t: t[:, :32]}, r"out has shape \(5, 32\); the other arguments need \(5"),
    "limit": ({"swiglu_limit": lambda _: 0.0}, "swiglu_limit = 0.0; it must be above 0"),
}

OPERATIONS = {
    "moe_w4a16": (ops.moe_w4a16, moe_arguments, MOE_ERRORS),
    "gemm_w4a16": (ops.gemm_w4a16, gemm_arguments, GEMM_ERRORS),
    "silu_interleaved": (ops.silu_interleaved, silu_arguments, SILU_ERRORS),
}


@pytest.fixture
def no_launch(monkeypatch):
    """The library must not even be asked for."""

    def refuse():
        raise AssertionError("the library was asked for")

    monkeypatch.setattr(ops, "_library", refuse)


@pytest.mark.parametrize(
    ("operation", "case"), [(name, case) for name, row in OPERATIONS.items() for case in row[2]]
)
def test_a_bad_argument_is_refused_by_name_and_rule_before_any_launch(operation, case, no_launch):
    function, arguments, errors = OPERATIONS[operation]
    changes, message = errors[case]
    arguments = arguments()
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^{operation}: {message}"):
        function(**arguments)


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (ops.check_moe, moe_arguments),
        (ops.check_gemm, gemm_arguments),
        (ops.check_silu, silu_arguments),
    ],
)
def test_tensors_on_two_devices_are_refused(check, arguments):
    names = [name for name, value in arguments().items() if isinstance(value, torch.Tensor)]
    for name in names[1:]:
        mixed = arguments()
        mixed[name] = mixed[name].to("meta")
        message = f"{name} has device meta, the first argument cpu; one device is needed"
        with pytest.raises(ValueError, match=message):
            check(**mixed)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_good_arguments_on_a_cpu_lack_only_the_device(operation, no_launch):
    function, arguments, _ = OPERATIONS[operation]
    with pytest.raises(ValueError, match=f"^{operation}: the tensors are on cpu; a CUDA device is"):
        function(**arguments())


def test_the_checks_give_the_sizes():
    assert ops.check_moe(**moe_arguments()) == (TOKENS, TOP_K, EXPERTS, HIDDEN, INTER)
    assert ops.check_gemm(**gemm_arguments()) == (5, 192, 256)
    assert ops.check_silu(**silu_arguments()) == (5, 64)


@pytest.mark.parametrize(("token", "slot", "value"), [(0, 0, EXPERTS), (2, 1, -2), (1, 0, 2**30)])
def test_asked_to_check_ids_it_names_the_first_that_is_outside(token, slot, value, no_launch):
    arguments = moe_arguments()
    arguments["topk_ids"][token, slot] = value
    message = rf"topk_ids\[{token}, {slot}\] = {value}; an id is -1 \(no expert\) or 0 .. 3"
    with pytest.raises(ValueError, match=f"^moe_w4a16: {message}"):
        ops.moe_w4a16(**arguments, check_ids=True)
    with pytest.raises(ValueError, match=f"^validate_topk_ids: {message}"):
        ops.validate_topk_ids(arguments["topk_ids"], EXPERTS)


def test_ids_from_minus_one_to_the_last_expert_are_legal():
    ops.validate_topk_ids(torch.tensor([[-1, 0], [1, EXPERTS - 1]]), EXPERTS)
    ops.validate_topk_ids(torch.empty(0, 2, dtype=INT32), EXPERTS)
    with pytest.raises(ValueError, match=r"validate_topk_ids: topk_ids has shape \(2,\)"):
        ops.validate_topk_ids(torch.zeros(2), EXPERTS)


# ------------------------------------------------------------------- what the library is given


class FakeLibrary:
    """Keeps what it is called with; answers `error`."""

    def __init__(self, workspace_bytes=1000, error=0):
        self.workspace_bytes, self.error, self.calls = workspace_bytes, error, []

    def dsv4_moe_workspace_bytes(self, *sizes):
        return self.workspace_bytes

    dsv4_gemm_workspace_bytes = dsv4_moe_workspace_bytes

    def _struct(self, args, stream):
        fields = {name: getattr(args._obj, name) for name, _ in args._obj._fields_}
        self.calls.append({**fields, "stream": stream})
        return self.error

    dsv4_moe = dsv4_gemm = _struct

    def dsv4_silu_interleaved(self, *arguments):
        self.calls.append(arguments)
        return self.error

    def dsv4_error_string(self, error):
        return b"invalid argument"


@pytest.fixture
def fake_library(monkeypatch):
    """fake_library(**FakeLibrary arguments); the CPU then passes for a CUDA device."""

    def install(**arguments):
        library = FakeLibrary(**arguments)
        monkeypatch.setattr(ops, "_library", lambda: library)
        monkeypatch.setattr(ops, "_require_cuda", lambda *_: None)
        stream = SimpleNamespace(cuda_stream=77)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
        return library

    ops._moe_workspace_bytes.cache_clear()
    ops._gemm_workspace_bytes.cache_clear()
    yield install
    ops._moe_workspace_bytes.cache_clear()
    ops._gemm_workspace_bytes.cache_clear()


@pytest.mark.parametrize(("limit", "given"), [(7.5, 7.5), (None, math.inf)])
def test_the_library_gets_every_pointer_and_size_of_the_moe(
    fake_library, monkeypatch, limit, given
):
    library = fake_library(workspace_bytes=1234)
    made = []
    real = ops._workspace
    monkeypatch.setattr(ops, "_workspace", lambda *a: made.append(real(*a)) or made[-1])
    arguments = {**moe_arguments(), "swiglu_limit": limit}
    assert ops.moe_w4a16(**arguments) is arguments["out"]
    pointers = {k: v.data_ptr() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    assert library.calls == [
        {
            **pointers,
            "workspace": made[0].data_ptr(),
            "num_tokens": TOKENS,
            "top_k": TOP_K,
            "num_experts": EXPERTS,
            "hidden_size": HIDDEN,
            "inter_size": INTER,
            "swiglu_limit": given,
            "stream": 77,
        }
    ]
    assert made[0].nbytes == 1234


def test_the_library_gets_every_pointer_and_size_of_the_gemm(fake_library):
    library = fake_library()
    arguments = gemm_arguments()
    assert ops.gemm_w4a16(**arguments) is arguments["out"]
    call = library.calls[0]
    assert {k: call[k] for k in arguments} == {k: v.data_ptr() for k, v in arguments.items()}
    assert [call[f"size_{x}"] for x in "mnk"] == [5, 192, 256]
    assert call["stream"] == 77


@pytest.mark.parametrize(("limit", "given"), [(7.5, 7.5), (None, math.inf)])
def test_the_library_gets_the_rows_of_silu(fake_library, limit, given):
    library = fake_library()
    arguments = {**silu_arguments(), "swiglu_limit": limit}
    out = ops.silu_interleaved(**arguments)
    expected = (arguments["gate_up"].data_ptr(), out.data_ptr(), 5, 64, given, 77)
    assert library.calls == [expected]


@pytest.mark.parametrize(("current", "made_current"), [(None, []), (1, [None])])
def test_the_device_of_the_tensors_is_current_while_it_launches(
    fake_library, monkeypatch, current, made_current
):
    library, entered = fake_library(), []

    @contextlib.contextmanager
    def device(index):
        assert library.calls == []
        entered.append(index)
        yield
        assert len(library.calls) == 1

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    ops.moe_w4a16(**moe_arguments())
    assert entered == made_current


def test_an_output_is_made_where_none_is_given(fake_library):
    library = fake_library()
    moe, gemm, silu = moe_arguments(), gemm_arguments(), silu_arguments()
    for arguments in (moe, gemm, silu):
        del arguments["out"]
    outputs = ops.moe_w4a16(**moe), ops.gemm_w4a16(**gemm), ops.silu_interleaved(**silu)
    assert [tuple(out.shape) for out in outputs] == [(TOKENS, HIDDEN), (5, 192), (5, 64)]
    assert all(out.dtype == BF16 for out in outputs)
    assert [library.calls[i]["out"] for i in (0, 1)] == [out.data_ptr() for out in outputs[:2]]


def test_zero_tokens_give_an_empty_output_without_a_launch(fake_library):
    library = fake_library()
    assert ops.moe_w4a16(**moe_arguments(tokens=0)).shape == (0, HIDDEN)
    gemm, silu = gemm_arguments(), silu_arguments()
    gemm["a"], gemm["out"] = gemm["a"][:0], gemm["out"][:0]
    silu["gate_up"], silu["out"] = silu["gate_up"][:0], silu["out"][:0]
    assert ops.gemm_w4a16(**gemm).shape == (0, 192)
    assert ops.silu_interleaved(**silu).shape == (0, 64)
    assert library.calls == []


def test_zero_tokens_are_checked_like_any_other(no_launch):
    arguments = moe_arguments(tokens=0)
    arguments["w13"] = arguments["w13"].long()
    with pytest.raises(ValueError, match="moe_w4a16: w13 has dtype torch.int64"):
        ops.moe_w4a16(**arguments)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_error_of_cuda_is_raised_in_its_own_words(operation, fake_library):
    fake_library(error=1)
    function, arguments, _ = OPERATIONS[operation]
    with pytest.raises(RuntimeError, match=f"^{operation}: CUDA error 1 on cpu: invalid argument"):
        function(**arguments())


def test_sizes_that_the_library_does_not_support_are_refused(fake_library):
    library = fake_library(workspace_bytes=0)
    with pytest.raises(ValueError, match="moe_w4a16: num_tokens = 3, .* inter_size = 128: the lib"):
        ops.moe_w4a16(**moe_arguments())
    with pytest.raises(ValueError, match="gemm_w4a16: size_m = 5, size_n = 192, size_k = 256: the"):
        ops.gemm_w4a16(**gemm_arguments())
    assert library.calls == []


# --------------------------------------------------------------------------- the real library


@pytest.fixture
def library():
    try:
        build.library_path()
    except RuntimeError as error:
        pytest.skip(str(error))
    return ops._library()


def test_the_limits_are_those_of_the_library(library):
    moe, gemm = library.dsv4_moe_workspace_bytes, library.dsv4_gemm_workspace_bytes
    assert moe(ops.MAX_TOKENS, ops.MAX_TOP_K, ops.MAX_EXPERTS, 128, 128) > 0
    assert moe(ops.MAX_TOKENS + 1, 1, 1, 128, 128) == 0
    assert moe(1, ops.MAX_TOP_K + 1, 1, 128, 128) == 0
    assert moe(1, 1, ops.MAX_EXPERTS + 1, 128, 128) == 0
    assert moe(1, 0, 1, 128, 128) == moe(1, 1, 0, 128, 128) == moe(-1, 1, 1, 128, 128) == 0
    assert moe(1, 1, 1, 192, 128) == moe(1, 1, 1, 128, 192) == 0
    assert gemm(ops.MAX_GEMM_ROWS, 64, 128) > 0
    assert gemm(ops.MAX_GEMM_ROWS + 1, 64, 128) == 0
    assert gemm(1, 96, 128) == gemm(1, 64, 64) == 0


def test_a_library_that_cannot_be_loaded_is_one_clear_line(monkeypatch, tmp_path):
    path = tmp_path / "libdsv4_kernels.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(build, "library_path", lambda: path)
    with pytest.raises(RuntimeError, match=f"^kernels: {path} cannot be loaded: "):
        ops._library.__wrapped__()


@pytest.mark.parametrize(
    ("struct", "mirror"), [("Dsv4MoeArgs", ops.MoeArgs), ("Dsv4GemmArgs", ops.GemmArgs)]
)
def test_the_structures_are_those_of_the_header(struct, mirror, tmp_path):
    compiler = shutil.which("cc") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C compiler")
    names = [name for name, _ in mirror._fields_]
    wanted = ", ".join(f"(int)offsetof({struct}, {name})" for name in names)
    source, program = tmp_path / "offsets.c", tmp_path / "offsets"
    source.write_text(
        f'#include <stdio.h>\n#include "{build.CSRC / "w4a16.h"}"\n'
        f"int main(void) {{ int at[] = {{{wanted}, (int)sizeof({struct})}};\n"
        'for (unsigned i = 0; i < sizeof at / sizeof *at; ++i) printf("%d\\n", at[i]); }\n'
    )
    subprocess.run([compiler, source, "-o", program], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    offsets = [getattr(mirror, name).offset for name in names]
    assert [int(line) for line in printed.split()] == [*offsets, ctypes.sizeof(mirror)]


# ---------------------------------------------------------------------------------- tracing


def test_fake_tensors_pass_and_give_the_shape():
    with FakeTensorMode():
        arguments = moe_arguments(device="cuda")
        del arguments["out"]
        out = ops.moe_w4a16(**arguments)
    assert (out.device.type, tuple(out.shape), out.dtype) == ("cuda", (TOKENS, HIDDEN), BF16)


def test_tensors_without_data_pass_and_give_the_shape():
    arguments = [moe_arguments(device="meta"), gemm_arguments(), silu_arguments()]
    for each in arguments:
        del each["out"]
        each |= {k: v.to("meta") for k, v in each.items() if isinstance(v, torch.Tensor)}
    moe, gemm, silu = arguments
    outputs = ops.moe_w4a16(**moe), ops.gemm_w4a16(**gemm), ops.silu_interleaved(**silu)
    assert [tuple(out.shape) for out in outputs] == [(TOKENS, HIDDEN), (5, 192), (5, 64)]


def test_a_trace_holds_the_operator_for_any_number_of_tokens():
    arguments = moe_arguments()
    del arguments["out"], arguments["swiglu_limit"]
    graph = make_fx(lambda *a: ops.moe_w4a16(*a), tracing_mode="symbolic")(*arguments.values())
    calls = [n for n in graph.graph.nodes if n.target is torch.ops.dsv4_maxq.moe_w4a16.default]
    assert len(calls) == 1
    assert isinstance(calls[0].args[-1].meta["val"].shape[0], torch.SymInt)


def test_importing_the_operators_needs_neither_library_nor_cuda(tmp_path):
    code = (
        "import torch, kernels.ops; assert not torch.cuda.is_initialized(); "
        "print(torch.ops.dsv4_maxq.moe_w4a16.default._schema)"
    )
    environment = {"DSV4_KERNELS_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, cwd=build.ROOT
    )
    assert "Tensor(a!) out) -> ()" in done.stdout
