"""States of another main model, or of both kinds, are told from those of this one."""

from pathlib import Path

import numpy as np
import pytest
from advice import follows

from finetune.captured.documents import open_samples
from finetune.captured.sample import (
    Content,
    StateName,
    is_same_main_model,
    main_model_digest,
    write_sample,
)
from finetune.data.records import DataError
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


@follows("pre_norm and post_norm samples together: give one kind of them")
def test_states_of_two_kinds_are_not_one_text(checkpoint, tmp_path: Path):
    base = open_checkpoint(checkpoint)
    states_TD = np.ones((4, base.config.hidden_size), np.float32)
    content = Content(np.arange(4), np.ones(4), states_TD)
    kinds: tuple[StateName, ...] = ("pre_norm", "post_norm")
    for kind in kinds:
        (tmp_path / kind).mkdir()
        sample = tmp_path / kind / "a.safetensors"
        write_sample(sample, content, kind, main_model_digest(base), "float32")
    folders = [tmp_path / kind for kind in kinds]
    with pytest.raises(DataError, match="pre_norm and post_norm samples together"):
        open_samples(folders, base, "float32", None)
    assert len(open_samples(folders[:1], base, "float32", None)) == 1
