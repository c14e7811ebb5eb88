"""FP8 blocks against ml_dtypes, bit for bit: every code, partial and oblong blocks, odd scales."""

import os
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from roundtrip import block_scales, quantised

from converters.format.fp8 import (
    Block,
    Cost,
    Fp8Error,
    Requantised,
    dequantise_into,
    requantise_into,
)

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
F32 = np.float32
CODES = np.arange(256, dtype=np.uint8)
NAN_CODES = (0x7F, 0xFF)
SHAPES_AND_BLOCKS = [
    ((256, 256), (128, 128)),
    ((576, 448), (128, 128)),  # as [576, 7168] with scales [5, 56]: the last block has 64 rows
    ((37, 50), (8, 16)),
    ((37, 50), (16, 8)),
    ((5, 3), (128, 128)),
    ((1, 1), (1, 1)),
    ((0, 7), (2, 2)),
]
DTYPES = [BF16, F32]


def grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def spread(scale: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """The scale of every element, by indexing: nothing of the kernels' own arithmetic."""
    rows, columns = np.arange(shape[0]) // block[0], np.arange(shape[1]) // block[1]
    return scale[np.ix_(rows, columns)]


def random_codes(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    codes = rng.integers(0, 254, shape, np.uint8)
    return codes + (codes >= NAN_CODES[0]).astype(np.uint8)


def random_scales(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Positive float32 of full mantissa, over the exponents that weights have and beyond."""
    return np.ldexp(rng.uniform(0.5, 1, shape), rng.integers(-90, 90, shape)).astype(F32)


def dequantised(codes: np.ndarray, scale: np.ndarray, block: tuple[int, int], dtype) -> np.ndarray:
    out = np.empty(codes.shape, dtype)
    dequantise_into(out, codes, scale, block)
    return out


def bits(array: np.ndarray) -> np.ndarray:
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.itemsize])


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(bits(found), bits(expected))


def requantise(weight: np.ndarray, scale: np.ndarray, block: Block) -> tuple[Any, Requantised]:
    codes = np.empty(weight.shape, np.uint8)
    return codes, requantise_into(codes, weight, scale, block)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_codes_under_many_scales(dtype):
    scale = random_scales(np.random.default_rng(0), (500, 1))
    scale[:6, 0] = [0, 1, -1, 2.0**-149, 2.0**-126, np.finfo(F32).max]
    codes = np.broadcast_to(CODES, (500, 256)).copy()
    found = dequantised(codes, scale, (1, 256), dtype)
    with np.errstate(over="ignore"):
        expected = (codes.view(E4M3).astype(F32) * scale).astype(dtype)
    nan = np.isin(codes, NAN_CODES)
    assert np.isnan(found[nan]).all()
    assert_same_bits(found[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block"), SHAPES_AND_BLOCKS)
def test_shapes_and_blocks(shape, block, dtype):
    rng = np.random.default_rng(1)
    codes, scale = random_codes(rng, shape), random_scales(rng, grid(shape, block))
    scales = spread(scale, shape, block)
    weight = (codes.view(E4M3).astype(F32) * scales).astype(dtype)
    assert_same_bits(dequantised(codes, scale, block, dtype), weight)
    np.testing.assert_array_equal(quantised(weight, scale, block), codes)


def test_bits_and_named_dtypes_are_the_same():
    rng = np.random.default_rng(2)
    codes, scale = random_codes(rng, (4, 6)), random_scales(rng, (2, 2))
    named = dequantised(codes.view(E4M3), scale, (2, 3), BF16)
    assert_same_bits(dequantised(codes, scale, (2, 3), np.uint16), named.view(np.uint16))
    np.testing.assert_array_equal(quantised(named.view(np.uint16), scale, (2, 3)), codes)


def test_pieces_of_whole_blocks_are_the_whole():
    rng = np.random.default_rng(3)
    codes, scale = random_codes(rng, (40, 20)), random_scales(rng, (5, 2))
    whole = dequantised(codes, scale, (8, 16), BF16)
    pieces = [dequantised(codes[r : r + 16], scale[r // 8 :][:2], (8, 16), BF16) for r in (0, 16)]
    assert_same_bits(np.concatenate(pieces), whole[:32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantise_rounds_as_ml_dtypes_and_saturates(dtype):
    rng = np.random.default_rng(4)
    weight = np.ldexp(rng.uniform(-1, 1, (64, 1000)), rng.integers(-12, 12, (64, 1000)))
    values = CODES[:0x7F].view(E4M3).astype(F32)
    halves = (values[1:] + values[:-1]) / 2  # ties, and the floats on both sides of them
    near = np.concatenate([halves, np.nextafter(halves, F32(0)), np.nextafter(halves, F32(1e9))])
    weight[0, : near.size], weight[1, : near.size] = near, -near
    weight[2, :6] = [0.0, -0.0, 1e30, -1e30, np.inf, -np.inf]
    weight = weight.astype(dtype)
    scale = random_scales(rng, (64, 1))
    scale[:3] = 1
    with np.errstate(over="ignore"):
        expected = np.clip(weight.astype(F32) / scale, -448, 448).astype(E4M3)
    np.testing.assert_array_equal(quantised(weight, scale, (1, 1000)), expected.view(np.uint8))


def test_nan_stays_nan_of_its_sign():
    weight = np.array([[np.nan, -np.nan]], F32)
    assert quantised(weight, np.ones((1, 1), F32), (1, 2)).tolist() == [[0x7F, 0xFF]]


def test_a_zero_scale_stands_for_zeros():
    weight = np.array([[0.0, -0.0]], F32)
    codes, found = requantise(weight, np.zeros((1, 1), F32), (1, 2))
    assert (codes.tolist(), found.costs) == ([[0, 0x80]], ())


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_amax_over_448(dtype):
    weight = np.zeros((5, 7), dtype)
    weight[0, 1], weight[4, 6], weight[1, 5] = -896, 3, 1e-44
    stored = np.array([[0.7, 0.7], [1, 1], [0.7, 0.7]], F32)  # the second row of blocks is zeros
    scale = requantise(weight, stored, (2, 4))[1].scale
    tiny = np.finfo(F32).tiny
    smallest = tiny if weight[1, 5] else 1  # bfloat16 has no 1e-44
    assert scale.dtype == F32
    np.testing.assert_array_equal(scale, np.array([[2, smallest], [1, 1], [1, F32(3) / F32(448)]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_returns_under_its_stored_scale(dtype):
    scale = random_scales(np.random.default_rng(5), (1000, 1))
    codes = np.broadcast_to(CODES, (1000, 256)).copy()  # subnormals, -0.0 and NaN with the rest
    same, found = requantise(dequantised(codes, scale, (1, 256), dtype), scale, (1, 256))
    assert not found.costs
    assert_same_bits(same, codes)
    assert_same_bits(found.scale, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0, 0), (3, 15), (36, 49), (17, 20)])
def test_one_moved_element_is_a_change(dtype, place):
    rng = np.random.default_rng(6)
    codes, scale = random_codes(rng, (37, 50)), random_scales(rng, (5, 4))
    weight = dequantised(codes, scale, (8, 16), dtype)
    assert not requantise(weight, scale, (8, 16))[1].costs
    bits(weight)[place] ^= 1
    assert len(requantise(weight, scale, (8, 16))[1].costs) == 1


def test_a_lost_sign_of_zero_is_a_change():
    weight = np.array([[-0.0, 448]], F32)
    scale = np.ones((1, 1), F32)
    codes, _ = requantise(weight, scale, (1, 2))
    assert codes.tolist() == [[0x80, 0x7E]]
    assert dequantised(codes, scale, (1, 2), F32).tobytes() == weight.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "block"), SHAPES_AND_BLOCKS)
def test_requantised_weights_and_the_errors_reported(shape, block, dtype):
    rng = np.random.default_rng(7)
    weight = rng.standard_normal(shape).astype(dtype)
    weight[: block[0], : block[1]] = 0  # one block of zeros
    codes, found = requantise(weight, np.ones(grid(shape, block), F32), block)
    again, _ = requantise(weight.copy(), random_scales(rng, grid(shape, block)), block)
    changed = [weight[row : row + block[0]].any() for row in range(0, shape[0], block[0])]
    assert len(found.costs) == sum(changed)
    assert codes.tobytes() == again.tobytes()
    assert_same_bits(found.scale, block_scales(weight, block))
    scales = spread(found.scale, shape, block)
    exact = weight.astype(np.float64)
    error = codes.view(E4M3).astype(np.float64) * scales - exact
    assert (np.abs(error) <= 16.01 * scales).all()  # half a step of the largest codes
    relative = np.abs(error / (scales * 448)).max(initial=0)
    rms = np.sqrt(np.square(error).sum() / (np.square(exact).sum() or 1))
    assert max((cost.max_rel_err for cost in found.costs), default=0) == pytest.approx(
        relative, rel=1e-4
    )
    total = Cost(0, *np.sum(np.reshape(found.costs, (-1, 3)), axis=0)[1:])
    assert total.rms_rel_err == pytest.approx(rms, rel=1e-4)


def test_requantised_weights_are_kept_by_their_new_scales():
    weight = np.random.default_rng(8).standard_normal((37, 50)).astype(F32)
    first, found = requantise(weight, np.ones((5, 4), F32), (8, 16))
    again = dequantised(first, found.scale, (8, 16), BF16)
    second, kept = requantise(again, found.scale, (8, 16))
    assert len(found.costs) == 5
    assert not kept.costs
    assert_same_bits(second, first)
    assert_same_bits(kept.scale, found.scale)


def test_scales_of_ue8m0_are_the_next_powers_of_two():
    """Rounded up before quantising: no weight is beyond 448, and the error is that of the scale."""
    rng = np.random.default_rng(5)
    weight = (rng.normal(size=(24, 40)) * 10.0 ** rng.integers(-6, 6, (24, 1))).astype(np.float32)
    weight[8:16, :16] = 0
    weight[16, 0] = 448.0  # amax / 448 is 1, a power of two: it stays
    weight[16:, :16] = np.clip(weight[16:, :16], -448, 448)
    codes, stored = np.empty(weight.shape, np.uint8), np.ones((3, 3), np.float32)
    found = requantise_into(codes, weight, stored, (8, 16), powers_of_two=True)
    plain = requantise_into(np.empty_like(codes), weight, stored, (8, 16))
    exact = np.exp2(np.ceil(np.log2(plain.scale.astype(np.float64))))
    np.testing.assert_array_equal(found.scale, exact.astype(np.float32))
    assert not np.array_equal(found.scale, plain.scale)
    values = np.empty_like(weight)
    dequantise_into(values, codes, found.scale, (8, 16))
    largest = np.repeat(np.repeat(found.scale, 8, 0), 16, 1)[:, :40] * 448
    assert (np.abs(values - weight) <= largest / 2**4).all()


def test_only_rows_of_blocks_that_changed_get_new_scales():
    rng = np.random.default_rng(9)
    codes, scale = random_codes(rng, (37, 50)), random_scales(rng, (5, 4))
    weight = dequantised(codes, scale, (8, 16), F32)
    weight[9:11] *= 1.3
    weight[36] += 1
    found, result = requantise(weight, scale, (8, 16))
    same = [0, 2, 3]
    assert len(result.costs) == 2
    assert_same_bits(result.scale[same], scale[same])
    assert_same_bits(result.scale[[1, 4]], block_scales(weight, (8, 16))[[1, 4]])
    for row in same:
        assert_same_bits(found[8 * row : 8 * row + 8], codes[8 * row : 8 * row + 8])


def test_weights_that_are_not_finite_are_refused():
    weight = np.ones((4, 6), F32)
    weight[3, 5], weight[0, 0] = np.inf, np.nan
    message = r"weights that are not finite in 2 blocks: the largest magnitude of block \(0, 0\) is"
    with pytest.raises(Fp8Error, match=message):
        requantise(weight, np.full((2, 2), 0.7, F32), (2, 3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_not_finite_are_refused(value):
    scale = np.ones((2, 2), F32)
    scale[1, 0] = value
    message = rf"scales that are not finite in 1 blocks: the scale of block \(1, 0\) is {value}"
    with pytest.raises(Fp8Error, match=message):
        dequantised(np.zeros((4, 4), np.uint8), scale, (2, 2), BF16)
    with pytest.raises(Fp8Error, match=message):
        requantise(np.zeros((4, 4), F32), scale, (2, 2))


def test_what_does_not_fit_together_is_refused():
    codes, scale, out = np.zeros((4, 6), np.uint8), np.ones((2, 2), F32), np.empty((4, 6), BF16)
    whole: dict[str, Any] = {"out": out, "codes": codes, "scale": scale, "block": (2, 3)}

    def refused(message: str, **wrong: Any) -> None:
        with pytest.raises(Fp8Error, match=message):
            dequantise_into(**(whole | wrong))

    needed = r"needed float32 \(2, 2\) for \(4, 6\) in blocks \(2, 3\)"
    refused(rf"has scales float32 \(2, 1\), {needed}", scale=scale[:, :1])
    refused(rf"has scales bfloat16 \(2, 2\), {needed}", scale=scale.astype(BF16))
    refused(r"FP8 shape \(3, 6\), needed the shape of its weights \(4, 6\)", codes=codes[:3])
    refused("is int8, needed C-contiguous float8_e4m3fn or its bits", codes=codes.view(np.int8))
    refused("needed C-contiguous float8_e4m3fn or its bits", codes=np.asfortranarray(codes))
    refused("is float64, needed bfloat16, its bits as uint16, or float32", out=np.empty((4, 6)))
    refused(r"has shape \(24,\), needed a C-contiguous array of two", out=out.reshape(-1))
    refused(r"has shape \(6, 4\), needed a C-contiguous array of two", out=out.T)
    refused(r"has blocks of \(0, 3\), needed at least one row", block=(0, 3))


def run_python(code: str, **environment: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_does_not_import_numba():
    assert run_python("import sys, converters.format.fp8; print('numba' in sys.modules)") == "False"


def test_kernels_run_where_no_cache_can_be_written():
    code = "import numpy as np; from converters.format.fp8 import requantise_into as r"
    code += "; codes, ones = np.empty((1, 1), np.uint8), np.ones((1, 1), np.float32)"
    code += "; print(r(codes, 896 * ones, ones, (1, 1)).scale)"
    locator = "import numba.core.caching as c; c.CacheImpl._locator_classes = []; "
    assert run_python(locator + code) == "[[2.]]"
