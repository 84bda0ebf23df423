"""DeepSeek-V4's multi-token-prediction head on a CPU: vLLM's class there is a stub that raises.

The draft takes the target's residual streams before its `hc_head` and the embedding of the token
just chosen, runs one decoder layer, and ends in its own `hc_head` and norm; embedding and LM head
are the target's. For k > 1 the layer is applied again to its own streams.

Registered as the architecture `DeepSeekV4MTPModel` through vLLM's model registry, so the class
needs no patch. Weights are loaded strictly: every parameter, or an error with the names.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mhc import HCHeadOp
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.deepseek_mtp import SharedHead
from vllm.model_executor.models.utils import maybe_prefix
from vllm.models.deepseek_v4.cpu.model import DeepseekV4DecoderLayer, DeepseekV4ForCausalLM
from vllm.sequence import IntermediateTensors

from kernels.loading import Part, is_mtp_name
from kernels.loading_vllm import load_strictly
from kernels.quant_targets import use_vllm_names


class MultiTokenPredictorLayer(nn.Module):
    """One MTP layer: (tokens, hc * hidden) streams and (tokens, hidden) embeddings to streams."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        self.hidden_size = config.hidden_size
        self.hc_mult = config.hc_mult
        self.hc_eps = config.hc_eps
        self.rms_norm_eps = config.rms_norm_eps

        self.enorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.e_proj, self.h_proj = (
            ReplicatedLinear(
                config.hidden_size,
                config.hidden_size,
                bias=False,
                return_bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.{name}",
            )
            for name in ("e_proj", "h_proj")
        )
        streams = config.hc_mult * config.hidden_size
        self.hc_head_fn = _float_parameter(config.hc_mult, streams)
        self.hc_head_base = _float_parameter(config.hc_mult)
        self.hc_head_scale = _float_parameter(1)
        self.hc_head_op = HCHeadOp()
        self.shared_head = SharedHead(config=config, prefix=prefix, quant_config=quant_config)
        self.mtp_block = DeepseekV4DecoderLayer(vllm_config, prefix=prefix)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        previous_hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor,
    ) -> torch.Tensor:
        # The first position has no token before it; training masks its embedding.
        embeds = inputs_embeds.masked_fill((positions == 0).unsqueeze(-1), 0)
        streams = self.hnorm(previous_hidden_states.reshape(-1, self.hidden_size))
        hidden = self.h_proj(streams).view(-1, self.hc_mult, self.hidden_size)
        hidden = hidden + self.e_proj(self.enorm(embeds)).unsqueeze(-2)
        hidden, *_ = self.mtp_block(x=hidden, positions=positions, input_ids=input_ids)
        return hidden.flatten(1)  # (tokens, hc * hidden), fed back when k > 1

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Collapse and normalize: (tokens, hc * hidden) to (tokens, hidden)."""
        streams = hidden_states.view(-1, self.hc_mult, self.hidden_size)
        collapsed = self.hc_head_op(
            streams,
            self.hc_head_fn,
            self.hc_head_scale,
            self.hc_head_base,
            self.rms_norm_eps,
            self.hc_eps,
        )
        return self.shared_head(collapsed)


class MultiTokenPredictor(nn.Module):
    """The MTP layers, keyed by their layer number: num_hidden_layers and up."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.first_layer = config.num_hidden_layers
        self.num_layers = config.num_nextn_predict_layers
        self.layers = nn.ModuleDict(
            {
                str(index): MultiTokenPredictorLayer(vllm_config, f"{prefix}.layers.{index}")
                for index in range(self.first_layer, self.first_layer + self.num_layers)
            }
        )
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def layer(self, spec_step_idx: int) -> MultiTokenPredictorLayer:
        return self.layers[str(self.first_layer + spec_step_idx % self.num_layers)]


class DeepSeekV4MTP(nn.Module):
    """The draft model that vLLM's proposer runs; interface of `nvidia/mtp.py`."""

    packed_modules_mapping = DeepseekV4ForCausalLM.packed_modules_mapping

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        use_vllm_names(self.quant_config, self.config.to_dict())
        self.model = MultiTokenPredictor(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model")
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        layer = self.model.layer(spec_step_idx)
        return layer(input_ids, positions, hidden_states, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor:
        layer = self.model.layer(spec_step_idx)
        return self.model.logits_processor(layer.shared_head.head, layer.head(hidden_states))

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        return not is_mtp_name(name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load `mtp.*` strictly; other names are the target's and are skipped."""
        return load_strictly(self, Part.DRAFT, weights)


def _float_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
