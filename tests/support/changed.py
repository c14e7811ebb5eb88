"""New values of a leaf, given by what reads its rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from mtp_model.checkpoint.derived import ChangedLeaf


def leaf_of_rows(dtype: Any, read: Callable[..., np.ndarray]) -> ChangedLeaf:
    """read: stack index, first row, one past the last row -> those rows of that tensor."""
    return ChangedLeaf(dtype=np.dtype(dtype), rows=partial(partial, read))
