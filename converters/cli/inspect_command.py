"""`convert-deepseek inspect`: what a checkpoint is, from its headers."""

from collections.abc import Iterator

from converters.cli.arguments import Inspect
from converters.cli.common import print_result, source_of
from converters.format.inspection import Inspection, MtpModule, Network, inspect_source
from converters.format.kinds import PlainWeights
from mtp_model.reporting import (
    Facts,
    Grid,
    Section,
    human_bytes,
    human_count,
    plural,
    problem_report,
)


def run_inspect(command: Inspect) -> int:
    """Print what a checkpoint is; 1 if it has problems."""
    found = inspect_source(source_of(command.src, follow_links=command.follow_links))
    print_result(inspection(found), found.to_dict(), as_json=command.json)
    return 1 if found.problems else 0


def inspection(found: Inspection) -> Iterator[Section]:
    """What `inspect` prints."""
    yield Facts([*_source_facts(found)])
    if found.network:
        yield _network_grid(found.network)
    if found.problems:
        yield problem_report(found.source, found.problems)


def _source_facts(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "checkpoint", found.source
    yield "model type", found.model_type or "unknown"
    yield "files", f"{found.files:,} safetensors, {human_bytes(found.file_bytes)}"
    for dtype, tally in found.dtypes.items():
        yield dtype, f"{plural(tally.tensors, 'tensor')}, {human_bytes(tally.bytes)}"
    if found.network:
        yield from _network_facts(found.network)
    why = "problems below" if found.problems else "by its headers; import checks scales and copies"
    yield "can be imported", f"{'no' if found.problems else 'yes'} ({why})"


def _network_facts(network: Network) -> Iterator[tuple[str, str]]:
    config = network.config
    experts = f"{config.n_routed_experts} experts, {config.num_experts_per_tok} for a token"
    yield "layers", f"{config.num_dense_layers} dense, {config.num_moe_layers} MoE ({experts})"
    mtp = sum(module.parameters for module in network.mtp)
    main, active = network.parameters - mtp, network.active_parameters
    of_main = f"main model {human_count(main)}, {human_count(active)} active for a token"
    yield "parameters", f"{human_count(network.parameters)}: {of_main}; MTP {human_count(mtp)}"
    block = config.weight_block_size
    yield "FP8", f"blocks of {block[0]} x {block[1]}" if block else "not quantised"
    for plain in network.plain_weights:
        yield f"in {plain.dtype}", plain_weights_text(plain)
    for number, module in enumerate(network.mtp, start=1):
        yield f"MTP module {number}", _mtp_module(module)
    if not network.mtp:
        yield "MTP modules", "none: num_nextn_predict_layers is 0"


def plain_weights_text(plain: PlainWeights) -> str:
    """One line of weights that are not FP8 beside others that are."""
    by_list = "modules_to_not_convert"
    named = f"as {by_list} says" if plain.named else f"not named by {by_list}, which engines go by"
    return f"{plain.where} ({plural(plain.weights, 'weight')}, {named})"


def _mtp_module(module: MtpModule) -> str:
    where = f"model.layers.{module.layer}"
    if not module.tensors:
        return f"{where}, absent"
    size = f"{plural(module.tensors, 'tensor')}, {human_count(module.parameters)} parameters"
    copies = ", ".join(name.removesuffix(".weight") for name in module.copies) or "absent"
    return f"{where}, {size}; copies: {copies}"


def _network_grid(network: Network) -> Grid:
    rows = [
        (part, f"{t.tensors:,}", human_count(t.parameters), human_bytes(t.bytes))
        for part, t in network.groups.items()
    ]
    return Grid(("part", "tensors", "parameters", "bytes"), rows)
