"""`convert-deepseek new-mtp`: fresh MTP modules as a draft folder."""

import shlex

from converters.cli.arguments import NewMtp
from converters.cli.common import print_result, source_of
from converters.exporting.new_mtp import write_new_mtp
from mtp_model.problems import braces
from mtp_model.progress import progress
from mtp_model.reporting import Facts, human_bytes


def run_new_mtp(command: NewMtp) -> int:
    """Write the draft folder, and say what to do with it."""
    source = source_of(command.src, follow_links=command.follow_links)
    with progress("new-mtp") as report:
        made = write_new_mtp(source, command.dst, command.modules, command.overwrite, report)
    src, draft = shlex.quote(command.src), shlex.quote(str(made.path))
    facts = Facts(
        [
            ("written", f"{made.path}, {human_bytes(made.nbytes)}"),
            ("modules", f"model.layers.{braces(made.layers)}"),
            ("new ones", f"begin as model.layers.{made.copied_from}"),
            ("next", f"convert-deepseek import {src} CKPT --mtp-from {draft}"),
            ("", "finetune-deepseek train --checkpoint CKPT ..."),
        ]
    )
    plain = {
        "path": str(made.path),
        "layers": list(made.layers),
        "copied_from": made.copied_from,
        "bytes": made.nbytes,
    }
    print_result([facts], plain, as_json=command.json)
    return 0
