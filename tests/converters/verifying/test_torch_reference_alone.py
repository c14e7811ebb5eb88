"""The torch reference without Transformers: known numbers, packing, FP8, memory, errors."""

import importlib
import json
import math
import sys
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

from converters.verifying.logits import torch_reference
from converters.verifying.logits.torch_config import as_read
from converters.verifying.logits.torch_reference import TorchReference, open_reference
from mtp_model.problems import UserError
from tools.make_tiny_checkpoint import make_tiny_checkpoint

TOLERANCE = 1e-5
# The released model, of which RoPE needs nothing else.
RELEASED = {
    "qk_rope_head_dim": 64,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8")
    make_tiny_checkpoint(path, dtype="fp8", num_mtp=2)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> TorchReference:
    return open_reference(folder)


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(384, shape, generator=torch.Generator().manual_seed(5))


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert ((got - want).abs().max() / want.abs().max()).item() <= TOLERANCE


def test_yarn_of_the_released_model():
    """Pairs below 10 keep their frequency, those from 23 on have a fortieth of it."""
    rope = as_read(RELEASED)["rope"]
    frequencies = torch_reference.rope_frequencies(rope, 64)
    known = {0: 1.0, 10: 0.0562341325, 11: 0.0390069266, 16: 0.0055, 31: 3.33380381e-6}
    for pair, frequency in known.items():
        assert frequencies[pair].item() == pytest.approx(frequency, rel=1e-8)
    plain = torch_reference.rope_frequencies({**rope, "yarn": None}, 64)
    torch.testing.assert_close(frequencies[:11], plain[:11], rtol=1e-12, atol=0)
    torch.testing.assert_close(frequencies[23:], plain[23:] / 40, rtol=1e-12, atol=0)
    assert 192**-0.5 * rope["yarn"]["m"] ** 2 == pytest.approx(0.1352337789, rel=1e-9)


def test_rotation_of_one_pair():
    """Neighbours (x[0], x[1]) turn by the position: (1, 0) at 1 becomes (cos 1, sin 1)."""
    rope = {"theta": 10000.0, "yarn": None}
    cos, sin = torch_reference.rope_table(rope, 4, torch.arange(2), torch.float64)
    x = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64).expand(1, 1, 2, 4)
    places = torch_reference.Places(cos, sin, True, visible=torch.ones(1, dtype=torch.bool))
    want = torch.tensor([[1.0, 0, 0, 0], [math.cos(1), math.sin(1), 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(torch_reference.rotate(x, places)[0, 0], want)


def test_packed_documents_equal_documents_alone(reference: TorchReference):
    """Every depth, also where a document ends: its last token ahead becomes token 0."""
    lengths = [5, 9, 2, 8]
    documents = random_tokens(1, sum(lengths)).split(lengths, dim=1)
    segment_ids = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(lengths))[None]
    packed = torch.cat(documents, dim=1)
    h0 = reference.main(packed, segment_ids).hidden
    states = [h0, *reference.mtp(h0, packed, segment_ids, depths=3)]
    alone = []
    for document in documents:
        h0_alone = reference.main(document).hidden
        alone.append([h0_alone, *reference.mtp(h0_alone, document, depths=3)])
    for k, state in enumerate(states):
        assert_close(state, torch.cat([parts[k] for parts in alone], dim=1))


def test_packing_needs_segment_ids(reference: TorchReference):
    tokens, segment_ids = random_tokens(1, 12), torch.tensor([[1] * 5 + [2] * 7])
    apart, mixed = reference.main(tokens, segment_ids).hidden, reference.main(tokens).hidden
    assert torch.equal(apart[:, :5], mixed[:, :5])
    assert (apart - mixed)[:, 5:].abs().max() > 0.01


def test_tokens_ahead():
    tokens, segment_ids = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[7, 7, 7, 8, 8]])
    assert torch_reference.tokens_ahead(tokens, segment_ids, 1).tolist() == [[2, 3, 0, 5, 0]]
    assert torch_reference.tokens_ahead(tokens, segment_ids, 2).tolist() == [[3, 0, 0, 0, 0]]
    assert torch_reference.tokens_ahead(tokens, segment_ids, 9).tolist() == [[0, 0, 0, 0, 0]]


def test_first_state_is_what_the_config_says(reference: TorchReference):
    states = reference.main(random_tokens(1, 4))
    before = TorchReference({**reference.config, "mtp_hidden_state": "pre_norm"}, reference.get)
    assert reference.first_state(states) is states.hidden
    assert before.first_state(states) is states.before_norm


def test_float64_differs_by_rounding_only(folder: Path, reference: TorchReference):
    tokens = random_tokens(2, 16)
    exact = open_reference(folder, torch.float64)
    h0, want_h0 = reference.main(tokens).hidden, exact.main(tokens).hidden
    assert want_h0.dtype == torch.float64
    want = exact.logits(exact.mtp(want_h0, tokens)[1])
    assert_close(reference.logits(reference.mtp(h0, tokens)[1]).double(), want)


def test_fp8_is_dequantised_by_blocks(folder: Path, reference: TorchReference):
    """[30, 40] in blocks of [8, 16]: grid [4, 3], partial at both edges, scale in another file."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    split = [n for n in index if f"{n}_scale_inv" in index and index[n] != index[f"{n}_scale_inv"]]
    name = next(n for n in split if "kv_a_proj_with_mqa" in n)
    raw = {n: raw_tensor(folder / index[n], n) for n in (name, f"{name}_scale_inv")}
    q, scale = raw[name].astype(np.float32), raw[f"{name}_scale_inv"]
    assert q.shape == (30, 40)
    assert scale.shape == (4, 3)
    want = [[q[i, j] * scale[i // 8, j // 16] for j in range(40)] for i in range(30)]
    assert np.array_equal(reference.get(name).numpy(), np.array(want))


def raw_tensor(path: Path, name: str) -> np.ndarray:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    entry = json.loads(content[8:start])[name]
    begin, end = (start + offset for offset in entry["data_offsets"])
    dtype = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F32": np.float32}[entry["dtype"]]
    return np.frombuffer(content[begin:end], dtype).reshape(entry["shape"])


def test_few_weights_are_held_at_once(reference: TorchReference):
    """At most a matrix of an expert beside the router's two weights, of some hundred and fifty."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts, fetched = [], set()

    def get(name: str) -> Tensor:
        weight = reference.get(name).clone()
        alive.add(weight)
        fetched.add(name)
        counts.append(len(alive))
        return weight

    watched = TorchReference(reference.config, get)
    tokens = random_tokens(2, 16)
    watched.logits(watched.mtp(watched.main(tokens).hidden, tokens)[-1])
    assert len(fetched) > 150
    assert max(counts) <= 3, max(counts)


def test_errors_say_what_is_wrong(reference: TorchReference):
    with pytest.raises(ValueError, match=r"model\.layers\.9\.enorm\.weight is in no safetensors"):
        reference.get("model.layers.9.enorm.weight")
    with pytest.raises(UserError, match="does not compute scoring_func"):
        TorchReference({**reference.config, "scoring_func": "softmax"}, reference.get)
    bare = TorchReference({**reference.config, "num_nextn_predict_layers": 0}, reference.get)
    with pytest.raises(ValueError, match="no MTP module, but 2 depths"):
        bare.mtp(torch.zeros(1, 2, 40), random_tokens(1, 2), depths=2)
    with pytest.raises(UserError, match="rope_type 'linear': only 'yarn'"):
        as_read(RELEASED | {"rope_scaling": {"type": "linear"}})


def test_missing_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "converters.verifying.logits.torch_reference")
    with pytest.raises(UserError, match=r"pip install 'deepseek-mtp\[verify\]'"):
        importlib.import_module("converters.verifying.logits.torch_reference")
