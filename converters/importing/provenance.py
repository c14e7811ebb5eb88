"""Where a checkpoint directory's weights come from, as its provenance.json says it.

Digests: a file without tensors has the xxh3_128 of its bytes. A safetensors file has the xxh3_128
of the digests (16 bytes each) of its header text and of its tensors, in the order in which it
stores them, so that tensors may be read in any order and by several processes.
"""

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from converters.format.header import Header
from converters.format.listing import Listing
from converters.format.mapping import TABLE_VERSION
from converters.sources.source import Fingerprint
from mtp_model.files.local import digest

_TOOLS = ("deepseek-mtp", "numpy", "ml_dtypes", "numba", "xxhash")


def source_record(listing: Listing, tensor_digests: Mapping[str, str]) -> dict[str, Any]:
    """Name of the source, and size and digests of each of its safetensors files."""
    return {
        "name": listing.source.name,
        "files": {
            file: _file_record(header, [tensor_digests.get(t.name) for t in header.tensors])
            | _listed_digest(listing.source.fingerprint(file))
            for file, header in sorted(listing.headers.items())
        },
    }


def _listed_digest(state: Fingerprint) -> dict[str, Any]:
    """The sha256 of a file where the source lists it, as the Hub does: it covers what isn't read.

    An export takes it to tell a base by.
    """
    return {key: value for key, value in state.items() if key == "sha256"}


def digest_of_safetensors(header_digest: str, tensor_digests: list[str]) -> str:
    """Digest of a safetensors file from those of its header and of its tensors in offset order."""
    return digest(bytes.fromhex(header_digest + "".join(tensor_digests)))


def tool_versions() -> dict[str, str]:
    """Versions of what the bytes may depend on."""
    return {"python": platform.python_version(), "table": str(TABLE_VERSION)} | {
        name: _version(name) for name in _TOOLS
    }


def _file_record(header: Header, tensors: list[str | None]) -> dict[str, Any]:
    """The file's digest is None when some of its tensors were not read: the scope left them out."""
    header_digest = digest(header.raw)
    read = [tensor for tensor in tensors if tensor is not None]
    whole = len(read) == len(tensors)
    return {
        "size": header.size,
        "digest": digest_of_safetensors(header_digest, read) if whole else None,
        "header": header_digest,
        "tensors": tensors,
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # this toolkit, run from a checkout
