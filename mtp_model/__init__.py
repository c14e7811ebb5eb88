"""The DeepSeek-V3 network with its MTP modules, and the directory its weights are kept in."""

from mtp_model.config import ConfigError, ModelConfig
from mtp_model.context import Context, make_context
from mtp_model.layers import BlockScale, RouterBias
from mtp_model.load import cast_weights, load
from mtp_model.model import DeepSeekV3, DraftStates, MainStates, Output
from mtp_model.sharding import make_mesh

__all__ = [
    "BlockScale",
    "ConfigError",
    "Context",
    "DeepSeekV3",
    "DraftStates",
    "MainStates",
    "ModelConfig",
    "Output",
    "RouterBias",
    "cast_weights",
    "load",
    "make_context",
    "make_mesh",
]
