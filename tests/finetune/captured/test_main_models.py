"""States of another main model are told from those of this one."""

from pathlib import Path

import numpy as np

from finetune.captured.sample import is_same_main_model, main_model_digest
from mtp_model.checkpoint.derived import ChangedLeaf, write_derived
from mtp_model.checkpoint.directory import open_checkpoint


def test_states_of_an_adapted_main_model_are_of_another(checkpoint, tmp_path: Path):
    """Adapters of the main model leave its final norm as it was; those of the module, all of it."""
    base = open_checkpoint(checkpoint)

    def changed(name: str) -> str:
        shape = base.leaves[name].tensor_shape

        def rows(_, start: int, stop: int):
            return lambda: np.zeros((stop - start, *shape[1:]), np.float32)

        zero = ChangedLeaf(dtype=np.dtype(np.float32), rows=rows)
        return main_model_digest(write_derived(base, tmp_path / name, {name: zero}, {}))

    whole = main_model_digest(base)
    assert is_same_main_model(changed("mtp.eh_proj.weight"), whole)
    adapted = changed("dense_layers.self_attn.o_proj.weight")
    assert not is_same_main_model(adapted, whole)
    norm = whole.split(".")[0]  # what a capture of an earlier version says
    assert is_same_main_model(norm, whole)
    assert is_same_main_model(adapted, norm)
    assert not is_same_main_model(changed("norm.weight"), norm)
