"""FP8 (e4m3fn) with one scale a block, to and from bfloat16 and float32.

`weight[r, c] = cast(float32(code[r, c]) * scale[r // height, c // width])`: the scale multiplies,
and the last block of a row or column may be partial. The block's edges come from the config
(`weight_block_size`), never from shapes: [576, 7168] with scales [5, 56] has blocks of 128 x 128.
https://github.com/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md

A tensor may be handled in pieces whose rows begin at a multiple of the block's height.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mtp_model.problems import UserError

if TYPE_CHECKING:
    from types import ModuleType

Block = tuple[int, int]
"""Rows and columns of a block, as in `weight_block_size`."""


class Fp8Error(UserError):
    """Weights or scales that FP8 blocks cannot hold; the text reads on after the tensor's name."""


class Cost(NamedTuple):
    """What a row of blocks loses to new scales.

    `max_rel_err`: the largest error of an element, divided by the largest magnitude of its block.
    `squared_error`, `squared_weights`: sums of the squares of all errors and of all weights.
    """

    max_rel_err: float
    squared_error: float
    squared_weights: float

    @property
    def rms_rel_err(self) -> float:
        """The root mean square of all errors, divided by that of the weights."""
        ratio = self.squared_error / self.squared_weights if self.squared_weights else 0.0
        return math.sqrt(ratio)


class Requantised(NamedTuple):
    """What comes with the FP8 codes of a weight: scales, float32 [row blocks, column blocks].

    `costs`: of the rows of blocks that got new scales. All others have the stored ones, and their
    weights come back bit for bit.
    """

    scale: NDArray[np.float32]
    costs: tuple[Cost, ...]


def dequantise_into(out: np.ndarray, codes: np.ndarray, scale: np.ndarray, block: Block) -> None:
    """Fill `out` [rows, columns]: bfloat16 (or its bits, uint16), rounded to even, or float32.

    `codes` is uint8 or float8_e4m3fn, `scale` float32. NaN codes become quiet NaN of their sign.
    """
    words, shift = _words(out)
    codes = _codes(codes)
    _check(codes.shape, out.shape, scale, block)
    _kernels().dequantise(words, codes, scale, *block, shift)


def requantise_into(
    codes: NDArray[np.uint8],
    weight: np.ndarray,
    stored_scale: np.ndarray,
    block: Block,
    *,
    powers_of_two: bool = False,
) -> Requantised:
    """Fill `codes` with FP8 for `weight`, both [rows, columns], a row of blocks at a time.

    A row of blocks keeps its stored scales if that loses nothing. Others get new ones: the largest
    magnitude of a block / 448, 1.0 for a block of zeros; powers_of_two: rounded up to such, as
    `scale_fmt: ue8m0` of a config asks for. `weight` is as `out` of dequantise_into.
    Weights that dequantise_into made come back as the codes they were made of, NaN included, as
    long as code * scale is not subnormal. Fp8Error for other weights with NaN or infinity.
    """
    words, shift = _words(weight)
    _check(codes.shape, weight.shape, stored_scale, block)
    scale, peaks = stored_scale.copy(), np.zeros(stored_scale.shape, np.uint32)
    costs = np.full((len(scale), 3), np.nan)
    _kernels().requantise(_codes(codes), scale, peaks, costs, words, *block, shift, powers_of_two)
    _require_finite("weights", peaks.view(np.float32), "the largest magnitude")
    changed = costs[~np.isnan(costs[:, 0])]
    return Requantised(scale, tuple(Cost(*cost) for cost in changed.tolist()))


def _kernels() -> "ModuleType":
    # Here and not above: numba takes half a second to import, and most commands need none of it.
    from converters.format import fp8_kernels

    return fp8_kernels


def _words(array: np.ndarray) -> tuple[NDArray[Any], np.uint32]:
    """The array as the kernels take it, and their `shift`."""
    if array.ndim != 2 or not array.flags.c_contiguous:
        raise Fp8Error(f"has shape {array.shape}, needed a C-contiguous array of two dimensions")
    if array.dtype in (np.uint16, ml_dtypes.bfloat16):
        return array.view(np.uint16), np.uint32(16)
    if array.dtype == np.float32:
        return array.view(np.uint32), np.uint32(0)
    raise Fp8Error(f"is {array.dtype}, needed bfloat16, its bits as uint16, or float32")


def _codes(array: np.ndarray) -> NDArray[np.uint8]:
    if array.dtype not in (np.uint8, ml_dtypes.float8_e4m3fn) or not array.flags.c_contiguous:
        raise Fp8Error(f"is {array.dtype}, needed C-contiguous float8_e4m3fn or its bits as uint8")
    return array.view(np.uint8)


def _check(codes: tuple[int, ...], out: tuple[int, ...], scale: np.ndarray, block: Block) -> None:
    """The kernels index without bounds: everything has to fit before they run."""
    if codes != out:
        raise Fp8Error(f"has FP8 shape {codes}, needed the shape of its weights {out}")
    if scale.dtype != np.float32 or scale.shape != grid(out, block):
        found = f"has scales {scale.dtype} {scale.shape}"
        raise Fp8Error(f"{found}, needed float32 {grid(out, block)} for {out} in blocks {block}")
    _require_finite("scales", scale, "the scale")


def grid(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    height, width = block
    if height < 1 or width < 1:
        raise Fp8Error(f"has blocks of {block}, needed at least one row and one column")
    return -(-shape[0] // height), -(-shape[1] // width)


def _require_finite(what: str, values: NDArray[np.float32], each: str) -> None:
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        where = tuple(int(index) for index in wrong[0])
        found = f"{each} of block {where} is {values[where]}"
        raise Fp8Error(f"has {what} that are not finite in {len(wrong)} blocks: {found}")
