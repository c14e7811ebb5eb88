"""Sizes and options of a DeepSeek-V3-family network, from a checkpoint's config.json and back.

Every number of the network comes from the file; families.py reads it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mtp_model.config_keys import REQUIRED
from mtp_model.families import read_config
from mtp_model.problems import UserError

HiddenState = Literal["post_norm", "pre_norm"]


class ConfigError(UserError):
    """A config.json that this toolkit cannot read, with every reason."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        super().__init__("config.json: " + "; ".join(faults))


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071), as in `rope_scaling` of config.json."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    """What cos and sin are multiplied by; None: the ratio of the two mscales."""
    truncate: bool = True
    """Whether the range of interpolated pairs is rounded to whole pairs."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One network of the family; field names are those of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    num_nextn_predict_layers: int = 0
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    """Rotated pairs are (x[2i], x[2i+1]); False: (x[i], x[i + R/2])."""
    yarn: Yarn | None = None
    weight_block_size: tuple[int, int] | None = None
    power_of_two_scales: bool = False
    """FP8 scales that are made anew are powers of two (`scale_fmt: ue8m0`), stored as float32."""
    dtype: str = "bfloat16"
    mtp_hidden_state: HiddenState = "post_norm"

    @property
    def num_dense_layers(self) -> int:
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read the parsed config.json. Raises ConfigError with everything that is wrong with it."""
        fields, faults = read_config(values)
        if faults:
            raise ConfigError(faults)
        return cls(**{**fields, "yarn": fields["yarn"] and Yarn(**fields["yarn"])})

    def to_dict(self) -> dict[str, Any]:
        """The config.json of this network (`from_dict` reads it back to an equal config)."""
        values = dataclasses.asdict(self)
        yarn, block, dtype = (values.pop(key) for key in ("yarn", "weight_block_size", "dtype"))
        ue8m0 = values.pop("power_of_two_scales")
        if values["mtp_hidden_state"] == "post_norm":
            del values["mtp_hidden_state"]
        values |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
        values |= REQUIRED | {"torch_dtype": dtype}
        values["num_key_value_heads"] = self.num_attention_heads
        values["rope_scaling"] = yarn and {"type": "yarn", **yarn}
        if block:
            values["quantization_config"] = {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": list(block),
                **({"scale_fmt": "ue8m0"} if ue8m0 else {}),
            }
        return values
