"""Strict settings for every test: no silent dtype or rank promotion, every warning an error, and
shapes and dtypes at the boundaries of modules checked as they are annotated."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

CHECKED_MODULES = [
    *(f"mtp_model.{name}" for name in ("attention", "block", "dispatch", "grouped", "layers")),
    *(f"mtp_model.{name}" for name in ("model", "moe", "mtp", "rope", "rows")),
    *("finetune.losses", "finetune.acceptance"),
]
install_import_hook(CHECKED_MODULES, "beartype.beartype")
