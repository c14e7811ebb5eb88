"""The small files that make a folder of raw chunks an Orbax checkpoint.

The format is Orbax's PyTree checkpoint without OCDBT: one zarr v2 array per leaf, uncompressed. No
field depends on the time, so that an interrupted and resumed import ends with the same bytes.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtp_model.checkpoint.chunks import Leaf
from mtp_model.files.place import Place
from mtp_model.files.untrusted_json import JsonError, parse

ZARRAY = ".zarray"
TREE_METADATA, CHECKPOINT_METADATA = "_METADATA", "_CHECKPOINT_METADATA"
ARRAY_METADATA = "array_metadatas/process_0"
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


def zarray(leaf: Leaf) -> dict:
    """zarr v2 metadata of a leaf."""
    return {
        "chunks": list(leaf.chunk),
        "compressor": None,
        "dimension_separator": ".",
        "dtype": _zarr_dtype(leaf.dtype),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(leaf.shape),
        "zarr_format": 2,
    }


def leaf_from_zarray(metadata: dict, num_stack_dims: int) -> Leaf:
    """The leaf that zarr v2 metadata describes; ValueError for one this toolkit did not write."""
    if not 0 <= num_stack_dims < len(metadata["shape"]):
        raise ValueError(f"{num_stack_dims} stack dims of shape {metadata['shape']}")
    leaf = Leaf(
        shape=tuple(metadata["shape"]),
        dtype=np.dtype(metadata["dtype"]),
        num_stack_dims=num_stack_dims,
        chunk=tuple(metadata["chunks"]),
    )
    whole_rows = leaf.chunk[num_stack_dims + 1 :] == leaf.tensor_shape[1:]
    sizes = (*leaf.shape, *leaf.chunk)
    if zarray(leaf) != metadata or not whole_rows or min(sizes, default=0) < 1:
        raise ValueError(f"chunks that are not plain whole rows: {json.dumps(metadata)}")
    return leaf


def write_orbax_metadata(params: Place, leaves: Mapping[str, Leaf]) -> None:
    """Write every metadata file of `params`; a leaf path `a.b.c` becomes the nested key a, b, c."""
    for path, leaf in leaves.items():
        _write_json(params / path / ZARRAY, zarray(leaf))
    (params / ARRAY_METADATA).parent.make_folder()
    for name, value in _tree_files(leaves).items():
        _write_json(params / name, value)


def damaged_metadata(params: Place, leaves: Mapping[str, Leaf]) -> list[str]:
    """Metadata files of the whole tree that are gone, or do not say what was written.

    They follow from the leaves, so no digest of them is kept. Only Orbax reads them.
    """
    return [name for name, value in _tree_files(leaves).items() if _read(params / name) != value]


def _tree_files(leaves: Mapping[str, Leaf]) -> dict[str, dict]:
    """What is beside the leaves, by its name in `params`."""
    return {
        ARRAY_METADATA: _array_metadatas(leaves),
        TREE_METADATA: _tree_metadata(leaves),
        CHECKPOINT_METADATA: _checkpoint_metadata(),
    }


def _read(file: Place) -> Any:
    try:
        return parse(file.read_bytes())
    except (OSError, JsonError):
        return None


def _zarr_dtype(dtype: np.dtype) -> str:
    return dtype.name if dtype.kind == "V" else dtype.str


def _tree_metadata(leaves: Mapping[str, Leaf]) -> dict:
    return {
        "tree_metadata": {
            str(tuple(path.split("."))): {
                "key_metadata": [{"key": key, "key_type": 2} for key in path.split(".")],
                # As "jax.Array" a leaf could not be restored without saying where it is to live.
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            for path in leaves
        },
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _array_metadatas(leaves: Mapping[str, Leaf]) -> dict:
    return {
        "array_metadatas": [
            {
                "array_metadata": {
                    "param_name": path,
                    "write_shape": list(leaf.chunk),
                    "chunk_shape": list(leaf.chunk),
                    "ext_metadata": None,
                }
            }
            for path, leaf in leaves.items()
        ]
    }


def _checkpoint_metadata() -> dict:
    return {
        "item_handlers": _HANDLER,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": None,
        "commit_timestamp_nsecs": None,
        "custom_metadata": {},
    }


def _write_json(path: Place, value: dict) -> None:
    path.write_pieces([json.dumps(value).encode()])
