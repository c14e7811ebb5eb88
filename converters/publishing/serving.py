"""How engines serve a checkpoint with its MTP module, for the model card and for `export`.

Facts: vLLM takes `"method": "mtp"` since 0.11, and samples drafts (`draft_sample_method`) since
its pull request 40269; SGLang has `--speculative-use-rejection-sampling` since its 26312.
"""

import json
import shlex
from collections.abc import Mapping
from typing import Any

RECYCLING = (
    "more drafts than MTP modules reuse them: vLLM feeds a module its own normed state, as it was "
    "trained, since its pull request 45895 (June 2026); older versions accept less after the first"
)
SAMPLING = (
    "at a temperature above 0 more drafts are accepted where they are sampled too: "
    '"draft_sample_method": "probabilistic" in vLLM\'s speculative config (since its pull request '
    "40269), --speculative-use-rejection-sampling for SGLang (since its pull request 26312)"
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
