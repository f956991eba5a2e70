"""The operators as torch sees them: schema, fake tensors, refusals before anything is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flute_kernels import FormatError, QuantSpec, UnsupportedError, dequantize, hadamard, qgemm

from .helpers import DTYPES, assert_near, operands, random_layer, reference, refusal

OPS = torch.ops.flute_kernels
SPEC = QuantSpec(bits=3, group_size=32)


@pytest.fixture
def layer() -> Any:
    return random_layer(SPEC, 48, 96, tables=3)


# --- torch's own checks -----------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 96)])
def test_opcheck_qgemm(layer: Any, shape: tuple[int, ...], gradients: bool) -> None:
    x = torch.randn(shape, requires_grad=gradients)
    bias = torch.randn(48, requires_grad=gradients) if len(shape) > 1 else None
    torch.library.opcheck(OPS.qgemm.default, (x, *operands(layer.weight), bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_dequantize(layer: Any, dtype: torch.dtype) -> None:
    torch.library.opcheck(OPS.dequantize.default, (*operands(layer.weight), dtype))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_opcheck_hadamard(gradients: bool, transpose: bool) -> None:
    x, signs = torch.randn(3, 96, requires_grad=gradients), torch.ones(96)
    torch.library.opcheck(OPS.hadamard.default, (x, signs, 32, transpose))
    torch.library.opcheck(OPS.hadamard.default, (x, None, 32, transpose))


# --- tensors without data ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_meta_tensors_give_the_shape(layer: Any, dtype: torch.dtype) -> None:
    weight = [t.to("meta") if isinstance(t, Tensor) else t for t in operands(layer.weight)]
    x = torch.empty(2, 3, 96, dtype=dtype, device="meta")
    for out, shape in (
        (qgemm(x, *weight), (2, 3, 48)),
        (qgemm(x[0, 0], *weight, torch.empty(48, device="meta")), (48,)),
        (dequantize(*weight, dtype), (48, 96)),
        (hadamard(x, None, 32), (2, 3, 96)),
    ):
        assert (tuple(out.shape), out.dtype, out.device.type) == (shape, dtype, "meta")


def test_fake_tensors_give_what_real_ones_give(layer: Any) -> None:
    wide, real_weight = torch.randn(96, 4), operands(layer.weight)
    with FakeTensorMode() as mode:
        weight = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in real_weight]
        fake = mode.from_tensor(wide).T
        outs = qgemm(fake, *weight), hadamard(fake, None, 32)
    real = qgemm(wide.T, *real_weight), hadamard(wide.T, None, 32)
    for f, r in zip(outs, real, strict=True):
        assert (f.shape, f.dtype, f.device, f.stride()) == (r.shape, r.dtype, r.device, r.stride())


def test_fake_tensors_are_refused_like_real_ones(layer: Any) -> None:
    weight = [t.to("meta") if isinstance(t, Tensor) else t for t in operands(layer.weight)]
    with refusal(FormatError, "[2, 95]", 96):
        qgemm(torch.empty(2, 95, device="meta"), *weight)
    with refusal(UnsupportedError, "torch.float64"):
        qgemm(torch.empty(2, 96, device="meta").double(), *weight)
    with refusal(FormatError, "[2, 48]", 32):
        hadamard(torch.empty(2, 48, device="meta"), None, 32)


def test_dequantizing_to_another_dtype_is_refused_without_data_too(layer: Any) -> None:
    weight = [t.to("meta") if isinstance(t, Tensor) else t for t in operands(layer.weight)]
    with refusal(UnsupportedError, "torch.float64"):
        dequantize(*weight, torch.float64)


# --- refusals ---------------------------------------------------------------------------------------
# The weight's tensors below are views into storage that is large enough for what the numbers claim, so
# that an operator that reads too far fails the test and not the process.


def test_a_weight_whose_tensors_and_numbers_disagree_is_refused(layer: Any) -> None:
    x = torch.randn(2, 96)
    codes, scales, tables, table_of_block, *numbers = operands(layer.weight)
    assert_near(
        qgemm(x, codes, scales, tables, table_of_block, *numbers), reference(x, layer.dense)
    )  # the numbers agree
    wrong = {
        "fewer blocks of codes": (codes[:2], scales, tables, table_of_block),
        "fewer words of codes": (codes[:, :6], scales, tables, table_of_block),
        "fewer blocks of scales": (codes, scales[:2], tables, table_of_block),
        "fewer groups of scales": (codes, scales[:, :2], tables, table_of_block),
        "a smaller table": (codes, scales, tables[..., :8], table_of_block),
        "fewer blocks with a table": (codes, scales, tables, table_of_block[:2]),
    }
    accepted = []
    for name, tensors in wrong.items():
        for call in (lambda *w: qgemm(x, *w), lambda *w: dequantize(*w, torch.float32)):
            try:
                call(*tensors, *numbers)
            except FormatError:
                continue
            accepted.append(name)
    assert accepted == []


def test_a_weight_with_tensors_of_another_dtype_is_refused(layer: Any) -> None:
    x = torch.randn(2, 96)
    codes, scales, tables, table_of_block, *numbers = operands(layer.weight)
    wrong = {
        "codes": (codes.long(), scales, tables, table_of_block),
        "float32 scales": (codes, scales.float(), tables, table_of_block),
        "float64 scales": (codes, scales.double(), tables, table_of_block),
        "tables": (codes, scales, tables.double(), table_of_block),
        "table_of_block": (codes, scales, tables, table_of_block.long()),
    }
    accepted = []
    for name, tensors in wrong.items():
        try:
            qgemm(x, *tensors, *numbers)
        except FormatError:
            continue
        except KeyError:
            pass
        accepted.append(name)
    assert accepted == []


def test_a_strided_weight_is_refused_or_read_as_such(layer: Any) -> None:
    x = torch.randn(2, 96)
    codes, scales, *rest = operands(layer.weight)
    strided = torch.stack([codes, codes], -1)[..., 0]
    try:
        out = qgemm(x, strided, scales, *rest)
    except FormatError:
        return
    assert_near(out, reference(x, layer.dense))
