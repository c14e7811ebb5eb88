"""The README.md of a pushed model: where it comes from, what changed, how to serve it.

It tells no path of this machine: who reads the card has other folders.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from converters.publishing.measured import MeasuredAcceptance, measured_table
from converters.publishing.serving import (
    ENGINES,
    MAIN_MODEL,
    SAMPLING_ENGINES,
    main_was_trained,
    num_drafts,
    serve_lines,
)
from converters.sources.source import HUB_ID
from mtp_model.files.untrusted_json import shown

BEGIN = "<!-- deepseek-mtp: from here to the end mark, the next push writes this anew -->"
END = "<!-- deepseek-mtp: end -->"

_FENCE = "---"


def merged_readme(
    existing: str | None,
    repo_id: str,
    provenance: Mapping[str, Any],
    config: Mapping[str, Any],
    verified: Mapping[str, Any] | None = None,
    measured: Sequence[MeasuredAcceptance] = (),
    draft: str | None = None,
) -> str:
    """The card of a model as README.md. verified: what export's check found; None: it made none.
    measured: acceptance of this checkpoint. draft: the engine that an MTP module alone is for.

    Every line of an existing README stays. Its front matter gets the keys that it lacks; our
    section comes after that, or in the place of our section of an earlier push.
    """
    front, body = _split(existing or "")
    section = (
        f"{BEGIN}\n{_section(repo_id, provenance, config, verified, measured, draft)}\n{END}\n"
    )
    before, found, rest = body.partition(BEGIN)
    if found and END in rest:
        body = before + section + rest.partition(END)[2].removeprefix("\n")
    else:
        body = f"{section}\n{body}" if body else section
    return _with_keys(front, _metadata(provenance)) + body


def _metadata(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What the Hub reads of a card; the licence is the author's to give."""
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = _hub_source(provenance)
    if base:
        metadata["base_model"] = base[0]
        if provenance.get("derived"):
            metadata["base_model_relation"] = "finetune"
    metadata["tags"] = ["deepseek-mtp", "multi-token-prediction"]
    return metadata


def _hub_source(provenance: Mapping[str, Any], source: str = "source") -> tuple[str, str] | None:
    """Model and commit that the weights were imported from; None for a local folder."""
    match = HUB_ID.fullmatch(provenance[source]["name"])
    return (match["repo"], match["revision"]) if match and match["revision"] else None


def _section(
    repo_id: str,
    provenance: Mapping[str, Any],
    config: Mapping[str, Any],
    verified: Mapping[str, Any] | None,
    measured: Sequence[MeasuredAcceptance],
    draft: str | None,
) -> str:
    parts = [f"# {repo_id.split('/')[-1]}", _origin(provenance)]
    parts += [_alone(provenance, _ENGINE_NAMES[draft])] if draft else []
    parts.append(_table(provenance, config))
    parts += _acceptance(provenance.get("derived", []))
    parts += [measured_table(measured), _MEASURED] if measured else []
    if draft and verified:
        tensors = f"{verified['tensors']:,} tensors, of {verified['values']:,} values"
        parts.append(f"Verified when it was exported: {tensors}, with the whole export's bytes.")
    else:
        parts += _claims(repo_id, provenance, verified) if verified else [_UNVERIFIED]
    has_module = verified is None or verified["mtp_tensors"] > 0
    if has_module and (drafts := num_drafts(provenance, config)):
        parts.append(_serving(repo_id, drafts, draft))
    return "\n\n".join(parts)


_ENGINE_NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
_MEASURED = (
    "Accepted: the first k drafts of a round are all accepted. Rules: `greedy`; `target`: the main "
    "model samples, drafts are greedy; `rejection`: drafts are sampled too."
)


def _alone(provenance: Mapping[str, Any], engine: str) -> str:
    main = "was trained with it" if main_was_trained(provenance) else "it was trained beside"
    return (
        f"The MTP module alone, as {engine} loads a draft, in the number format of the main model "
        f"that {main}: it drafts for that one, and generates nothing by itself."
    )


def _origin(provenance: Mapping[str, Any]) -> str:
    source = _named(provenance, "source", "a local safetensors checkpoint")
    if "mtp_source" in provenance:
        source += f" and the MTP module of {_named(provenance, 'mtp_source', 'a local checkpoint')}"
    if provenance.get("derived"):
        return f"Fine-tuned from {source} with deepseek-mtp."
    return f"Exported from {source} with deepseek-mtp; nothing was trained."


def _named(provenance: Mapping[str, Any], source: str, local: str) -> str:
    found = _hub_source(provenance, source)
    return f"`{found[0]}` at revision `{found[1]}`" if found else local


def _table(provenance: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    derived = provenance.get("derived", [])
    rows = [("trained", _trained(record)) for record in derived]
    rows += [("changed", _changed(derived, provenance["leaves"]))] if derived else []
    quantised = (config.get("quantization_config") or {}).get("quant_method")
    rows.append(("weights", str(quantised or config.get("torch_dtype", "see config.json"))))
    rows.append(("tools", ", ".join(f"{k} {v}" for k, v in sorted(provenance["tools"].items()))))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)])


def _trained(record: Mapping[str, Any]) -> str:
    settings = record.get("settings", {})
    said = {"--train": settings.get("train"), "steps": settings.get("steps")}
    details = ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)
    return " ".join(part for part in (record.get("by", "another tool"), details) if part)


def _changed(derived: Sequence[Mapping[str, Any]], leaves: Mapping[str, Any]) -> str:
    """How much of each part of the network has other values than the source."""
    changed = {path for record in derived for path in record["changed"]}
    all_of = Counter(path.split(".")[0] for path in leaves)
    of = Counter(path.split(".")[0] for path in changed)
    parts = [f"{of[part]} of {all_of[part]} weights of `{part}`" for part in sorted(of)]
    rest = ", ".join(f"`{part}`" for part in sorted(all_of.keys() - of.keys()))
    return ", ".join(parts) + (f"; unchanged: {rest}" if rest else "")


def _acceptance(derived: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Held-out measurements of the last training that has them."""
    measured = [record["held_out"] for record in derived if record.get("held_out")]
    if not measured:
        return
    before, after = measured[-1]["before"], measured[-1]["after"]
    rows = [
        (f"acceptance of draft {depth}", *pair)
        for depth, pair in enumerate(
            zip(before["acceptance"], after["acceptance"], strict=True), start=1
        )
    ]
    lengths = before["mean_accepted_length"], after["mean_accepted_length"]
    rows.append(("mean accepted length", *lengths))
    lines = [f"| {name} | {_number(old)} | {_number(new)} |" for name, old, new in rows]
    yield "\n".join(["| on held-out text | before | after |", "|---|---|---|", *lines])


_UNVERIFIED = "Nothing of this was verified when it was exported."


def _claims(
    repo_id: str, provenance: Mapping[str, Any], verified: Mapping[str, Any]
) -> Iterator[str]:
    """What export proved, in numbers, and the commands that prove it again."""
    rows = [
        ("tensors", f"{verified['tensors']:,}, of {verified['values']:,} values"),
        ("index, headers and config.json", "agree with all tensors"),
    ]
    if verified["copies"]:
        copies = f"{verified['copies']}, with the main model's bytes"
        rows.append(("MTP module's copies of embedding and head", copies))
    if verified["main_changed"] is not None:
        rows.append(("main model, tensors that changed", f"{verified['main_changed']:,}"))
        changed = f"{verified['mtp_changed']:,} of {verified['mtp_tensors']:,}"
        rows += [("MTP module, tensors that changed", changed)] if verified["mtp_tensors"] else []
    rows.append(("float32 logits, against plain torch", _logits(verified)))
    lines = [f"| {name} | {text} |" for name, text in rows]
    yield "\n".join(["| verified when it was exported | |", "|---|---|", *lines])
    found = _hub_source(provenance)
    source = f"{found[0]}@{found[1]}" if found else "SOURCE"
    command = f"convert-deepseek verify {source} {repo_id}"
    if verified["main_changed"] == 0:
        alike = "succeeds exactly if the main model is the source's, byte for byte"
        yield f"The first of these {alike}; the second says what differs:"
        command = f"{command} --scope main\n{command}"
    else:
        yield "What differs from the source:"
    yield f"```\n{command}\n```"


def _logits(verified: Mapping[str, Any]) -> str:
    logits = verified["logits"]
    if not logits:
        return f"not compared: {shown(verified['logits_left_out'])}"
    largest = max(depth["relative_difference"] for depth in logits["depths"])
    where = ", ".join(f"`{layer['name']}`" for layer in logits["layers"])
    where = where if logits["layers_left_out"] else "every layer"
    return f"differ by {largest:.1e} at most, allowed {logits['tolerance']:.0e}; on {where}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _serving(repo_id: str, drafts: int, draft: str | None) -> str:
    tokens = "one token" if drafts == 1 else f"{drafts} tokens"
    if draft:
        lines = serve_lines(MAIN_MODEL, drafts, draft=repo_id, sampled=True)
        commands, engines = [lines[draft != "vllm"]], SAMPLING_ENGINES.split(", ")[draft != "vllm"]
    else:
        commands, engines = serve_lines(repo_id, drafts, sampled=True), SAMPLING_ENGINES
    block = "\n".join(commands)
    return f"""Serve it with its MTP module drafting {tokens} a step ({engines}):

```
{block}
```

The last option samples drafts at a temperature above 0, so that more of them are accepted. Versions
without it ({ENGINES}) serve the module too."""


def _split(text: str) -> tuple[str, str]:
    """Front matter, without its fences, and what follows; ("", text) when there is none."""
    lines = text.splitlines(keepends=True)
    if not lines or lines[0].rstrip() != _FENCE:
        return "", text
    for number, line in enumerate(lines[1:], start=1):
        if line.rstrip() == _FENCE:
            return "".join(lines[1:number]), "".join(lines[number + 1 :])
    return "", text


def _with_keys(front: str, metadata: Mapping[str, Any]) -> str:
    """Front matter with the keys that it lacks; verbatim when it is not a YAML mapping."""
    try:
        there = yaml.safe_load(front)
    except yaml.YAMLError:
        there = ()
    there = {} if there is None else there
    if isinstance(there, dict):
        missing = {key: value for key, value in metadata.items() if key not in there}
        front += yaml.safe_dump(missing, sort_keys=False) if missing else ""
    return f"{_FENCE}\n{front}{_FENCE}\n"
