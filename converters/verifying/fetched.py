"""Files of a far source on this machine's disk for as long as they are read, a few at a time."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from converters.format.listing import SourceCheckpoint
from converters.sources.source import Finish, Read, Source
from mtp_model.files.local import raise_if_full


@contextmanager
def fetched_ahead(
    source: Source, reads: Mapping[str, Sequence[Read]], kept: Path | None = None
) -> Iterator[Finish]:
    """`Source.staged` in a temporary folder; CheckpointError where its disk has no room.

    kept: a folder in which whole files stay when this is interrupted, for the next time.
    """
    advice = "set TMPDIR to a folder on another disk"
    if kept:
        advice = "give --report a folder on another disk"
    place = nullcontext(kept) if kept else TemporaryDirectory(prefix="convert-deepseek-")
    with place as folder:
        needed = source.room_needed(reads, Path(folder))
        raise_if_full(needed, advice)
        with source.staged(reads, Path(folder)) as finish:
            yield finish


@contextmanager
def fetched_by_part(
    source: SourceCheckpoint, parts: Mapping[str, Sequence[str]], kept: Path | None = None
) -> Iterator[Finish]:
    """While inside, the files of a network's parts are fetched in the order of the parts.

    parts: of each part the modules that it reads, as `module_of` names them. kept: as
    `fetched_ahead` has it. Files of a part stay until it is finished.
    """
    of_module: defaultdict[str, list[Read]] = defaultdict(list)
    for name, tensor in source.tensors.items():
        of_module[module_of(name)].append((tensor.file, tensor.begin, tensor.nbytes))
    reads = {part: [r for name in names for r in of_module[name]] for part, names in parts.items()}
    with fetched_ahead(source.source, reads, kept) as finish:
        yield finish


def module_of(name: str) -> str:
    """`model.layers.3` of all that is in that layer; of others the name without its last word."""
    words = name.split(".")
    return ".".join(words[:3] if words[1:2] == ["layers"] else words[:-1])
