"""How engines serve a checkpoint with its MTP module, for the model card and for `export`.

The versions, and where each is seen, are in docs/serving.md.
"""

import json
import shlex
from collections.abc import Mapping
from typing import Any

ENGINES = "vLLM 0.11 or newer, SGLang 0.5.10 or newer"
RECYCLING = (
    "more drafts than MTP modules reuse them: vLLM feeds a module its own normed state, as it was "
    "trained, from 0.24 on; older versions accept less after the first (SGLang is as trained)"
)
SAMPLING = (
    "at a temperature above 0 more drafts are accepted where they are sampled too: "
    '"draft_sample_method": "probabilistic" in vLLM\'s speculative config (vLLM 0.22 or newer), '
    "--speculative-use-rejection-sampling for SGLang (0.5.14 or newer)"
)
PRE_NORM = (
    "this module was made for the main model's state before model.norm (mtp_hidden_state "
    "pre_norm); vLLM and SGLang feed the state after it, and accept less than was measured here"
)


def num_drafts(provenance: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Tokens to draft: as many as the last training did, else one a module; 0 without modules."""
    modules = int(config.get("num_nextn_predict_layers") or config.get("num_mtp_layers") or 0)
    derived = provenance.get("derived", ())
    trained = [record.get("settings", {}).get("draft_tokens") for record in derived]
    return (next(filter(None, reversed(trained)), None) or modules) if modules else 0


def serve_lines(model: str, drafts: int) -> tuple[str, str]:
    """The commands of vLLM and SGLang. model: a folder or a model on the Hub."""
    name = shlex.quote(model)
    config = json.dumps({"method": "mtp", "num_speculative_tokens": drafts})
    vllm = f"vllm serve {name} --speculative-config '{config}'"
    sglang = (
        f"python3 -m sglang.launch_server --model-path {name} --speculative-algorithm NEXTN \\\n"
        f"  --speculative-num-steps {drafts} --speculative-eagle-topk 1 \\\n"
        f"  --speculative-num-draft-tokens {drafts + 1}"
    )
    return vllm, sglang
