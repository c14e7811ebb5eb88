"""The table generates exactly the released tensors, and a missing row cannot go unnoticed."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import pytest
from released import (
    CONFIG,
    COUNTS,
    ITEM_BYTES,
    LISTING_SHA256,
    MTP_PARAMETERS,
    MTP_PARAMETERS_WITHOUT_COPIES,
    MTP_TENSORS,
    PARAMETERS,
    TENSOR_BYTES,
    listing_sha256,
)

from converters.format import mapping
from converters.format.listing import list_checkpoint
from converters.format.mapping import SCALE_SUFFIX, TABLE, Row, Slot, leaf_shapes, slots
from converters.sources.open import open_source
from mtp_model.config import ModelConfig
from tools.make_tiny_checkpoint import TINY_CONFIG, make_tiny_checkpoint, weight_shapes


@pytest.fixture(scope="module")
def released() -> Mapping[str, Slot]:
    return slots(ModelConfig.from_dict(CONFIG))


def parameters(found):
    """Elements of weights and router biases; scales are not parameters."""
    return sum(math.prod(s.shape) for s in found if not s.name.endswith(SCALE_SUFFIX))


def test_released_listing_is_generated_exactly(released):
    triples = [(slot.name, slot.dtype, slot.shape) for slot in released.values()]
    assert len(triples) == 91_991
    assert Counter(slot.dtype for slot in released.values()) == COUNTS
    assert sum(math.prod(s.shape) * ITEM_BYTES[s.dtype] for s in released.values()) == TENSOR_BYTES
    assert parameters(released.values()) == PARAMETERS
    assert listing_sha256(triples) == LISTING_SHA256


def test_released_mtp_layer(released):
    layer = [s for s in released.values() if s.name.startswith("model.layers.61.")]
    assert len(layer) == MTP_TENSORS
    assert parameters(layer) == MTP_PARAMETERS
    assert parameters(s for s in layer if not s.copy_of) == MTP_PARAMETERS_WITHOUT_COPIES
    assert released["model.layers.61.eh_proj.weight"].dtype == "BF16"


def test_listing_digest_notices_one_changed_shape(released):
    triples = [(slot.name, slot.dtype, slot.shape) for slot in released.values()]
    name, dtype, shape = triples[-1]
    triples[-1] = (name, dtype, shape[::-1] if len(set(shape)) > 1 else (*shape, 1))
    assert listing_sha256(triples) != LISTING_SHA256


def test_an_independent_generator_agrees_at_the_released_sizes(released):
    independent = dict(weight_shapes(CONFIG, copies=True))
    weights = {n: s.shape for n, s in released.items() if not n.endswith(SCALE_SUFFIX)}
    assert weights == {name: tuple(shape) for name, shape in independent.items()}


Q_PROJ = next(row for row in TABLE if row.path == "self_attn.q_proj.weight")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Iterable[Row]], None]]:
    """Puts another table in the place of ours; what was made of either is forgotten."""

    def replace(rows: Iterable[Row]) -> None:
        monkeypatch.setattr(mapping, "TABLE", tuple(rows))
        slots.cache_clear()

    yield replace
    slots.cache_clear()


@pytest.mark.parametrize("dropped", [r for r in TABLE if r is not Q_PROJ], ids=lambda r: r.name)
def test_dropping_any_row_is_caught(dropped, table, tmp_path):
    table(row for row in TABLE if row is not dropped)
    config = ModelConfig.from_dict(TINY_CONFIG)
    if dropped.kind is mapping.BUFFER:  # as every tensor that no row knows
        assert dropped.name.format(layer=0) not in mapping.buffers(config)
    elif dropped.copy_of:  # has no leaf of its own: then the checkpoint's tensor is unknown
        make_tiny_checkpoint(tmp_path)
        real = list_checkpoint(open_source(str(tmp_path))).tensors
        assert real.keys() > slots(config).keys()
    else:
        with pytest.raises(AssertionError, match=re.escape(dropped.path)):
            slots(config)


def test_plain_queries_need_their_row(table):
    config = ModelConfig.from_dict({**CONFIG, "q_lora_rank": None})
    assert "model.layers.61.self_attn.q_proj.weight" in slots(config)
    assert "model.layers.61.self_attn.q_a_proj.weight" not in slots(config)
    table(row for row in TABLE if row is not Q_PROJ)
    with pytest.raises(AssertionError, match="q_proj"):
        slots(config)


def test_every_leaf_is_filled_exactly_once(released):
    places = Counter((s.path, s.index) for s in released.values() if not s.copy_of)
    assert max(places.values()) == 1
    filled = Counter[str]()
    for slot in released.values():
        if not slot.copy_of:
            filled[slot.path] += math.prod(slot.shape)
    shapes = leaf_shapes(ModelConfig.from_dict(CONFIG))
    assert filled == {path: math.prod(shape) for path, shape in shapes.items()}


def test_scopes_share_only_the_ends():
    config = ModelConfig.from_dict(CONFIG)
    main, mtp, everything = (set(slots(config, scope)) for scope in ("main", "mtp", "all"))
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert main & mtp == ends
    assert main | mtp == everything


def test_two_mtp_modules_follow_the_main_layers():
    config = ModelConfig.from_dict({**CONFIG, "num_nextn_predict_layers": 2})
    found = slots(config)
    assert found["model.layers.62.enorm.weight"].index == (1,)
    assert found["model.layers.62.mlp.experts.255.up_proj.weight"].index == (1, 255)


def test_an_unquantised_checkpoint_has_no_scales():
    values = {k: v for k, v in CONFIG.items() if k != "quantization_config"}
    for torch_dtype, dtype in {"bfloat16": "BF16", "float32": "F32"}.items():
        found = slots(ModelConfig.from_dict({**values, "torch_dtype": torch_dtype}))
        assert not any(name.endswith(SCALE_SUFFIX) for name in found)
        assert {s.dtype for s in found.values() if s.path.endswith("weight")} == {dtype}
