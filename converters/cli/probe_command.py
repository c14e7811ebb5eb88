"""`convert-deepseek probe`: which convention an MTP module was trained with."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from converters.cli.arguments import Probe
from converters.cli.common import any_source, print_result
from converters.format.listing import open_safetensors
from converters.verifying.probe import Choice, Convention, ProbeResult, probe
from mtp_model.problems import UserError
from mtp_model.progress import progress
from mtp_model.report_folder import Findings, make_report_folder, write_report
from mtp_model.reporting import Facts, Grid, Section

UNFINISHED = "probe.unfinished.npz"
_MOST_BYTES = 1 << 20  # of a text, of which the first tokens are used
_MOST_SHOWN = 8


def run_probe(command: Probe) -> int:
    """Print what the module was trained with; 1 where it was not trained."""
    text = _text(Path(command.data))
    folder = Path(command.report) if command.report else None
    if folder:
        make_report_folder(folder)
    source = open_safetensors(any_source(command.src, follow_links=command.follow_links))
    with progress("probe", unit="layers") as report:
        found = probe(source, text, report, saved=folder and folder / UNFINISHED)
    print_result(probed(found), found.to_dict(), as_json=command.json)
    if folder:
        title = f"Conventions of the MTP module of {found.source}"
        write_report(
            folder, Findings(title=title, plain=found.to_dict(), sections=[*probed(found)])
        )
    return 0 if found.is_trained else 1


def _text(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(_MOST_BYTES)
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final=len(raw) < _MOST_BYTES)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error}); give --data a plain text") from error


def probed(found: ProbeResult) -> Iterator[Section]:
    """What `probe` prints."""
    guess = f"{found.uniform_loss:.3f}"
    yield Facts(
        [
            ("checkpoint", found.source),
            ("text", f"{found.tokens:,} tokens; guessing has a loss of {guess} nats a token"),
            ("main model", f"loss {found.main_loss:.3f}"),
        ]
    )
    if found.is_trained:
        columns = ("convention", "lowest loss with", "loss", "else", "loss", "by chance?", "usual")
        yield Grid(columns, [_choice_row(choice) for choice in found.choices])
    best = found.conventions[:_MOST_SHOWN]
    yield f"the {len(best)} best of {len(found.conventions)} conventions:"
    columns = ("loss", "concatenation", "state fed", "label of row i", "norm", "head")
    yield Grid(columns, [_convention_row(convention) for convention in best])
    yield Facts([("result", line) for line in _verdict(found)])


def _choice_row(choice: Choice) -> tuple[str, ...]:
    if choice.other is None or choice.other_loss is None:
        return choice.what, choice.found, f"{choice.loss:.3f}", "no other", "", "", choice.expected
    sure = "no" if choice.sure else "PERHAPS"
    other = (choice.other, f"{choice.other_loss:.3f}")
    return choice.what, choice.found, f"{choice.loss:.3f}", *other, sure, choice.expected


def _convention_row(convention: Convention) -> tuple[str, ...]:
    label = f"token i + {convention.label}"
    ways = (convention.order, convention.state, label, convention.norm, convention.head)
    return f"{convention.loss:.3f}", *ways


def _verdict(found: ProbeResult) -> Iterator[str]:
    best = found.conventions[0]
    if not found.main_reads_the_text:
        yield (
            "the main model itself does no better than guessing on this text: what is said of the "
            "module means little"
        )
    if not found.is_trained:
        yield (
            "the MTP module is UNTRAINED: under no convention is it better than guessing (loss "
            f"{best.loss:.3f} at best)"
        )
        return
    yield f"the MTP module is trained: loss {best.loss:.3f}"
    for choice in found.differing:
        ours = "what this toolkit, vLLM and SGLang compute"
        yield f"{choice.what}: {choice.found}, which is not {ours} ({choice.expected})"
        if choice.what == "state fed":
            option = "pre_norm" if choice.found.startswith("before") else "post_norm"
            yield f"import with --mtp-hidden-state {option}, and this toolkit feeds that state"
    if not found.differing:
        yield "nothing shows that it was trained in another way than it is used"
    unsure = [choice.what for choice in found.choices if choice.other and not choice.sure]
    if unsure:
        yield f"this text does not tell (differences as by chance): {', '.join(unsure)}"
