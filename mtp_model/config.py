"""Sizes and options of a DeepSeek-V3-family network, from a checkpoint's config.json and back.

Every number of the network comes from the file; nothing here knows of weights or of JAX.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mtp_model.problems import UserError

HiddenState = Literal["post_norm", "pre_norm"]

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
# No published model of the family comes near this; a larger size in an untrusted file is a fault.
LARGEST_SIZE = 1 << 24
LARGEST_BLOCK = 1 << 16
LONGEST_SHOWN = 80  # characters of a faulty value in a message
LARGEST_NUMBER = 1e15  # of thetas, factors and scales
# What the network computes is fixed for these; a config that says otherwise is not this network.
REQUIRED = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
}
DTYPES = ("bfloat16", "float32")


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
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    weight_block_size: tuple[int, int] | None = None
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
        reader = _Reader(values)
        config = reader.config()
        if reader.faults:
            raise ConfigError(reader.faults)
        assert config is not None
        return config

    def to_dict(self) -> dict[str, Any]:
        """The config.json of this network (`from_dict` reads it back to an equal config)."""
        values = dataclasses.asdict(self)
        yarn, block, dtype = (values.pop(key) for key in ("yarn", "weight_block_size", "dtype"))
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
            }
        return values


class _Reader:
    """Reads one config.json, collecting faults instead of stopping at the first."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.faults: list[str] = []

    def config(self) -> ModelConfig | None:
        self._require_architecture()
        rope = self._mapping("rope_parameters")  # Transformers 5 keeps theta and scaling here
        theta = self._number({**self.values, **rope}, "rope_theta", 10000.0)
        fields = {
            **self._sizes(),
            "q_lora_rank": self._size("q_lora_rank", minimum=1, optional=True),
            "routed_scaling_factor": self._number(self.values, "routed_scaling_factor", 1.0),
            "rms_norm_eps": self._number(self.values, "rms_norm_eps", 1e-6),
            "norm_topk_prob": bool(self.values.get("norm_topk_prob", True)),
            "rope_theta": theta,
            "yarn": self._yarn(rope or self._mapping("rope_scaling")),
            "weight_block_size": self._block(self._mapping("quantization_config")),
            "dtype": self._choice(("torch_dtype", "dtype"), DTYPES, "bfloat16"),
            "mtp_hidden_state": self._choice(
                ("mtp_hidden_state",), ("post_norm", "pre_norm"), "post_norm"
            ),
        }
        if self.faults:
            return None
        self._check_relations(fields)
        return ModelConfig(**fields)

    def _fault(self, key: str, found: Any, needed: str) -> None:
        shown = repr(found)
        if len(shown) > LONGEST_SHOWN:
            shown = f"{shown[:LONGEST_SHOWN]}..."
        self.faults.append(f"{key} is {shown}, needed {needed}")

    def _require_architecture(self) -> None:
        found = self.values.get("model_type")
        if found not in MODEL_TYPES:
            self._fault("model_type", found, " or ".join(MODEL_TYPES))
        for key, needed in REQUIRED.items():
            if self.values.get(key, needed) != needed:
                self._fault(key, self.values[key], repr(needed))

    def _mapping(self, key: str) -> Mapping[str, Any]:
        found = self.values.get(key) or {}
        if not isinstance(found, Mapping):
            self._fault(key, found, "an object or null")
            return {}
        return found

    def _sizes(self) -> dict[str, int | None]:
        positive = (
            "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
            "num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
            "n_routed_experts n_shared_experts num_experts_per_tok n_group topk_group"
        ).split()
        sizes = {key: self._size(key, minimum=1) for key in positive}
        sizes["first_k_dense_replace"] = self._size("first_k_dense_replace", minimum=0)
        present = "num_nextn_predict_layers" in self.values
        sizes["num_nextn_predict_layers"] = (
            self._size("num_nextn_predict_layers", minimum=0) if present else 0
        )
        return sizes

    def _size(self, key: str, minimum: int, optional: bool = False) -> int | None:
        found = self.values.get(key)
        if optional and found is None:
            return None
        if not isinstance(found, int) or isinstance(found, bool):
            self._fault(key, found, "a whole number")
            return None
        if not minimum <= found <= LARGEST_SIZE:
            self._fault(key, found, f"{minimum} to {LARGEST_SIZE}")
            return None
        return found

    def _number(self, values: Mapping[str, Any], key: str, default: float | None) -> float:
        found = values.get(key, default)
        good = isinstance(found, int | float) and not isinstance(found, bool)
        if not good or not 0 <= found <= LARGEST_NUMBER:
            self._fault(key, found, f"a number from 0 to {LARGEST_NUMBER:.0e}")
            return 1.0
        return float(found)

    def _choice(self, keys: tuple[str, ...], allowed: tuple[str, ...], default: str) -> str:
        key = next((key for key in keys if self.values.get(key) is not None), None)
        if key is None:
            return default
        found = self.values[key]
        if found not in allowed:
            self._fault(key, found, " or ".join(allowed))
            return default
        return found

    def _yarn(self, scaling: Mapping[str, Any]) -> Yarn | None:
        kind = scaling.get("type", scaling.get("rope_type", "default"))
        if kind == "default":
            return None
        if kind != "yarn":
            self._fault("rope_scaling.type", kind, "yarn or none")
            return None
        defaults = {f.name: f.default for f in dataclasses.fields(Yarn)}
        required = ("factor", "original_max_position_embeddings")
        numbers = {
            name: self._number(scaling, name, None if name in required else float(str(default)))
            for name, default in defaults.items()
        }
        for name in (*required, "beta_fast", "beta_slow"):
            if numbers[name] <= 0:
                self._fault(f"rope_scaling.{name}", scaling.get(name), "more than 0")
        original = int(numbers.pop("original_max_position_embeddings"))
        return Yarn(original_max_position_embeddings=original, **numbers)

    def _block(self, quantization: Mapping[str, Any]) -> tuple[int, int] | None:
        if not quantization:
            return None
        for key, needed in {"quant_method": "fp8", "fmt": "e4m3"}.items():
            if quantization.get(key, needed) != needed:
                self._fault(f"quantization_config.{key}", quantization[key], needed)
        block = quantization.get("weight_block_size")
        match block:
            case [int(rows), int(cols)] if 1 <= rows <= LARGEST_BLOCK >= cols >= 1:
                if not isinstance(rows, bool) and not isinstance(cols, bool):
                    return rows, cols
        self._fault("quantization_config.weight_block_size", block, "two sizes, as [128, 128]")
        return None

    def _check_relations(self, fields: dict[str, Any]) -> None:
        experts, groups = fields["n_routed_experts"], fields["n_group"]
        if experts % groups or experts // groups < 2:
            self._fault("n_group", groups, f"a divisor of {experts} experts, 2 or more in a group")
        elif fields["topk_group"] > groups:
            self._fault("topk_group", fields["topk_group"], f"at most n_group {groups}")
        elif fields["num_experts_per_tok"] > fields["topk_group"] * (experts // groups):
            allowed = fields["topk_group"] * (experts // groups)
            self._fault(
                "num_experts_per_tok",
                fields["num_experts_per_tok"],
                f"at most the {allowed} experts of the kept groups",
            )
        if fields["qk_rope_head_dim"] % 2:
            self._fault("qk_rope_head_dim", fields["qk_rope_head_dim"], "an even number")
