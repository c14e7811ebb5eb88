"""config.json of a DeepSeek-V3-family network, read as the fields of ModelConfig.

A config is a program: each key is computed, or known to change nothing, or refused by name.
`rope_scaling` and its newer name `rope_parameters` are read as one. What the keys mean:
DeepSeek's modeling_deepseek.py and Transformers 5.23; where these two differ it is said.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from mtp_model.config_keys import HARMLESS, NEUTRAL, REQUIRED

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
ARCHITECTURES = ("DeepseekV3ForCausalLM", "KimiK2ForCausalLM")  # the same network by two names
DRAFT_ARCHITECTURE = "DeepseekV3ForCausalLMNextN"
# No published model of the family comes near this; a larger size in an untrusted file is a fault.
LARGEST_SIZE = 1 << 24
LARGEST_BLOCK = 1 << 16
LONGEST_SHOWN = 80  # characters of a faulty value in a message
LARGEST_NUMBER = 1e15  # of thetas, factors and scales
SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
    "num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "n_routed_experts n_shared_experts num_experts_per_tok n_group topk_group"
).split()
# Transformers' other names for a key.
ALIASES = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
COMPUTED = {
    *SIZES,
    *ALIASES.values(),
    *(
        "model_type architectures first_k_dense_replace q_lora_rank routed_scaling_factor "
        "norm_topk_prob rms_norm_eps rope_theta rope_scaling rope_parameters rope_interleave "
        "max_position_embeddings num_key_value_heads head_dim qk_head_dim quantization_config "
        "torch_dtype dtype mtp_hidden_state"
    ).split(),
}
ROPE_TYPES = ("default", "yarn", None)
OF_YARN = set(
    (
        "factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim "
        "attention_factor truncate"
    ).split()
)
ROPE_KEYS = OF_YARN | {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
QUANTISATION = {  # keys of quantization_config and the values that are read
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    "scale_fmt": ("ue8m0", "float", None),
    "dequantize": (False, None),
    "modules_to_convert": (None, []),
    "expert_dtype": ("fp8", None),
}
NOT_CONVERTED = ("modules_to_not_convert", "ignored_layers")  # two names of one list
OTHER_QUANTISATION = {"quant_method", "weight_block_size", *NOT_CONVERTED}
DTYPES = ("bfloat16", "float32")


def read_config(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of ModelConfig in a parsed config.json, and everything that is wrong with it.

    `yarn` is a dict of the fields of Yarn, or None. The fields mean nothing where there are faults.
    """
    reader = _Reader(values)
    fields = reader.fields()
    return fields, reader.faults


def not_converted(values: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Key and content of the list of modules that are not FP8, of a config without faults."""
    found = values.get("quantization_config") or {}
    key = next((key for key in NOT_CONVERTED if found.get(key)), NOT_CONVERTED[0])
    return f"quantization_config.{key}", tuple(found.get(key) or ())


class _Reader:
    """Reads one config.json, collecting faults instead of stopping at the first."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = dict(values)
        self.faults: list[str] = []
        # Keys of another network mean nothing here, and it has no need of ours.
        self._is_foreign = values.get("model_type") not in MODEL_TYPES

    def fields(self) -> dict[str, Any]:
        self._resolve_aliases()
        if not self._is_foreign:
            self._refuse_unknown("", self.values, COMPUTED | HARMLESS | REQUIRED.keys())
        self._require_architecture()
        rope = self._rope()
        theta = self._positive(rope, "rope_theta", 10000.0)
        fields = {
            **self._sizes(),
            "q_lora_rank": self._size("q_lora_rank", minimum=1, optional=True),
            "routed_scaling_factor": self._number(self.values, "routed_scaling_factor", 2.5),
            "rms_norm_eps": self._positive(self.values, "rms_norm_eps", 1e-6),
            "norm_topk_prob": self._flag(self.values, "norm_topk_prob", ""),
            "rope_theta": theta,
            "rope_interleave": self._flag(self.values, "rope_interleave", ""),
            "yarn": self._yarn(rope, theta),
            **self._quantisation(),
            "dtype": self._choice(("torch_dtype", "dtype"), DTYPES, "bfloat16"),
            "mtp_hidden_state": self._choice(
                ("mtp_hidden_state",), ("post_norm", "pre_norm"), "post_norm"
            ),
        }
        if not self.faults:
            self._check_relations(fields)
        return fields

    def _fault(self, key: str, found: Any, needed: str) -> None:
        self.faults.append(f"{key} is {_shown(found)}, needed {needed}")

    def _resolve_aliases(self) -> None:
        for alias, key in ALIASES.items():
            if alias in self.values:
                found = self.values.pop(alias)
                if self.values.setdefault(key, found) != found:
                    self._contradiction(alias, found, key, self.values[key])

    def _contradiction(self, key: str, found: Any, other: str, value: Any) -> None:
        both = f"{key} is {_shown(found)} and {other} is {_shown(value)}"
        self.faults.append(f"{both}: two values for one thing; remove the one that is wrong")

    def _refuse_unknown(self, prefix: str, values: Mapping[str, Any], known: Iterable[str]) -> None:
        known = set(known)
        for key, found in values.items():
            if prefix == "" and key in NEUTRAL:
                if found not in NEUTRAL[key]:
                    self._fault(key, found, repr(NEUTRAL[key][0]))
            elif key not in known:
                self.faults.append(
                    f"{prefix}{_shown(key)} is {_shown(found)}, and this toolkit does not know "
                    "what it changes; remove it where it changes no logit"
                )

    def _require_architecture(self) -> None:
        found, inner = self.values.get("model_type"), self.values.get("text_config")
        if self._is_foreign:
            needed = " or ".join(MODEL_TYPES)
            if isinstance(inner, Mapping) and inner.get("model_type") in MODEL_TYPES:
                needed += ", as its text_config is; save that language model alone and import that"
            self._fault("model_type", found, needed)
        for key, needed in REQUIRED.items():
            if self.values.get(key, needed) != needed:
                self._fault(key, self.values[key], repr(needed))
        architectures = self.values.get("architectures") or [ARCHITECTURES[0]]
        if architectures == [DRAFT_ARCHITECTURE]:
            self.faults.append(
                f"architectures is ['{DRAFT_ARCHITECTURE}']: a stand-alone draft for SGLang, an "
                "MTP module without its main model; import the main model, with --mtp-from naming "
                "this draft"
            )
        elif architectures not in [[name] for name in ARCHITECTURES]:
            needed = " or ".join(f"['{name}']" for name in ARCHITECTURES)
            self._fault("architectures", architectures, needed)

    def _mapping(self, key: str) -> Mapping[str, Any]:
        found = self.values.get(key) or {}
        if not isinstance(found, Mapping):
            self._fault(key, found, "an object or null")
            return {}
        return found

    def _sizes(self) -> dict[str, int | None]:
        sizes = {key: self._size(key, minimum=1) for key in SIZES}
        sizes["first_k_dense_replace"] = self._size("first_k_dense_replace", minimum=0)
        key = "num_nextn_predict_layers"
        sizes[key] = 0 if self.values.get(key) is None else self._size(key, minimum=0)
        return sizes

    def _size(self, key: str, minimum: int, optional: bool = False) -> int | None:
        found = self.values.get(key)
        if found is None and (optional or self._is_foreign):
            return None
        if not isinstance(found, int) or isinstance(found, bool):
            self._fault(key, found, "a whole number")
            return None
        if not minimum <= found <= LARGEST_SIZE:
            self._fault(key, found, f"{minimum} to {LARGEST_SIZE}")
            return None
        return found

    def _number(
        self, values: Mapping[str, Any], key: str, default: float | None, prefix: str = ""
    ) -> float:
        found = values.get(key)
        found = default if found is None else found
        if (number := _as_number(found)) is None:
            self._fault(prefix + key, found, f"a number from 0 to {LARGEST_NUMBER:.0e}")
        return 1.0 if number is None else number

    def _positive(self, values: Mapping[str, Any], key: str, default: float) -> float:
        """A number that something is divided by."""
        if (number := self._number(values, key, default)) == 0:
            self._fault(key, 0, "more than 0")
        return number

    def _flag(self, values: Mapping[str, Any], key: str, prefix: str) -> bool:
        """A switch that is on unless it is said to be off."""
        found = values.get(key, True)
        if not isinstance(found, bool):
            self._fault(prefix + key, found, "true or false")
            return True
        return found

    def _choice(self, keys: tuple[str, ...], allowed: tuple[str, ...], default: str) -> str:
        present = [key for key in keys if self.values.get(key) is not None]
        if not present:
            return default
        found = self.values[present[0]]
        for key in present[1:]:
            if self.values[key] != found:
                self._contradiction(present[0], found, key, self.values[key])
        if found not in allowed:
            self._fault(present[0], found, " or ".join(allowed))
            return default
        return found

    def _rope(self) -> dict[str, Any]:
        """`rope_parameters` and `rope_scaling` as one, with `rope_type` and `rope_theta` in it."""
        found: dict[str, Any] = {}
        origin: dict[str, str] = {}
        if self.values.get("rope_theta") is not None:
            found["rope_theta"], origin["rope_theta"] = self.values["rope_theta"], "rope_theta"
        for place in ("rope_parameters", "rope_scaling"):
            values = self._mapping(place)
            if values and "rope_type" not in values and "type" not in values:
                values = {**values, "rope_type": "default"}
            if values.get("rope_type", values.get("type")) in ROPE_TYPES:
                self._refuse_unknown(f"{place}.", values, ROPE_KEYS)
            for key, value in values.items():
                name = "rope_type" if key == "type" else key
                if found.setdefault(name, value) != value:
                    self._contradiction(origin[name], found[name], f"{place}.{key}", value)
                origin.setdefault(name, f"{place}.{key}")
        if found.get("partial_rotary_factor") not in (None, 1):
            self._fault("partial_rotary_factor", found["partial_rotary_factor"], "1")
        return found

    def _yarn(self, rope: Mapping[str, Any], theta: float) -> dict[str, Any] | None:
        """The fields of Yarn.

        Without `mscale` it is 1, without `mscale_all_dim` 0, as in DeepSeek's code and in vLLM;
        Transformers ignores each of the two where the other is missing.
        """
        kind = rope.get("rope_type") or "default"
        if kind == "default":
            if unused := [key for key in rope if key in OF_YARN and rope[key] is not None]:
                needed = f"yarn, which alone computes {' and '.join(unused)}, or none of these"
                self._fault("rope_scaling.type", kind, needed)
            return None
        if kind != "yarn":
            self._fault("rope_scaling.type", kind, "yarn or none")
            return None

        def number(key: str, default: float | None = None) -> float:
            return self._number(rope, key, default, "rope_scaling.")

        original = number("original_max_position_embeddings")
        yarn: dict[str, Any] = {
            "factor": self._yarn_factor(rope, original),
            "original_max_position_embeddings": int(original),
            "beta_fast": number("beta_fast", 32.0),
            "beta_slow": number("beta_slow", 1.0),
            "mscale": number("mscale", 1.0),
            "mscale_all_dim": number("mscale_all_dim", 0.0),
            "attention_factor": None
            if rope.get("attention_factor") is None
            else number("attention_factor"),
            "truncate": self._flag(rope, "truncate", "rope_scaling."),
        }
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            if yarn[name] <= 0:
                self._fault(f"rope_scaling.{name}", rope.get(name), "more than 0")
        if theta <= 1:
            self._fault("rope_theta", theta, "more than 1 for yarn")
        return yarn

    def _yarn_factor(self, rope: Mapping[str, Any], original: float) -> float:
        """`factor`; where it is null the length of the model over that of its pre-training."""
        if "factor" not in rope or rope["factor"] is not None:
            return self._number(rope, "factor", None, "rope_scaling.")
        longest = self._size("max_position_embeddings", minimum=1)
        return (longest or 1) / (original or 1)

    def _quantisation(self) -> dict[str, Any]:
        found = self._mapping("quantization_config")
        if (method := found.get("quant_method", "fp8")) != "fp8":
            needed = "fp8 in blocks, or weights that were dequantised to bfloat16"
            self._fault("quantization_config.quant_method", method, needed)
            found = {}  # whose keys mean other things
        self._refuse_unknown(
            "quantization_config.", found, QUANTISATION.keys() | OTHER_QUANTISATION
        )
        for key, allowed in QUANTISATION.items():
            if found.get(key, allowed[0]) not in allowed:
                needed = " or ".join(str(value) for value in allowed if value is not None)
                self._fault(f"quantization_config.{key}", found[key], needed)
        self._check_not_converted(found)
        return {
            "weight_block_size": self._block(found) if found else None,
            "power_of_two_scales": found.get("scale_fmt") == "ue8m0",
        }

    def _check_not_converted(self, quantization: Mapping[str, Any]) -> None:
        """What its entries mean, and whether tensors contradict them, is format/kinds.py's."""
        lists = {key: quantization[key] for key in NOT_CONVERTED if quantization.get(key)}
        for key, found in lists.items():
            if not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
                self._fault(f"quantization_config.{key}", found, "a list of module names, or null")
        if len(lists) == 2 and lists[NOT_CONVERTED[0]] != lists[NOT_CONVERTED[1]]:
            first, second = ((f"quantization_config.{key}", v) for key, v in lists.items())
            self._contradiction(*first, *second)

    def _block(self, quantization: Mapping[str, Any]) -> tuple[int, int] | None:
        block = quantization.get("weight_block_size")
        match block:
            case [int(rows), int(cols)] if 1 <= rows <= LARGEST_BLOCK >= cols >= 1:
                if not isinstance(rows, bool) and not isinstance(cols, bool):
                    return rows, cols
        self._fault("quantization_config.weight_block_size", block, "two sizes, as [128, 128]")
        return None

    def _check_relations(self, fields: dict[str, Any]) -> None:
        experts, groups = fields["n_routed_experts"], fields["n_group"]
        chosen, allowed = fields["num_experts_per_tok"], fields["topk_group"] * (experts // groups)
        if experts % groups or experts // groups < 2:
            self._fault("n_group", groups, f"a divisor of {experts} experts, 2 or more in a group")
        elif fields["topk_group"] > groups:
            self._fault("topk_group", fields["topk_group"], f"at most n_group {groups}")
        elif chosen > allowed:
            needed = f"at most the {allowed} experts of the kept groups"
            self._fault("num_experts_per_tok", chosen, needed)
        rope, nope = fields["qk_rope_head_dim"], fields["qk_nope_head_dim"]
        if rope % 2:
            self._fault("qk_rope_head_dim", rope, "an even number")
        heads = fields["num_attention_heads"]
        for key, allowed in {
            "num_key_value_heads": (heads,),
            "qk_head_dim": (nope + rope,),
            "head_dim": (rope, nope + rope),  # Transformers means the rotary part by it
        }.items():
            if self.values.get(key) not in (None, *allowed):
                self._fault(key, self.values[key], " or ".join(map(str, allowed)))


def _as_number(value: Any) -> float | None:
    """A number from 0 to LARGEST_NUMBER as float; None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 <= value <= LARGEST_NUMBER else None


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    text = repr(value) if isinstance(value, str) and text == value else text
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
