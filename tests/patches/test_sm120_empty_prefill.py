"""Guard of deepseek-v4-skip-prefill-chunks-without-a-token-on-sm120.patch."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine
HEADS, DIM, WINDOW = 8, 512, 128


@pytest.fixture
def attention(monkeypatch):
    """(attention of a sliding layer, tokens of each FlashInfer call)."""
    import vllm.models.deepseek_v4.nvidia.flashinfer_sparse as module

    calls = []

    def flashinfer(**arguments):
        query = arguments["query"]
        if query.shape[0] == 0:
            raise RuntimeError("cannot reshape tensor of 0 elements into shape [0, -1]")
        assert len(arguments["sparse_indices"]) == len(query) == len(arguments["out"])
        calls.append(query.shape[0])

    class Attention(module.DeepseekV4FlashInferSM120Attention):
        def __init__(self):
            nn.Module.__init__(self)
            self.compress_ratio = 0
            self.scale = 1.0
            self.attn_sink = None
            self.kv_cache_torch_dtype = torch.uint8
            self.PREFILL_CHUNK_SIZE = 2

        def _get_workspace(self, device):
            return None

        def _as_sparse_cache(self, cache):
            return cache

    monkeypatch.setattr(module, "flashinfer_trtllm_batch_decode_sparse_mla_dsv4", flashinfer)
    return Attention(), calls


def run(attention, query_lens: list[int]) -> None:
    """One step of prefills only, with these numbers of tokens."""
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    tokens = int(starts[-1])
    metadata = SimpleNamespace(
        num_prefills=len(query_lens),
        num_decodes=0,
        num_decode_tokens=0,
        num_prefill_tokens=tokens,
        query_start_loc_cpu=starts,
        # vLLM's builder makes none for no token.
        prefill_swa_indices=torch.zeros(tokens, 1, WINDOW) if tokens else None,
        prefill_swa_lens=torch.zeros(tokens) if tokens else None,
    )
    attention._forward_sparse_impl(
        q=torch.zeros(tokens, HEADS, DIM, dtype=torch.bfloat16),
        output=torch.zeros(tokens, HEADS, DIM, dtype=torch.bfloat16),
        flashmla_metadata=None,
        swa_metadata=metadata,
        self_kv_cache=None,
        swa_kv_cache=torch.zeros(1),
        swa_only=True,
    )


@pytest.mark.parametrize(
    ("query_lens", "expected"),
    [([3, 4], [7]), ([3, 4, 0, 0], [7]), ([3, 0, 0, 0, 5], [3, 5]), ([0, 0, 0], [])],
)
def test_chunks_without_a_token_are_skipped(attention, query_lens, expected):
    layer, calls = attention
    run(layer, query_lens)
    assert calls == expected
