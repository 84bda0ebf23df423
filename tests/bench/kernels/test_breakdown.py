"""Kernels of a time line sorted into the launches of a layer."""

import pytest

from bench.kernels.breakdown import Span, launches, short_name


def line(steps: int, overlap: float = 4.0) -> list[Span]:
    """Layers of two kernels: up takes 10, down begins `overlap` before its end and ends 5 after."""
    spans = []
    for i in range(steps):
        start = 20.0 * i
        spans.append(Span("void dsv4::decode_up(dsv4::Decode)", start, start + 10))
        spans.append(Span("void dsv4::decode_down(dsv4::Decode)", start + 10 - overlap, start + 15))
    return spans


def test_what_overlaps_is_counted_once():
    up, down = launches(line(6), 3, 2)
    assert (up.kernel, up.duration_us, up.added_us) == ("decode_up", 10.0, 15.0)
    assert (down.kernel, down.duration_us, down.added_us) == ("decode_down", 9.0, 5.0)
    assert up.added_us + down.added_us == 20.0  # the layer


def test_the_first_kernel_of_a_replay_has_nothing_before_it():
    spans = line(2)
    later = [Span(s.name, s.start + 1000, s.end + 1000) for s in spans]
    assert launches(spans + later, 2, 2) == launches(line(4), 2, 2)


def test_other_kernels_at_a_step_are_refused():
    with pytest.raises(RuntimeError, match="3 kernels in 2 steps"):
        launches(line(2)[:3], 2, 1)
    with pytest.raises(RuntimeError, match="differ"):
        launches([*line(1), Span("memset", 20, 21), Span("other", 22, 23)], 2, 1)
    with pytest.raises(RuntimeError, match="0 kernels"):
        launches([], 2, 1)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void dsv4::(anonymous namespace)::grouped_up<2>(dsv4::(anonymous namespace)::Grouped)",
         "grouped_up"),
        ("void Marlin<1125899906909960l, 256, true>(int4 const*, int4*)", "Marlin"),
        ("void vllm::moe::moe_align_block_size_small<int, 256>(int const*)",
         "moe_align_block_size_small"),
        ("decode_down", "decode_down"),
    ],
)  # fmt: skip
def test_a_kernel_is_called_by_its_own_name(name, short):
    assert short_name(name) == short
