"""Time and memory of `verify --logits` on a checkpoint of DeepSeek-V3's own layer sizes.

`python -m tools.bench_verify SCRATCH` writes one dense, one MoE and one MTP layer in FP8 with
embedding and head (27 GB), imports them (27 GB more), verifies, and says what 61 layers would take.
Values are random, the same few megabytes again and again from different places: fast to write.
"""

import argparse
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tools.bench_data import RELEASED_SIZES
from tools.make_tiny_checkpoint import TINY_CONFIG, tiny_config, write_json, write_safetensors
from tools.released_format import NUMPY_DTYPES, Shape, is_quantised, weight_shapes

FP8, BF16 = NUMPY_DTYPES["F8_E4M3"], NUMPY_DTYPES["BF16"]
SIZES: dict[str, Any] = {
    **RELEASED_SIZES,
    "n_routed_experts": 256,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "vocab_size": 129280,
    "num_hidden_layers": 2,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        **TINY_CONFIG["rope_scaling"],
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
    },
    "weight_block_size": (128, 128),
}
LAYERS = {"dense": 3, "MoE": 58, "MTP": 1}  # of the released model
FILE_BYTES = 4 << 30
NOISE = 1 << 24  # random values to take from
PEAK = 4.5  # standard deviations that FP8's largest number stands for


def write_checkpoint(folder: Path) -> None:
    """The checkpoint, file by file: a file's tensors are in memory."""
    folder.mkdir(parents=True)
    config = tiny_config("fp8", num_mtp=1, q_lora=True, sizes=SIZES)
    write_json(folder / "config.json", config)
    names: dict[str, str] = {}
    for number, content in enumerate(_files(_tensors(config)), start=1):
        name = f"model-{number:05d}.safetensors"
        write_safetensors(folder / name, content)
        names |= dict.fromkeys(content, name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})


def _files(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    content: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        content[name] = tensor
        if sum(part.nbytes for part in content.values()) >= FILE_BYTES:
            yield content
            content = {}
    yield content


def _tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Weights that keep activations of order 1, each with its own place in the noise."""
    rng = np.random.default_rng(0)
    noise = np.clip(rng.standard_normal(NOISE).astype(np.float32), -PEAK, PEAK)
    codes = (noise * (448 / PEAK)).astype(FP8)

    def take(values: np.ndarray, shape: Shape) -> np.ndarray:
        return np.resize(np.roll(values, int(rng.integers(NOISE))), shape)

    for name, shape in weight_shapes(config, copies=False):
        gain = 1.0 if name.endswith("embed_tokens.weight") else shape[-1] ** -0.5
        if name.endswith("e_score_correction_bias"):
            yield name, rng.uniform(-0.1, 0.1, shape).astype(np.float32)
        elif name.endswith("norm.weight"):
            yield name, rng.uniform(0.5, 1.5, shape).astype(np.float32).astype(BF16)
        elif is_quantised(name, shape):
            yield name, take(codes, shape)
            grid = tuple(-(-size // 128) for size in shape)
            scales = rng.uniform(0.9, 1.1, grid) * gain * PEAK / 448
            yield f"{name}_scale_inv", scales.astype(np.float32)
        else:
            yield name, take((gain * noise).astype(ml_dtypes.bfloat16), shape)


def run(*args: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """What `convert-deepseek ARGS --json` says, and the most memory that it had, in GB."""
    command = [sys.executable, "-m", "converters.cli", *map(str, args), "--json"]
    peaks = {"RssAnon": 0.0, "RssFile": 0.0, "VmHWM": 0.0}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.2):
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                except OSError:
                    return
                for line in status.splitlines():
                    kind, _, rest = line.partition(":")
                    if kind in peaks:
                        peaks[kind] = max(peaks[kind], int(rest.split()[0]) * 1024 / 1e9)

        watcher = threading.Thread(target=watch)
        watcher.start()
        out, _ = process.communicate()
        ended.set()
        watcher.join()
    if process.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(out), peaks


def report(found: dict[str, Any], peaks: dict[str, float]) -> Iterator[str]:
    yield f"result: {'holds' if found['holds'] else 'DIFFERS'}"
    yield ", ".join(f"{kind} {peak:.1f} GB" for kind, peak in peaks.items())
    for layer in found["logits"]["layers"]:
        yield f"{layer['name']:<20} {layer['seconds']:7.1f} s  alone {layer['alone']:.1e}"
    seconds = {layer["name"]: layer["seconds"] for layer in found["logits"]["layers"]}
    each = [seconds[f"model.layers.{index}"] for index in range(len(LAYERS))]
    whole = sum(itertools.starmap(lambda s, n: s * n, zip(each, LAYERS.values(), strict=True)))
    yield f"61 layers and the MTP module of the released model: {whole / 3600:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time and memory of `verify --logits` at DeepSeek-V3's own layer sizes."
    )
    parser.add_argument("scratch", type=Path, help="folder with 60 GB of room; kept for next time")
    scratch = parser.parse_args().scratch
    source, checkpoint = scratch / "source", scratch / "checkpoint"
    if not source.exists():
        write_checkpoint(source)
    run("import", source, checkpoint)
    print("\n".join(report(*run("verify", source, checkpoint, "--logits"))))


if __name__ == "__main__":
    main()
