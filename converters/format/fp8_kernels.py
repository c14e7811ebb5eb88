"""Compiled loops over FP8 blocks; must not be imported before they are needed: it imports numba.

Integer arithmetic on the bits of floats, one loop over the columns of a block at a time, without
branches: what LLVM turns into vector code. No subnormal float32 is computed on the way, which would
be slow on some processors and zero where a library has set flush-to-zero. All loops release the
GIL.

Weights come as words: uint16 for bfloat16, uint32 for float32. `shift` is 16 or 0: a word shifted
left by it is the bits of the float32 of equal value.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numba import njit

u32 = np.uint32
f32 = np.float32

SIGN = u32(0x80000000)
MANTISSA = u32(0x007FFFFF)
INFINITY = u32(0x7F800000)
NAN = u32(0x7FC00000)
FP8_NAN = u32(0x7F)
FP8_MAX = u32(0x7E)  # 448
FP8_SMALLEST_NORMAL = u32(0x08)  # 2**-6
FP8_LARGEST = f32(448)
SMALLEST_SCALE = f32(2.0**-126)  # amax / 448 may underflow; a scale of 0 loses the sign
F32_2_POW_MINUS_6 = u32(0x3C800000)
F32_2_POW_14 = u32(0x46800000)


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled on first use, kept on disk for the next process where there is a place for it."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError:  # neither the source's folder nor the user's cache can be written
        compiled = njit(**options)(function)
    return cast(Callable[..., Any], compiled)


@_kernel
def _decoded(code, scale):
    """Bits of float32(code) * scale for a finite scale; quiet NaN of the code's sign for NaN."""
    magnitude = u32(code & u32(0x7F))
    sign = u32((code & u32(0x80)) << u32(24))
    normal = u32((magnitude << u32(20)) + u32((127 - 7) << 23)).view(np.float32)
    subnormal = f32(np.int32(magnitude)) * f32(2.0**-9)
    value = normal if magnitude >= FP8_SMALLEST_NORMAL else subnormal
    product = u32(f32(value * scale).view(np.uint32) ^ sign)
    return product if magnitude != FP8_NAN else u32(NAN | sign)


@_kernel
def _rounded(bits, shift):
    """The word nearest to a float32, ties to even; `bits` is finite, infinite or the quiet NaN."""
    below_half = u32(0x7FFF) if shift else u32(0)
    odd = u32(bits >> u32(16)) & u32(1) if shift else u32(0)
    return u32(u32(bits + below_half + odd) >> shift)


@_kernel
def _encoded(bits):
    """The e4m3fn code nearest to a float32, ties to even; beyond 448 is 448, NaN keeps its sign."""
    magnitude = u32(bits & ~SIGN)
    odd = u32((magnitude >> u32(20)) & u32(1))
    normal = u32(u32(magnitude + u32(0x7FFFF) + odd) >> u32(20)) - u32((127 - 7) << 3)
    # Floats from 2**14 on are 2**-9 apart, as e4m3's subnormals are: this addition rounds to them.
    raised = f32(u32(magnitude).view(np.float32) + f32(2.0**14))
    subnormal = u32(f32(raised).view(np.uint32) - F32_2_POW_14)
    code = u32(normal if magnitude >= F32_2_POW_MINUS_6 else subnormal)
    code = u32(code if code < FP8_MAX else FP8_MAX)
    code = u32(code if magnitude <= INFINITY else FP8_NAN)
    return u32(code | u32((bits & SIGN) >> u32(24)))


@_kernel
def dequantise(out, codes, scales, height, width, shift):
    """out[r, c] = the word of float32(codes[r, c]) * scales[r // height, c // width]."""
    rows, columns = codes.shape
    for row in range(rows):
        for block in range(scales.shape[1]):
            scale = scales[row // height, block]
            begin = block * width
            code_row = codes[row, begin : min(columns, begin + width)]
            out_row = out[row, begin : min(columns, begin + width)]
            for c in range(len(code_row)):
                out_row[c] = _rounded(_decoded(u32(code_row[c]), scale), shift)


@_kernel
def quantise(codes, words, scales, height, width, shift):
    """codes[r, c] = the code nearest to words[r, c] / scales[r // height, c // width]."""
    rows, columns = codes.shape
    for row in range(rows):
        for block in range(scales.shape[1]):
            scale = scales[row // height, block]
            divisor = scale if scale != f32(0) else f32(1)  # a zero scale stands for zeros only
            begin = block * width
            word_row = words[row, begin : min(columns, begin + width)]
            code_row = codes[row, begin : min(columns, begin + width)]
            for c in range(len(code_row)):
                quotient = f32(u32(u32(word_row[c]) << shift).view(np.float32) / divisor)
                code_row[c] = _encoded(f32(quotient).view(np.uint32))


@_kernel
def reproduces(codes, words, scales, height, width, shift):
    """Whether dequantise would give exactly `words`; stops at the first row that differs."""
    rows, columns = codes.shape
    for row in range(rows):
        differs = u32(0)
        for block in range(scales.shape[1]):
            scale = scales[row // height, block]
            begin = block * width
            word_row = words[row, begin : min(columns, begin + width)]
            code_row = codes[row, begin : min(columns, begin + width)]
            for c in range(len(code_row)):
                word = _rounded(_decoded(u32(code_row[c]), scale), shift)
                differs |= u32(word ^ u32(word_row[c]))
        if differs:
            return False
    return True


@_kernel
def largest(out, words, height, width, shift):
    """out[i, j] (zeros before) = the float32 bits of the block's largest magnitude.

    Magnitudes order as their bits do, NaN above infinity above every number.
    """
    rows, columns = words.shape
    for row in range(rows):
        for block in range(out.shape[1]):
            begin = block * width
            word_row = words[row, begin : min(columns, begin + width)]
            found = out[row // height, block]
            for c in range(len(word_row)):
                magnitude = u32(u32(u32(word_row[c]) << shift) & ~SIGN)
                found = u32(magnitude if magnitude > found else found)
            out[row // height, block] = found


@_kernel
def errors(worst, codes, words, scales, height, width, shift):
    """The error of float32(code) * scale against the words: its sum of squares and the words'.

    worst[i, j] (zeros before) becomes the float32 bits of the block's largest error. Sums are kept
    per column of a block: vector code without reordering, the same on every machine.
    """
    rows, columns = codes.shape
    error_sums = np.zeros(width, np.float64)
    word_sums = np.zeros(width, np.float64)
    for row in range(rows):
        for block in range(scales.shape[1]):
            scale = scales[row // height, block]
            begin = block * width
            word_row = words[row, begin : min(columns, begin + width)]
            code_row = codes[row, begin : min(columns, begin + width)]
            found = worst[row // height, block]
            for c in range(len(code_row)):
                word = u32(u32(word_row[c]) << shift).view(np.float32)
                stored = u32(_decoded(u32(code_row[c]), scale)).view(np.float32)
                error = f32(stored - word)
                magnitude = u32(f32(error).view(np.uint32) & ~SIGN)
                found = u32(magnitude if magnitude > found else found)
                error_sums[c] += np.float64(error) * np.float64(error)
                word_sums[c] += np.float64(word) * np.float64(word)
            worst[row // height, block] = found
    return error_sums.sum(), word_sums.sum()


@_kernel
def _power_of_two(scale):
    """The smallest power of two that is not below a normal float32."""
    bits = u32(f32(scale).view(np.uint32) + MANTISSA)
    return u32(bits & ~MANTISSA).view(np.float32)


@_kernel
def requantise(codes, scales, peaks, costs, words, height, width, shift, powers_of_two):
    """Codes of the words, a row of blocks at a time: by `scales` where these give the words again.

    Other rows of blocks get new scales, which `scales` then has, rounded up to powers of two where
    that is asked for. Of these peaks[i] (zeros before)
    becomes the float32 bits of each block's largest magnitude, and costs[i] (NaN before) the
    largest error over that, and the sums of squares of errors and words.
    """
    rows = codes.shape[0]
    for i in range(scales.shape[0]):
        begin, end = i * height, min(rows, (i + 1) * height)
        code_rows, word_rows, scale = codes[begin:end], words[begin:end], scales[i : i + 1]
        quantise(code_rows, word_rows, scale, height, width, shift)
        if reproduces(code_rows, word_rows, scale, height, width, shift):
            continue
        peak = peaks[i : i + 1]
        largest(peak, word_rows, height, width, shift)
        for block in range(scale.shape[1]):
            magnitude = u32(peak[0, block]).view(np.float32)
            new = f32(magnitude / FP8_LARGEST)
            new = f32(1) if magnitude == f32(0) else max(new, SMALLEST_SCALE)
            scale[0, block] = _power_of_two(new) if powers_of_two else new
        quantise(code_rows, word_rows, scale, height, width, shift)
        worst = np.zeros(scale.shape, np.uint32)
        error, power = errors(worst, code_rows, word_rows, scale, height, width, shift)
        relative = f32(0)
        for block in range(scale.shape[1]):
            if peak[0, block]:
                magnitude = u32(peak[0, block]).view(np.float32)
                relative = max(relative, f32(u32(worst[0, block]).view(np.float32) / magnitude))
        costs[i, 0], costs[i, 1], costs[i, 2] = relative, error, power
