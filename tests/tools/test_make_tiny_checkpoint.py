"""The tiny checkpoints have what tests rely on, and their names are those of the release."""

import json
import math
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from released import CONFIG
from safetensors import safe_open
from tokenizers import Tokenizer

from tools.make_tiny_checkpoint import TINY_CONFIG, make_tiny_checkpoint
from tools.released_format import is_quantised, weight_shapes


def stored(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Return {name: (file name, tensor)} of all files."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            names = file.keys()
            tensors |= {name: (path.name, file.get_tensor(name)) for name in names}
    return tensors


def index_of(folder: Path) -> dict:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def test_released_sizes_give_the_released_model():
    """As published: 684,489,845,504 parameters; 45,808 FP8 tensors, 45,867 F32, 316 BF16."""
    shapes = dict(weight_shapes(CONFIG, copies=True))
    assert sum(map(math.prod, shapes.values())) == 684_489_845_504
    fp8 = {name: shape for name, shape in shapes.items() if is_quantised(name, shape)}
    biases = {name: shape for name, shape in shapes.items() if name.endswith("_bias")}
    assert len(fp8) == 45_808
    assert len(fp8) + len(biases) == 45_867
    assert len(shapes) - len(fp8) - len(biases) == 316
    num_scales = sum(
        math.ceil(rows / 128) * math.ceil(columns / 128) for rows, columns in fp8.values()
    )
    num_fp8, num_bias = (sum(map(math.prod, group.values())) for group in (fp8, biases))
    num_bf16 = 684_489_845_504 - num_fp8 - num_bias
    assert num_fp8 + 2 * num_bf16 + 4 * (num_bias + num_scales) == 688_574_839_360


def test_copies_are_optional():
    """Layer 61 has 13,463,426,304 parameters, 11,610,068,224 without copies."""
    for copies, count in ((True, 13_463_426_304), (False, 11_610_068_224)):
        shapes = weight_shapes(CONFIG, copies=copies)
        assert sum(math.prod(shape) for name, shape in shapes if ".layers.61." in name) == count


def test_dimensions_are_pairwise_distinct():
    """Products too: a matrix fits nowhere but in its own place."""
    c = TINY_CONFIG
    heads, nope, rope, v = (
        c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    keys = "hidden_size vocab_size q_lora_rank kv_lora_rank intermediate_size "
    keys += "moe_intermediate_size n_routed_experts"
    dims = [c[key] for key in keys.split()]
    dims += [heads, nope, rope, v, nope + rope, nope + v, heads * (nope + rope)]
    dims += [heads * (nope + v), heads * v, c["kv_lora_rank"] + rope, 2 * c["hidden_size"]]
    assert len(set(dims)) == len(dims)


def test_fp8_format(tmp_path: Path):
    make_tiny_checkpoint(tmp_path, num_mtp=2)
    tensors = stored(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rows, columns = config["quantization_config"]["weight_block_size"]
    partial, oblong = set(), 0
    for name, (_, tensor) in tensors.items():
        if tensor.dtype != torch.float8_e4m3fn:
            kind = (torch.float32,) if "_scale_inv" in name or "bias" in name else (torch.bfloat16,)
            assert tensor.dtype in kind, name
            continue
        scale = tensors[f"{name}_scale_inv"][1]
        assert scale.shape == (
            math.ceil(tensor.shape[0] / rows),
            math.ceil(tensor.shape[1] / columns),
        )
        assert tensor.float().abs().max() == 448
        partial.add((tensor.shape[0] % rows > 0, tensor.shape[1] % columns > 0))
        oblong += scale.shape[0] != scale.shape[1]
    assert partial >= {(True, True), (False, True)}
    assert oblong > 100
    assert not any("eh_proj.weight_scale_inv" in name for name in tensors)


def test_files_split_what_belongs_together(tmp_path: Path):
    make_tiny_checkpoint(tmp_path)
    tensors, index = stored(tmp_path), index_of(tmp_path)
    assert index["weight_map"] == {name: file for name, (file, _) in tensors.items()}
    total = sum(tensor.nbytes for _, tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    scales = [name for name in tensors if name.endswith("_scale_inv")]
    apart = [n for n in scales if tensors[n][0] != tensors[n.removesuffix("_scale_inv")][0]]
    assert len(scales) / 4 < len(apart) < len(scales)
    expert_files = defaultdict(set)
    for name, (file, _) in tensors.items():
        if ".experts." in name:
            expert_files[name.split(".")[2]].add(file)
    assert expert_files.keys() == {"2", "3", "4"}
    assert all(len(files) > 1 for files in expert_files.values())


def test_tensors_lie_in_the_order_of_their_names(tmp_path: Path):
    make_tiny_checkpoint(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        assert length % 8 == 0
        del header["__metadata__"]
        offsets = [entry["data_offsets"] for entry in header.values()]
        assert list(header) == sorted(header)
        assert [begin for begin, _ in offsets] == [0, *(end for _, end in offsets[:-1])]
        assert path.stat().st_size == 8 + length + offsets[-1][1]


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("f32", torch.float32)])
def test_flavours_hold_the_same_values(tmp_path: Path, dtype, kind: torch.dtype):
    make_tiny_checkpoint(tmp_path / "this", dtype=dtype)
    make_tiny_checkpoint(tmp_path / "fp8")
    this, fp8 = stored(tmp_path / "this"), stored(tmp_path / "fp8")
    config = json.loads((tmp_path / "this" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == str(kind).removeprefix("torch.")
    assert this.keys() == {name for name in fp8 if not name.endswith("_scale_inv")}
    for name, (_, tensor) in this.items():
        bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if bias else kind), name
    norm = "model.layers.4.shared_head.norm.weight"
    assert torch.equal(this[norm][1].bfloat16(), fp8[norm][1])


def test_variants(tmp_path: Path):
    make_tiny_checkpoint(tmp_path, q_lora=False, copies=False, num_mtp=0, num_files=1, seed=1)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    tensors = stored(tmp_path)
    assert {file for file, _ in tensors.values()} == {"model.safetensors"}
    assert "model.layers.0.self_attn.q_proj.weight_scale_inv" in tensors
    assert not any("q_a_proj" in name or ".layers.4." in name for name in tensors)
    make_tiny_checkpoint(tmp_path / "copies")
    copies = stored(tmp_path / "copies")
    for copy, main in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        layer = f"model.layers.4.{copy}.weight"
        assert torch.equal(copies[layer][1], copies[f"{main}.weight"][1])
    assert not torch.equal(tensors["model.norm.weight"][1], copies["model.norm.weight"][1])


def test_router_biases_have_both_signs(tmp_path: Path):
    make_tiny_checkpoint(tmp_path)
    biases = [t for name, (_, t) in stored(tmp_path).items() if "correction_bias" in name]
    assert len(biases) == 3
    assert all((bias < 0).any() for bias in biases)
    assert any((bias > 0).any() for bias in biases)


def test_command_line_writes_the_same_bytes(tmp_path: Path):
    sizes = {"num_hidden_layers": 3, "weight_block_size": [16, 8]}
    make_tiny_checkpoint(tmp_path / "api", dtype="fp8", num_mtp=2, sizes=sizes)
    command = [sys.executable, "-m", "tools.make_tiny_checkpoint", str(tmp_path / "cli")]
    command += "--mtp 2 --num-hidden-layers 3 --set weight_block_size=[16,8]".split()
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    written = {path.name: path.read_bytes() for path in (tmp_path / "cli").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "api").iterdir()}
    assert len(written) == 7 + 5


def test_tokenizer_reads_back_any_text(tmp_path: Path):
    make_tiny_checkpoint(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "def first(items):\n    return 'Привет, 世界'\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())
    assert tokenizer.get_vocab_size() < TINY_CONFIG["vocab_size"]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for key, number in (("bos_token", 0), ("eos_token", 1), ("pad_token", 2)):
        assert tokenizer.token_to_id(settings[key]) == number


def test_errors_say_what_is_wrong(tmp_path: Path):
    with pytest.raises(ValueError, match=r"unknown config keys \['hiden_size'\]"):
        make_tiny_checkpoint(tmp_path, sizes={"hiden_size": 8})
    with pytest.raises(ValueError, match="vocab_size 100 is below 259"):
        make_tiny_checkpoint(tmp_path, sizes={"vocab_size": 100})
    with pytest.raises(ValueError, match="use even sizes"):
        make_tiny_checkpoint(tmp_path, sizes={"kv_lora_rank": 21})
