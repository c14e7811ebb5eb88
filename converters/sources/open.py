"""The source that the user's words stand for."""

import os

from converters.sources.local import LocalSource
from converters.sources.objects import CloudSource
from converters.sources.source import HUB_ID, Source
from mtp_model.files.open import is_address


def open_source(src: str, *, follow_links: bool = False) -> Source:
    """A local folder, a folder of a bucket (gs://...), or a model on the Hub (org/name).

    follow_links: of a local folder, read what links out of it lead to.
    """
    if is_address(src):
        return CloudSource(src)
    if HUB_ID.fullmatch(src) and not os.path.lexists(src):
        # Imported here: huggingface_hub loads slowly, and folders don't need it.
        from converters.sources.hub import HubSource

        return HubSource(src)
    return LocalSource(src, follow_links=follow_links)
