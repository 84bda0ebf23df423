"""Guard of cpu-index-speculative-tokens-one-row-each.patch."""

import pytest
import torch

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine


def test_two_speculative_tokens_of_a_request_become_two_rows(monkeypatch):
    from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUIndexerMetadataBuilder
    from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerMetadataBuilder

    def native(self):
        """What the shared constructor decides for one speculative token on a CPU."""
        self.use_flattening = False
        self.supports_varlen = False

    monkeypatch.setattr(DeepseekV32IndexerMetadataBuilder, "__init__", native)
    builder = DeepseekV4CPUIndexerMetadataBuilder()
    builder.vllm_config = type("Config", (), {"speculative_config": None})()
    builder.decode_seq_lens_buffer = torch.zeros(8, dtype=torch.int32)
    builder.expanded_block_table_buffer = torch.zeros(8, 3, dtype=torch.int32)
    builder.decode_lens_buffer = torch.zeros(8, dtype=torch.int32)
    builder.arange_buffer = torch.arange(8, dtype=torch.int32)
    # Decode lengths 2 and 1: the general path, which launches no kernel.
    seq_lens, table, lens, rows, padding = builder._prepare_decode_tensors(
        seq_lens=torch.tensor([10, 7], dtype=torch.int32),
        block_table=torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32),
        decode_lens=torch.tensor([2, 1], dtype=torch.int32),
        decode_lens_cpu=torch.tensor([2, 1]),
        query_start_loc=torch.tensor([0, 2], dtype=torch.int32),
        num_decodes=2,
        num_decode_tokens=3,
        use_native=not (builder.use_flattening or builder.supports_varlen),
        next_n=2,
        max_decode_len=2,
    )
    assert (rows, padding) == (3, False)
    assert seq_lens.tolist() == [9, 10, 7]
    assert lens.tolist() == [1, 1, 1]
    assert table.tolist() == [[1, 2, 3], [1, 2, 3], [4, 5, 6]]
