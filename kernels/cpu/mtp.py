"""DeepSeek-V4's multi-token-prediction head on a CPU: vLLM's class there is a stub that raises.

The draft takes the target's residual streams before its `hc_head` and the embedding of the token
just chosen, runs one decoder layer, and ends in its own `hc_head` and norm; embedding and LM head
are the target's. For k > 1 the layer is applied again to its own streams.

Registered as the architecture `DeepSeekV4MTPModel` through vLLM's model registry, so the class
needs no patch. Weights are loaded strictly: every parameter, or an error with the names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mhc import HCHeadOp
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.deepseek_mtp import SharedHead
from vllm.model_executor.models.utils import maybe_prefix
from vllm.models.deepseek_v4.cpu.model import DeepseekV4DecoderLayer
from vllm.sequence import IntermediateTensors

from kernels.cpu import LOGGER

logger = init_logger(LOGGER)

NAMES_SHOWN = 20


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

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
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

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load `mtp.*`; other names are the target's and are skipped.

        Raises:
            ValueError: names that fit no parameter, or parameters (experts, shards of fused
                ones) that no name filled; up to 20 of each are listed.
        """
        loaded = MtpWeightLoader(self).load(weights)
        logger.info_once("MTP draft model loaded: %d params", len(loaded))
        return loaded


def _float_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)


class MtpWeightLoader:
    """Maps checkpoint names to parameters of `DeepSeekV4MTP` and counts what was filled.

    A unit is (parameter, shard, expert): shard is w1, w2, w3 for experts, the position for other
    fused parameters, None for the rest.
    """

    # checkpoint module -> (fused module, position)
    FUSED = {
        "attn.wq_a": ("attn.fused_wqa_wkv", 0),
        "attn.wkv": ("attn.fused_wqa_wkv", 1),
        "ffn.shared_experts.w1": ("ffn.shared_experts.gate_up_proj", 0),
        "ffn.shared_experts.w3": ("ffn.shared_experts.gate_up_proj", 1),
    }
    RENAMED = {
        "ffn.shared_experts.w2.": "ffn.shared_experts.down_proj.",
        "ffn.gate.bias": "ffn.gate.e_score_correction_bias",
    }
    LAYER_LEVEL = frozenset(
        ("enorm", "hnorm", "e_proj", "h_proj", "hc_head_fn", "hc_head_base", "hc_head_scale")
    )
    # Taken from the target after loading; a checkpoint may carry copies.
    SHARED = ("embed_tokens.weight", "shared_head.head.weight")
    SCALES = ("scale", "weight_scale", "weight_scale_inv")
    EXPERT = re.compile(r"ffn\.experts\.(\d+)\.(w[123])\.(\w+)")

    def __init__(self, model: DeepSeekV4MTP) -> None:
        self.first_layer = model.model.first_layer
        self.num_layers = model.model.num_layers
        self.num_experts = model.config.n_routed_experts
        self.parameters = dict(model.named_parameters())

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        missing = self._units()
        unexpected: list[str] = []
        loaded: set[str] = set()
        for name, tensor in weights:
            match = re.fullmatch(r"(?:model\.)?mtp\.(\d+)\.(.+)", name)
            if match is None:
                continue
            layer, rest = int(match[1]), match[2]
            unit = self._unit(layer, rest) if layer < self.num_layers else None
            if unit is None:
                unexpected.append(name)
                continue
            self._fill(unit, tensor)
            loaded.add(unit[0])
            missing.discard(unit)
        self._check(missing, unexpected)
        return loaded

    def _units(self) -> set[tuple[str, str | int | None, int | None]]:
        units: set[tuple[str, str | int | None, int | None]] = set()
        for name in self.parameters:
            leaf = name.rsplit(".", 1)[-1]
            if name.endswith(self.SHARED):
                continue
            if ".experts." in name:
                shards = ("w1", "w3") if leaf.startswith("w13_") else ("w2",)
                units |= {(name, s, e) for s in shards for e in range(self.num_experts)}
            elif any(f".{fused}." in name for fused, _ in self.FUSED.values()):
                units |= {(name, 0, None), (name, 1, None)}
            else:
                units.add((name, None, None))
        return units

    def _unit(self, layer: int, rest: str) -> tuple[str, str | int | None, int | None] | None:
        """The unit that checkpoint name `mtp.{layer}.{rest}` fills, or None."""
        base = f"model.layers.{self.first_layer + layer}."
        if expert := self.EXPERT.fullmatch(rest):
            index, shard, leaf = int(expert[1]), expert[2], expert[3]
            fused = "w2" if shard == "w2" else "w13"
            prefix = f"{base}mtp_block.ffn.experts.routed_experts.{fused}_"
            name = self._existing(prefix, leaf)
            return (name, shard, index) if name and index < self.num_experts else None
        if rest == "emb.tok_emb.weight":
            return "model.embed_tokens.weight", None, None
        if rest in ("norm.weight", "head.weight"):
            return f"{base}shared_head.{rest}", None, None
        shard: int | None = None
        if rest.split(".", 1)[0] not in self.LAYER_LEVEL:
            module, _, leaf = rest.rpartition(".")
            if module in self.FUSED:
                module, shard = self.FUSED[module]
                rest = f"{module}.{leaf}"
            for old, new in self.RENAMED.items():
                if rest.startswith(old):
                    rest = new + rest[len(old) :]
            base += "mtp_block."
        prefix, dot, leaf = rest.rpartition(".")
        name = self._existing(base + prefix + dot, leaf)
        return (name, shard, None) if name else None

    def _existing(self, prefix: str, leaf: str) -> str | None:
        """`prefix + leaf`, a scale under whichever of its names the model has it."""
        for candidate in self.SCALES if leaf in self.SCALES else (leaf,):
            if prefix + candidate in self.parameters:
                return prefix + candidate
        return None

    def _fill(self, unit: tuple[str, str | int | None, int | None], tensor: torch.Tensor) -> None:
        name, shard, expert = unit
        parameter = self.parameters[name]
        if tensor.dtype == torch.float8_e8m0fnu and parameter.dtype == torch.uint8:
            # Copying would convert the number, e.g. 2**-7 to 0; the bytes are meant.
            tensor = tensor.view(torch.uint8)
        if name.endswith("attn_sink"):
            parameter.data[: tensor.shape[0]].copy_(tensor)
            return
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        if expert is not None:
            loader(parameter, tensor, name, shard_id=shard, expert_id=expert)
        elif shard is not None:
            loader(parameter, tensor, shard)
        else:
            loader(parameter, tensor)

    def _check(
        self, missing: set[tuple[str, str | int | None, int | None]], unexpected: list[str]
    ) -> None:
        problems = []
        if missing:
            names = sorted(
                f"{name}"
                + (f" [{shard}]" if shard is not None else "")
                + (f" of expert {expert}" if expert is not None else "")
                for name, shard, expert in missing
            )
            problems.append(f"{len(names)} not filled: " + ", ".join(names[:NAMES_SHOWN]))
        if unexpected:
            problems.append(
                f"{len(unexpected)} unexpected: " + ", ".join(sorted(unexpected)[:NAMES_SHOWN])
            )
        if problems:
            raise ValueError("load of the MTP head: " + "; ".join(problems))
