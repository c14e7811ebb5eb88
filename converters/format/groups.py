"""Which part of the network a tensor belongs to, for tables; knows slots, nothing of bytes."""

from converters.format.mapping import Slot

GROUPS = (
    "embedding and head",
    "attention",
    "dense MLP",
    "routed experts",
    "shared experts",
    "router",
    "norms",
    "MTP modules",
    "copies",
)
"""The main model's parts, then the MTP modules whole, then what they repeat of the main model."""

_NORMS = {
    "norm",
    "input_layernorm",
    "post_attention_layernorm",
    "q_a_layernorm",
    "kv_a_layernorm",
}
_BY_MODULE = {
    "embed_tokens": "embedding and head",
    "lm_head": "embedding and head",
    "experts": "routed experts",
    "shared_experts": "shared experts",
    "gate": "router",
}


def group_of(slot: Slot) -> str:
    """The group of a tensor; scales go with their weights."""
    parts = slot.path.split(".")
    if slot.copy_of:
        return "copies"
    if parts[0] == "mtp":
        return "MTP modules"
    if parts[-2] in _NORMS:
        return "norms"
    for part in parts:
        if part in _BY_MODULE:
            return _BY_MODULE[part]
    return "attention" if "self_attn" in parts else "dense MLP"
