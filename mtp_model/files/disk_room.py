"""Whether disks have room for what will be written; knows folders and amounts, not what for."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from mtp_model.problems import UserError


def raise_if_full(needs: Mapping[Path, int], advice: str) -> None:
    """UserError unless the disk of each folder has that many bytes free.

    Folders on one disk need room together; a folder need not be there yet.
    """
    disks: dict[int, list[Path]] = {}
    for folder in needs:
        disks.setdefault(_existing(folder).stat().st_dev, []).append(folder)
    for folders in disks.values():
        free = shutil.disk_usage(_existing(folders[0])).free
        if sum(needs[folder] for folder in folders) > free:
            amounts = " and ".join(
                f"{folder} needs {_amount(needs[folder])} more" for folder in folders
            )
            raise UserError(
                f"{amounts}, {'its' if len(folders) == 1 else 'their'} disk has {_amount(free)} "
                f"free; make room and run the same command again, or {advice}"
            )


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _amount(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
