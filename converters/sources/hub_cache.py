"""The Hub's own cache on this machine, which other tools share; knows its layout and no more.

models--ORG--NAME/blobs/DIGEST                     a file, by its content
models--ORG--NAME/snapshots/COMMIT/FILE            a link to it
"""

import os
import shutil
import uuid
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from converters.sources.hub_http import Repository


def cached(repository: Repository, file: str) -> Path | None:
    """A file that was downloaded before, whole; None when it was not."""
    path = try_to_load_from_cache(repository.repo_id, file, revision=repository.commit)
    if not isinstance(path, str):
        return None
    found = Path(path)
    try:
        return found if found.stat().st_size == repository.entries[file].size else None
    except FileNotFoundError:  # a link whose blob is gone
        return None


def keep_in_cache(repository: Repository, file: str, path: Path) -> Path:
    """Move a whole file into the cache, where `hf` and others find it; where it is now."""
    folder = Path(constants.HF_HUB_CACHE, "models--" + repository.repo_id.replace("/", "--"))
    blob = folder / "blobs" / repository.entries[file].digest
    link = folder / "snapshots" / repository.commit / file
    blob.parent.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    moving = blob.with_name(f"{blob.name}.{uuid.uuid4().hex[:8]}.incomplete")
    shutil.move(path, moving)
    moving.replace(blob)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(blob, link.parent))
    return link
