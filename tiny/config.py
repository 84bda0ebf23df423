"""The model's shape: one frozen dataclass, read from and written to `config.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

MODEL_TYPE = "deepseek_v4"


@dataclass(frozen=True)
class TinyConfig:
    """Fields of `config.json`, under DeepSeek's own names.

    The sizes that look odd for so small a model (head_dim 512, index_topk 512, ...) are those
    that the serving engine's kernels are built for; every quantized `in` dimension is a
    multiple of 128, the FP8 block.

    `compress_ratios` has one entry per layer, the MTP layer last: 0 = sliding window only,
    4 = compressed sparse attention with a lightning indexer, 128 = heavily compressed attention.
    """

    architectures: tuple[str, ...] = ("DeepseekV4ForCausalLM",)
    model_type: str = MODEL_TYPE
    torch_dtype: str = "bfloat16"
    num_hidden_layers: int = 4
    hidden_size: int = 256
    vocab_size: int = 2048
    tie_word_embeddings: bool = False
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 128
    o_lora_rank: int = 128
    o_groups: int = 2
    attention_bias: bool = False
    sliding_window: int = 128
    index_n_heads: int = 4
    index_head_dim: int = 128
    index_topk: int = 512
    compress_ratios: tuple[int, ...] = (0, 4, 128, 4, 0)
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 256
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.5
    num_hash_layers: int = 1
    swiglu_limit: float = 10.0
    hidden_act: str = "silu"
    num_nextn_predict_layers: int = 1
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 65536
    rope_theta: float = 10000
    compress_rope_theta: float = 160000
    rope_scaling: dict[str, Any] = field(
        default_factory=lambda: {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 4096,
        }
    )
    bos_token_id: int = 0
    eos_token_id: int = 1
    expert_dtype: str = "fp4"

    def __post_init__(self) -> None:
        if self.model_type != MODEL_TYPE:
            raise ValueError(f"config: model_type = {self.model_type!r}; {MODEL_TYPE!r} is needed")
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        if len(self.compress_ratios) != layers:
            raise ValueError(
                f"config: {len(self.compress_ratios)} compress_ratios; num_hidden_layers + "
                f"num_nextn_predict_layers = {layers} are needed"
            )
        if any(ratio not in (0, 4, 128) for ratio in self.compress_ratios):
            raise ValueError(f"config: compress_ratios = {self.compress_ratios}; 0, 4, 128 exist")
        for name in ("hidden_size", "q_lora_rank", "moe_intermediate_size"):
            if getattr(self, name) % 128:
                raise ValueError(
                    f"config: {name} = {getattr(self, name)} is not a multiple of 128, the "
                    "quantization block"
                )

    @property
    def nope_head_dim(self) -> int:
        """Leading dimensions of a head that RoPE leaves alone."""
        return self.head_dim - self.qk_rope_head_dim

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TinyConfig:
        """Build from the parsed `config.json`; keys that the model does not use are ignored.

        Raises:
            ValueError: wrong model_type, or a required key is absent.
        """
        names = {f.name for f in fields(cls)}
        if data.get("model_type") != MODEL_TYPE:
            raise ValueError(
                f"config: model_type = {data.get('model_type')!r}; {MODEL_TYPE!r} is needed"
            )
        missing = sorted(names - data.keys() - {"torch_dtype", "architectures"})
        if missing:
            raise ValueError(f"config: keys are missing: {', '.join(missing)}")
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in names}
        return cls(**known)

    @classmethod
    def load(cls, folder: Path) -> TinyConfig:
        """Read `folder/config.json`.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: not JSON, or not a DeepSeek-V4 configuration.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint: {path} does not exist")
        try:
            data = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"checkpoint: {path} is not JSON: {error}") from error
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary written to `config.json`, without `quantization_config`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
