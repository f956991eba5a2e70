"""QuantizedLinear: the stored tensors of one layer, what they mean, and which are refused."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flute_kernels import FormatError, QuantizedLinear, QuantSpec

from .helpers import ALL_SPECS, DTYPES, dense_weight, random_layer, refusal, same_bits, spec_id

SPEC = QuantSpec(bits=4, group_size=64)
N, K = 6, 128


def tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    """A good state dict of one layer, with changes; None takes a tensor away."""
    good = random_layer(SPEC, N, K).stored.to_tensors()
    return {n: t for n, t in {**good, "bias": torch.zeros(N), **changes}.items() if t is not None}


def read(**changes: Tensor | None) -> QuantizedLinear:
    named = {f"model.q.{name}": tensor for name, tensor in tensors(**changes).items()}
    return QuantizedLinear.from_tensors(named, SPEC, prefix="model.q.", out_features=N, in_features=K)


@given(spec=st.sampled_from(ALL_SPECS), rows=st.integers(1, 40), multiple=st.integers(1, 3), data=st.data())
def test_dequantize_is_the_formula(spec: QuantSpec, rows: int, multiple: int, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**32), "seed"))
    layer = random_layer(
        spec,
        rows,
        multiple * max(spec.group_size, 32),
        tables=data.draw(st.integers(1, min(rows, 5)), "tables"),
        scale_dtype=data.draw(st.sampled_from((torch.float16, torch.bfloat16)), "scale dtype"),
        table_dtype=data.draw(st.sampled_from((torch.float16, torch.float32)), "table dtype"),
    )
    for dtype in DTYPES:
        assert same_bits(layer.stored.dequantize(dtype), layer.dense.to(dtype))


@pytest.mark.parametrize("spec", ALL_SPECS, ids=spec_id)
def test_written_tensors_read_back(spec: QuantSpec) -> None:
    stored = random_layer(spec, 5, 768).stored
    written = stored.to_tensors("layer.")
    assert sorted(written) == ["layer.codebook", "layer.qweight", "layer.scales"]
    assert all(t.is_contiguous() for t in written.values())
    again = QuantizedLinear.from_tensors(written, spec, prefix="layer.", out_features=5, in_features=768)
    assert (again.out_features, again.in_features) == (5, 768)
    assert again.nbytes == 5 * 768 * spec.bits // 8 + 2 * again.scales.numel() + 2 * again.codebook.numel()
    assert torch.equal(again.codes(), stored.codes())


def test_bias_is_optional() -> None:
    assert read(bias=None).bias is None
    assert torch.equal(read(bias=torch.ones(N)).bias, torch.ones(N))  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "tables"), [(7, 3), (16, 1), (48, 3), (5, 5)])
def test_rows_share_the_tables_evenly(rows: int, tables: int) -> None:
    layer = random_layer(SPEC, rows, 64, tables=tables)
    assert layer.stored.table_of_rows().tolist() == [n * tables // rows for n in range(rows)]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_scalar_table_equals_the_pair_table_that_is_its_square(bits: int) -> None:
    scalar = random_layer(QuantSpec(bits=bits, group_size=32)).stored
    table = scalar.codebook[0, :, 0]
    square = torch.stack(torch.meshgrid(table, table, indexing="xy"), -1).reshape(1, -1, 2)
    pairs = QuantizedLinear(
        QuantSpec(bits=bits, group_size=32, vector_size=2), scalar.qweight, scalar.scales, square
    )
    pairs.validate()
    assert same_bits(pairs.dequantize(), scalar.dequantize())


# --- from codes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vector_size", "shape"), [(1, (16,)), (1, (16, 1)), (1, (1, 16, 1)), (2, (256, 2)), (2, (1, 256, 2))]
)
def test_one_table_needs_no_leading_dimension(vector_size: int, shape: tuple[int, ...]) -> None:
    spec = QuantSpec(vector_size=vector_size)
    codes, scales = torch.zeros(4, 64 // vector_size, dtype=torch.uint8), torch.ones(4, 1).half()
    codebook = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    linear = QuantizedLinear.from_codes(codes, scales, codebook, spec)
    assert linear.codebook.shape == (1, spec.table_entries, vector_size)
    assert linear.dequantize()[0, :vector_size].tolist() == codebook.flatten()[:vector_size].tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_tables_of_other_dtypes_are_stored_in_float32(dtype: torch.dtype) -> None:
    codes, scales = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 1).half()
    linear = QuantizedLinear.from_codes(codes, scales, torch.arange(16).to(dtype), SPEC)
    assert linear.codebook.dtype == torch.float32
    assert linear.codebook.flatten().tolist() == list(range(16))


@pytest.mark.parametrize("shape", [(15,), (0,), (17, 1), (256, 3), (2, 256)])
def test_a_codebook_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """``(2, 256)`` is a transposed table of pairs: as many numbers, another meaning."""
    spec = QuantSpec(vector_size=2)
    codes, scales = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 1).half()
    with refusal(FormatError, "codebook", "256"):
        QuantizedLinear.from_codes(codes, scales, torch.zeros(shape), spec)


def test_codes_of_another_table_are_refused() -> None:
    codes, scales = torch.full((4, 64), 8, dtype=torch.uint8), torch.ones(4, 1).half()
    with refusal(FormatError, "8", "0 to 7"):
        QuantizedLinear.from_codes(codes, scales, torch.zeros(8), QuantSpec(bits=3))


def test_no_rows_are_refused() -> None:
    with refusal(FormatError, "out_features is 0"):
        QuantizedLinear.from_codes(
            torch.zeros(0, 64, dtype=torch.uint8), torch.ones(0, 1).half(), torch.zeros(16), SPEC
        )


# --- reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qweight", "scales", "codebook"])
def test_a_missing_tensor_is_named(name: str) -> None:
    with refusal(FormatError, f"model.q.{name} is missing"):
        read(**{name: None})


_HALF, _INT = torch.float16, torch.int32
WRONG: dict[str, list[tuple[Tensor, str, str]]] = {
    "qweight": [
        (torch.zeros(N, K // 8, dtype=torch.int64), f"int64 [{N}, 16]", "int32"),
        (torch.zeros(N, K // 8 - 1, dtype=_INT), "15", "multiple of 4"),
        (torch.zeros(N, K // 8 - 4, dtype=_INT), f"[{N}, 12]", f"[{N}, 16]"),
        (torch.zeros(N + 1, K // 8, dtype=_INT), f"[{N + 1}, 16]", f"[{N}, 16]"),
        (torch.zeros(N * K // 8, dtype=_INT), f"[{N * 16}]", "[N, K * 4 / 32]"),
    ],
    "scales": [
        (torch.ones(N, 2), f"float32 [{N}, 2]", "float16 or bfloat16"),
        (torch.ones(N, 1, dtype=_HALF), f"[{N}, 1]", f"[{N}, 2]"),
        (torch.ones(2, N, dtype=_HALF), f"[2, {N}]", f"[{N}, 2]"),
    ],
    "codebook": [
        (torch.zeros(1, 16, 1, dtype=torch.bfloat16), "bfloat16 [1, 16, 1]", "float16 or float32"),
        (torch.zeros(16, 1, dtype=_HALF), "[16, 1]", "[T, 16, 1]"),
        (torch.zeros(0, 16, 1, dtype=_HALF), "[0, 16, 1]", "[T, 16, 1]"),
        (torch.zeros(1, 8, 1, dtype=_HALF), "[1, 8, 1]", "[1, 16, 1]"),
        (torch.zeros(1, 16, 2, dtype=_HALF), "[1, 16, 2]", "[1, 16, 1]"),
        (torch.zeros(N + 1, 16, 1, dtype=_HALF), f"{N + 1} tables", f"{N} rows"),
    ],
    "bias": [
        (torch.zeros(N, dtype=torch.float64), "float64", "float32"),
        (torch.zeros(N + 1), f"[{N + 1}]", f"[{N}]"),
        (torch.zeros(1, N), f"[1, {N}]", f"[{N}]"),
    ],
}


@pytest.mark.parametrize(
    ("name", "tensor", "found", "expected"), [(n, *wrong) for n, wrongs in WRONG.items() for wrong in wrongs]
)
def test_a_wrong_shape_or_dtype_says_what_was_found_and_expected(
    name: str, tensor: Tensor, found: str, expected: str
) -> None:
    with refusal(FormatError, f"model.q.{name}", found, expected):
        read(**{name: tensor})


@pytest.mark.parametrize(
    ("name", "value"), list(product(("scales", "codebook"), (float("nan"), float("inf"), -float("inf"))))
)
def test_a_number_that_is_not_finite_is_refused(name: str, value: float) -> None:
    tensor = tensors()[name].clone()
    tensor.view(-1)[-1] = value
    with refusal(FormatError, f"model.q.{name}", f"1 of {tensor.numel()}"):
        read(**{name: tensor})


@pytest.mark.parametrize("k", [32, 64, 96, 160])
def test_the_model_decides_the_shape(k: int) -> None:
    with refusal(FormatError, "qweight"):
        QuantizedLinear.from_tensors(tensors(), SPEC, out_features=N, in_features=k)


@pytest.mark.parametrize(
    ("spec", "part"),
    [(QuantSpec(group_size=256), "group_size 256"), (QuantSpec(hadamard=256), "Hadamard block 256")],
)
def test_the_row_must_suit_the_spec(spec: QuantSpec, part: str) -> None:
    with refusal(FormatError, "qweight", K, part):
        QuantizedLinear.from_tensors(tensors(), spec)


def test_shapes_can_be_checked_before_there_are_numbers() -> None:
    empty = {n: t.to("meta") for n, t in tensors().items()}
    QuantizedLinear.from_tensors(empty, SPEC, out_features=N, in_features=K)
    with refusal(FormatError, "scales", f"[{N}, 2]"):
        QuantizedLinear.from_tensors({**empty, "scales": empty["scales"][:, :1]}, SPEC)


def test_the_formula_of_the_tests_itself() -> None:
    """Two rows, two tables, two groups, worked out by hand."""
    codes = torch.tensor([[0] * 32 + [1] * 32, [1] * 32 + [0] * 32])
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    codebook = torch.tensor([[[5.0], [6.0]], [[7.0], [8.0]]])
    dense = dense_weight(codes, scales, codebook)
    assert dense[:, ::32].tolist() == [[5.0, 12.0], [24.0, 28.0]]
    assert (dense == dense[:, ::32].repeat_interleave(32, 1)).all()
