"""How engines serve a checkpoint with its MTP module, for the model card and for `export`.

The versions, and where each is seen, are in docs/serving.md.
"""

import json
import shlex
from collections.abc import Mapping
from typing import Any

ENGINES = "vLLM 0.11 or newer, SGLang 0.5.10 or newer"
MAIN_MODEL = "MAIN_MODEL"  # what a draft's command has the user put in
SAMPLING_ENGINES = "vLLM 0.22 or newer, SGLang 0.5.14 or newer"
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


def main_was_trained(provenance: Mapping[str, Any]) -> bool:
    """Whether the main model is another one than the source's."""
    changed = (path for record in provenance.get("derived", ()) for path in record["changed"])
    return any(path.split(".")[0] != "mtp" for path in changed)


def serve_lines(
    model: str, drafts: int, *, draft: str | None = None, sampled: bool = False
) -> tuple[str, str]:
    """The commands of vLLM and SGLang. model, draft: a folder or a model on the Hub.

    draft: an MTP module beside a main model that need not have one. sampled: drafts are sampled at
    a temperature, as rejection sampling needs it.
    """
    config: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": drafts}
    config |= {"model": draft} if draft else {}
    config |= {"draft_sample_method": "probabilistic"} if sampled else {}
    vllm = f"vllm serve {shlex.quote(model)} --speculative-config {_quoted(json.dumps(config))}"
    lines = [
        f"python3 -m sglang.launch_server --model-path {shlex.quote(model)} "
        "--speculative-algorithm NEXTN",
        *([f"--speculative-draft-model-path {shlex.quote(draft)}"] if draft else []),
        f"--speculative-num-steps {drafts} --speculative-eagle-topk 1",
        f"--speculative-num-draft-tokens {drafts + 1}",
        *(["--speculative-use-rejection-sampling"] if sampled else []),
    ]
    return vllm, " \\\n  ".join(lines)


def _quoted(text: str) -> str:
    """In single quotes, also where the shell would need none."""
    return "'" + text.replace("'", "'\"'\"'") + "'"
