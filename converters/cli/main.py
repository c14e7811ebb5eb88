"""`convert-deepseek`: the command line. Results go to stdout, progress and diagnostics to stderr.

Exit status: 0 when all that was asked holds, 1 for a failed check or bad input, 2 for wrong usage.
"""

import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from typing import Any

from converters.cli.arguments import PROG, Command, Export, Import, Inspect, NewMtp, Probe, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Wrong usage ends the process with status 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv == ["--version"]:
        print(f"{PROG} {importlib.metadata.version('deepseek-mtp')}")
        return 0
    command = parse(argv)
    # mtp_model imports jax, which takes a second: --help need not wait for it.
    from converters.cli.common import tell
    from mtp_model.commands import exit_status

    return exit_status(
        lambda: _function_of(command)(command),
        tell=lambda error: tell(error, as_json=command.json),
        interrupted=f"{PROG}: interrupted; the same command continues",
    )


def _function_of(command: Command) -> Callable[[Any], int]:
    if isinstance(command, Inspect):
        from converters.cli.inspect_command import run_inspect

        return run_inspect
    if isinstance(command, Import):
        from converters.cli.import_command import run_import

        return run_import
    if isinstance(command, Export):
        from converters.cli.export_command import run_export

        return run_export
    if isinstance(command, NewMtp):
        from converters.cli.new_mtp_command import run_new_mtp

        return run_new_mtp
    if isinstance(command, Probe):
        from converters.cli.probe_command import run_probe

        return run_probe
    from converters.cli.verify_command import run_verify

    return run_verify
