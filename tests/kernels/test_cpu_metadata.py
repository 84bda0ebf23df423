"""The metadata kernels against their definition, token by token."""

import pytest
import torch

from kernels.cpu import metadata

STARTS = torch.tensor([0, 3, 4, 9], dtype=torch.int32)  # query tokens of three requests
LENGTHS = torch.tensor([10, 7, 5], dtype=torch.int32)  # context and query tokens


def tokens():
    """(token, request, position) of each query token."""
    for request in range(3):
        start, end = STARTS[request].item(), STARTS[request + 1].item()
        for token in range(start, end):
            yield token, request, LENGTHS[request].item() - (end - token)


def test_each_token_is_mapped_to_its_request():
    out = torch.full((12,), -1, dtype=torch.int32)
    metadata.token_request_mapping(STARTS, out, 3, 9, 11, num_warps=4)
    assert out.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2, 0, 0, -1]


def test_a_request_without_tokens_gets_none():
    starts = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    out = torch.empty(3, dtype=torch.int32)
    metadata.token_request_mapping(starts, out, 3, 3, 3)
    assert out.tolist() == [0, 0, 2]


def test_prefills_read_their_tokens_and_the_window_before():
    out = torch.full((3,), -1, dtype=torch.int32)
    metadata.prefill_gather_lens(
        out, LENGTHS, STARTS, torch.zeros(3, dtype=torch.int32), 2, 1, 4, BLOCK_SIZE=2
    )
    # Request 1: 1 token, 6 before, window 4 gives 3; request 2: 5 tokens, none before.
    assert out.tolist() == [4, 5, -1]


@pytest.mark.parametrize("ratio", [4, 2])
def test_a_completed_group_gets_a_slot_and_padding_stays(ratio):
    block_size = 2
    slots = torch.arange(9, dtype=torch.int64)
    slots[7] = -1
    table = torch.tensor([[5, 6, 7], [1, 2, 3], [8, 9, 4]], dtype=torch.int32)
    out = torch.full((9,), -5, dtype=torch.int64)
    metadata.compressed_slot_mapping(
        out, slots, STARTS, LENGTHS, table, 3, block_size, 1, 1, ratio, -1, 1024
    )
    expected = [-1] * 9
    for token, request, position in tokens():
        if (position + 1) % ratio == 0 and slots[token] != -1:
            group = position // ratio
            expected[token] = (
                table[request, group // block_size].item() * block_size + group % block_size
            )
    assert out.tolist() == expected
    assert any(slot >= 0 for slot in expected)


def test_speculative_rows_get_their_own_length_and_blocks():
    seq_lens, table = torch.tensor([9, 1], dtype=torch.int32), torch.tensor([[1, 2], [3, 4]])
    lens, rows = torch.zeros(4, dtype=torch.int32), torch.zeros(4, 3, dtype=torch.int64)
    ones = torch.zeros(4, dtype=torch.int32)
    metadata.prepare_uniform_decode(seq_lens, lens, table, 2, rows, 3, ones, 2, 1024)
    assert lens.tolist() == [8, 9, 0, 1]
    assert rows[:, :2].tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert ones.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("chunk", [slice(0, 9), slice(2, 7)])
def test_a_prefill_token_reads_the_groups_complete_before_it(chunk):
    ratio = 4
    compressed = LENGTHS // ratio
    cumulative = torch.cat((torch.zeros(1), compressed.cumsum(0))).int()
    owner = torch.full((int(cumulative[-1]),), -1, dtype=torch.int32)
    first, last = (torch.full((9,), -1, dtype=torch.int32) for _ in range(2))
    metadata.build_prefill_chunk_metadata(
        STARTS, LENGTHS, cumulative, cumulative, owner, first, last,
        chunk.start, chunk.stop, 0, 1, 1, 1024, ratio,
    )  # fmt: skip
    assert owner.tolist() == [0, 0, 1, 2]
    for token, request, position in tokens():
        if chunk.start <= token < chunk.stop:
            row = cumulative[request].item()
            place = token - chunk.start
            assert (first[place], last[place]) == (row, row + (position + 1) // ratio)


def test_decode_context_parallelism_is_refused():
    none = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="DCP_WORLD = 2; the CPU has 1"):
        metadata.build_prefill_chunk_metadata(
            none, none, none, none, none, none, none, 0, 0, 0, 2, 1, 1024, 4
        )


@pytest.mark.engine
def test_every_replacement_has_the_parameters_of_its_kernel():
    pytest.importorskip("vllm")
    import inspect

    from vllm.triton_utils import HAS_TRITON, dispatcher

    if HAS_TRITON:
        pytest.skip("Triton runs here; the replacements are not used")
    registered = dispatcher._registry
    for name, replacement in metadata.KERNELS.items():
        host, attribute = dispatcher._resolve_kernel(name)
        original = registered[name][0] if name in registered else getattr(host, attribute)
        parameters = list(inspect.signature(replacement).parameters)[:-1]
        assert len(parameters) == len(dispatcher._kernel_arg_names(original)), name
