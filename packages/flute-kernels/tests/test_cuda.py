"""The GPU kernels against float64, and the ways in which a GPU is used: streams, graphs, compilation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flute_kernels import FormatError, LutWeight, QuantizedLinear, QuantSpec, UnsupportedError, ops

from .cuda_cases import BLOCKS, Case
from .helpers import ALL_SPECS, TOLERANCE, assert_near, dense_weight, operands, refusal, same_bits, spec_id

pytestmark = pytest.mark.gpu

CASES = 400  # of a block


def linear_on_gpu(
    spec: QuantSpec, n: int, k: int, *, tables: int = 1, table_dtype: torch.dtype = torch.float16
) -> QuantizedLinear:
    codes = torch.randint(0, spec.table_entries, (n, k // spec.vector_size), device="cuda")
    codes[:, -1] = spec.table_entries - 1
    scales = (torch.randn(n, k // spec.group_size_for(k), device="cuda") * 0.1).half()
    codebook = torch.randn(tables, spec.table_entries, spec.vector_size, device="cuda").to(table_dtype)
    return QuantizedLinear.from_codes(codes, scales, codebook.half(), spec)


@pytest.fixture
def weight() -> LutWeight:
    return LutWeight.from_linear(linear_on_gpu(QuantSpec(bits=4, group_size=128), 192, 512))


# --- the product ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(BLOCKS), ids="{:02}".format)
def test_random_products(poisoned: None, block: int) -> None:
    """Bits, groups, vectors, tables, dtypes, shapes, strides and biases, drawn at random."""
    failures = []
    for seed in range(block * CASES, (block + 1) * CASES):
        case = Case(seed)
        product = case.make()
        out = product.weight.linear(product.x, product.bias)
        error = product.relative_error(out)
        if not error <= TOLERANCE[case.dtype] or out.dtype != case.dtype:
            failures.append((error, case))
    assert not failures, f"{len(failures)} of {CASES}: {failures[:5]}"


@pytest.mark.parametrize("spec", ALL_SPECS, ids=spec_id)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_identity_gives_the_weight_rounded_once(spec: QuantSpec, dtype: torch.dtype) -> None:
    stored = linear_on_gpu(spec, 112, 512, table_dtype=dtype)  # entries that the dtype holds
    weight = LutWeight.from_linear(stored)
    eye = torch.eye(512, dtype=dtype, device="cuda")
    out = torch.cat([weight.linear(part) for part in eye.split(48)])
    dense = LutWeight.from_linear(stored, "cpu").dequantize(torch.float32)
    assert same_bits(out.T.contiguous().cpu(), dense.to(dtype))


@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 15, 16, 17, 40, 64, 65, 1000])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 32), (17, 96), (4096, 4096), (6144, 2048), (7168, 1024), (300, 8192)]
)
def test_sizes(n: int, k: int, m: int, poisoned: None) -> None:
    spec = QuantSpec(bits=3, group_size=32)
    stored = linear_on_gpu(spec, n, k)
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    weight = LutWeight.from_linear(stored)
    assert_near(weight.linear(x), x.double() @ weight.dequantize(torch.float32).double().T)


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(bits=4, group_size=256), QuantSpec(bits=3, group_size=-1), QuantSpec(bits=2, group_size=32)],
    ids=spec_id,
)
@pytest.mark.parametrize(
    ("n", "k", "m"),
    [
        *((34_016, 512, 30), (20_000, 768, 100), (9_024, 1280, 600)),
        (2_080, 512, 5_000),  # so many rows of x that they come in bands
        (65_536, 4_096, 12),  # so large that Hopper's room takes fewer rows than else
    ],
)
def test_more_sets_of_rows_and_columns_than_blocks(
    spec: QuantSpec, n: int, k: int, m: int, poisoned: None
) -> None:
    """On Hopper, blocks multiply a few whole and share the rest, with tables that change on the way."""
    weight = LutWeight.from_linear(linear_on_gpu(spec, n, k, tables=2))
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    out = weight.linear(x)
    assert_near(out, x.double() @ weight.dequantize(torch.float32).double().T)
    assert same_bits(out, weight.linear(x))


def test_x_in_every_shape_and_stride(weight: LutWeight) -> None:
    dense = weight.dequantize(torch.float32).double()
    whole = torch.randn(3, 4, 1024, device="cuda", dtype=torch.bfloat16)
    for x in (whole[..., :512], whole[..., 3:515], whole[..., ::2], whole[:, 1, 8:520], whole[0, 0, :512]):
        assert_near(weight.linear(x), x.double() @ dense.T)
    assert weight.linear(whole[:0, :, :512]).shape == (0, 4, 192)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_representative_for_the_sanitizers(bits: int, poisoned: None) -> None:
    """Every kernel family once and small, since a sanitizer (nox -s sanitize) makes it slow."""
    spec = QuantSpec(bits=bits, group_size=32 if bits == 3 else 64)
    stored = linear_on_gpu(spec, 416, 448, tables=2)
    weight = LutWeight.from_linear(stored)
    assert same_bits(weight.to_linear().qweight, stored.qweight)
    dense = weight.dequantize(torch.float32).double()
    for m, dtype in ((1, torch.float16), (9, torch.bfloat16), (20, torch.float16), (50, torch.bfloat16)):
        x = torch.randn(m, 448, device="cuda").to(dtype)
        assert_near(weight.linear(x), x.double() @ dense.T)
    for m in (90, 130):  # a part of K each for several blocks, on Hopper
        x = torch.randn(m, 448, device="cuda", dtype=torch.float16)
        assert_near(weight.linear(x), x.double() @ dense.T)
    wide = LutWeight.from_linear(linear_on_gpu(spec, 34_016, 256))  # which blocks share, on Hopper
    x = torch.randn(20, 256, device="cuda", dtype=torch.float16)
    assert_near(wide.linear(x), x.double() @ wide.dequantize(torch.float32).double().T)
    for block in (4, 64, 256, 1024, 4096):
        x = torch.randn(3, 4096, device="cuda", dtype=torch.float16)
        ref = x.double().view(3, -1, block) @ hadamard_matrix(block)
        assert_near(ops.hadamard(x, None, block), ref.view(3, 4096))


def test_infinities_and_nan_follow_ieee(weight: LutWeight) -> None:
    dense = weight.dequantize(torch.float32)
    x = torch.randn(3, 512, device="cuda", dtype=torch.float16)
    x[0, 5], x[1, 7] = float("inf"), float("nan")
    out, ref = weight.linear(x), torch.nn.functional.linear(x.float(), dense)
    assert torch.equal(out.isnan(), ref.isnan())
    assert torch.equal(out.isinf(), ref.isinf())
    assert_near(out[2], ref[2].double())


def test_float32_is_multiplied_after_one_warning() -> None:
    from flute_kernels.cuda import kernels

    kernels._warned_of_float32 = False
    weight = LutWeight.from_linear(linear_on_gpu(QuantSpec(bits=2, group_size=64), 48, 128))
    x = torch.randn(5, 128, device="cuda")
    with pytest.warns(UserWarning, match="float32"):
        out = weight.linear(x)
    assert_near(out, x.double() @ weight.dequantize(torch.float32).double().T, 1e-5)


def test_rows_beyond_32_bits() -> None:
    weight = LutWeight.from_linear(linear_on_gpu(QuantSpec(bits=2, group_size=-1), 65536, 32))
    x = torch.randn(40000, 32, device="cuda", dtype=torch.float16)
    out = weight.linear(x)  # 2.6e9 results
    dense = weight.dequantize(torch.float32).double()
    for rows in (slice(0, 3), slice(32766, 32770), slice(39998, 40000)):
        assert_near(out[rows], x[rows].double() @ dense.T)


# --- determinism, streams, graphs, compilation ------------------------------------------------------


@pytest.mark.parametrize("m", [1, 8, 16, 50, 200])
def test_same_bits_again_and_on_another_stream(weight: LutWeight, m: int) -> None:
    x = torch.randn(m, 512, device="cuda", dtype=torch.float16)
    first = weight.linear(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = weight.linear(x)
    torch.cuda.synchronize()
    assert same_bits(first, weight.linear(x))
    assert same_bits(first, second)


def test_many_streams_at_once() -> None:
    weights = [
        LutWeight.from_linear(linear_on_gpu(QuantSpec(bits=b, group_size=64), 1024, 2048)) for b in (2, 3, 4)
    ]
    inputs = [torch.randn(m, 2048, device="cuda", dtype=torch.float16) for m in (1, 8, 16, 64, 256)]
    expected = [[w.linear(x) for x in inputs] for w in weights]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for turn in range(40):
        with torch.cuda.stream(streams[turn % 4]):
            results.append([[w.linear(x) for x in inputs] for w in weights])
    torch.cuda.synchronize()
    assert all(
        same_bits(a, b)
        for r in results
        for ws, es in zip(r, expected, strict=True)
        for a, b in zip(ws, es, strict=True)
    )


@pytest.mark.parametrize("m", [4, 16, 64])
def test_chained_products_see_each_others_results(m: int) -> None:
    """Each kernel may start before the one before has ended, but must not read its result too early."""
    spec = QuantSpec(bits=4, group_size=64)
    weights = [LutWeight.from_linear(linear_on_gpu(spec, 2048, 2048)) for _ in range(4)]
    x = torch.randn(m, 2048, device="cuda", dtype=torch.float16)
    stepwise = x
    for weight in weights * 5:
        torch.cuda.synchronize()
        stepwise = weight.linear(stepwise) * 0.2
        torch.cuda.synchronize()
    for _ in range(20):
        chained = x
        for weight in weights * 5:
            chained = weight.linear(chained) * 0.2
        assert same_bits(chained, stepwise)


@pytest.mark.parametrize("m", [1, 16, 200])
def test_cuda_graph_replays_with_new_input(weight: LutWeight, m: int) -> None:
    x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
    weight.linear(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = weight.linear(weight.linear(x)[:, :1].expand(-1, 512) * 0.01 + x)
    for _ in range(3):
        x.copy_(torch.randn(m, 512, device="cuda"))
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(out, weight.linear(weight.linear(x)[:, :1].expand(-1, 512) * 0.01 + x))


def test_compiles_whole(weight: LutWeight) -> None:
    bias = torch.randn(192, device="cuda", dtype=torch.float16)
    compiled = torch.compile(lambda x: weight.linear(x, bias) * 2, fullgraph=True)
    for m in (1, 9):
        x = torch.randn(m, 512, device="cuda", dtype=torch.float16)
        assert same_bits(compiled(x), weight.linear(x, bias) * 2)


def test_opcheck(weight: LutWeight) -> None:
    x = torch.randn(3, 512, device="cuda", dtype=torch.float16, requires_grad=True)
    torch.library.opcheck(torch.ops.flute_kernels.qgemm.default, (x, *operands(weight)))
    torch.library.opcheck(torch.ops.flute_kernels.dequantize.default, (*operands(weight), torch.float16))
    torch.library.opcheck(torch.ops.flute_kernels.hadamard.default, (x, None, 64))


def test_gradients(weight: LutWeight) -> None:
    x = torch.randn(3, 512, device="cuda", dtype=torch.float16, requires_grad=True)
    grad = torch.randn(3, 192, device="cuda", dtype=torch.float16)
    weight.linear(x).backward(grad)
    assert x.grad is not None
    assert_near(x.grad, grad.double() @ weight.dequantize(torch.float32).double())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_while_the_first_is_current(weight: LutWeight) -> None:
    other = LutWeight.from_linear(weight.to_linear(), "cuda:1")
    x = torch.randn(8, 512, device="cuda:1", dtype=torch.float16)
    assert torch.cuda.current_device() == 0
    assert same_bits(other.linear(x).cpu(), weight.linear(x.to("cuda:0")).cpu())
    assert same_bits(other.dequantize().cpu(), weight.dequantize().cpu())


# --- the layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ALL_SPECS, ids=spec_id)
@pytest.mark.parametrize(("n", "k"), [(48, 256), (33, 1280)])
def test_packing_is_undone_exactly(spec: QuantSpec, n: int, k: int) -> None:
    stored = linear_on_gpu(spec, n, k)
    again = LutWeight.from_linear(stored).to_linear()
    assert same_bits(again.qweight, stored.qweight)
    assert same_bits(again.scales, stored.scales)
    assert same_bits(again.codebook, stored.codebook)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", ALL_SPECS, ids=spec_id)
def test_dequantize_gives_what_the_cpu_gives(spec: QuantSpec, dtype: torch.dtype, poisoned: None) -> None:
    stored = linear_on_gpu(spec, 96, 1280, tables=3)
    on_gpu, on_cpu = LutWeight.from_linear(stored), LutWeight.from_linear(stored, "cpu")
    assert same_bits(on_gpu.dequantize(dtype).cpu(), on_cpu.dequantize(dtype))


def test_moves_between_devices_keep_every_bit(weight: LutWeight) -> None:
    there = LutWeight.from_linear(weight.to_linear(), "cpu")
    back = LutWeight.from_linear(there.to_linear(), "cuda")
    assert same_bits(back.dequantize(), weight.dequantize())


# --- rotation ---------------------------------------------------------------------------------------


def hadamard_matrix(size: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64, device="cuda")
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / size**0.5


@pytest.mark.parametrize("block", [2**i for i in range(1, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_rotation(block: int, dtype: torch.dtype, transpose: bool, poisoned: None) -> None:
    for rows, columns in ((1, block), (5, 3 * block), (3, 8192)):
        x = torch.randn(rows, columns, device="cuda").to(dtype)
        signs = torch.randint(0, 2, (columns,), device="cuda").float() * 2 - 1
        blocks = (x.double() * (1 if transpose else signs)).view(rows, -1, block)
        ref = (blocks @ hadamard_matrix(block)).view(rows, columns) * (signs if transpose else 1)
        assert_near(ops.hadamard(x, signs, block, transpose), ref, 2e-6 if dtype == torch.float32 else None)


def test_rotation_of_rows_apart_and_unaligned() -> None:
    whole = torch.randn(6, 1000, device="cuda", dtype=torch.float16)
    for x in (whole[:, 1:513], whole[::2, 8:520], whole[:, 8:520], whole.T[:512].T):
        ref = x.double().reshape(-1, 8, 64) @ hadamard_matrix(64)
        assert_near(ops.hadamard(x, None, 64), ref.view(x.shape))


def test_rotated_weight() -> None:
    spec = QuantSpec(bits=4, group_size=64, hadamard=256, hadamard_seed=7)
    stored = linear_on_gpu(spec, 64, 1024)
    weight, x = LutWeight.from_linear(stored), torch.randn(5, 1024, device="cuda", dtype=torch.float16)
    assert_near(weight.linear(x), x.double() @ weight.dequantize(torch.float32).double().T, 2e-3)


# --- refusals, after each of which the GPU still works -----------------------------------------------


@pytest.fixture
def still_works(weight: LutWeight) -> Iterator[None]:
    yield
    x = torch.randn(2, 512, device="cuda", dtype=torch.float16)
    assert_near(weight.linear(x), x.double() @ weight.dequantize(torch.float32).double().T)


def test_bad_x_is_refused(weight: LutWeight, still_works: None) -> None:
    with refusal(FormatError, "x", "cpu", "cuda:0"):
        weight.linear(torch.randn(2, 512))
    with refusal(FormatError, "x", 511, 512):
        weight.linear(torch.randn(2, 511, device="cuda"))
    with refusal(UnsupportedError, "x", "float64"):
        weight.linear(torch.randn(2, 512, device="cuda", dtype=torch.float64))
    with refusal(FormatError, "bias", 191, 192):
        weight.linear(torch.randn(2, 512, device="cuda"), torch.randn(191, device="cuda"))


def test_bad_packed_weight_is_refused(weight: LutWeight, still_works: None) -> None:
    x = torch.randn(2, 512, device="cuda", dtype=torch.float16)
    packed = weight._packed
    wide = torch.stack([packed.codes, packed.codes], -1)[..., 0]
    for change, parts in (
        ({"codes": packed.codes[:-1]}, ("codes", 7, 8)),
        ({"codes": packed.codes.long()}, ("codes", "int64")),
        ({"codes": wide}, ("codes", "not contiguous")),
        ({"scales": packed.scales.float()}, ("scales", "float32")),
        ({"scales": packed.scales.cpu()}, ("scales", "cpu")),
        ({"tables": packed.tables[:, :-1]}, ("tables", 255, 256)),
        ({"out_features": 193}, ("codes", 13)),
        ({"group_size": 96}, ("group_size", 96)),
        ({"bits": 5}, ("bits", 5)),
    ):
        with refusal(FormatError, *parts):
            ops.qgemm(x, *packed._replace(**change))


def test_uneven_tables_are_refused(still_works: None) -> None:
    stored = linear_on_gpu(QuantSpec(bits=4, group_size=32), 40, 64, tables=2)
    with refusal(FormatError, 2, 40, 20, 16):
        LutWeight.from_linear(stored)


def test_dense_weight_of_the_tests_is_the_formats() -> None:
    weight = Case(3).make().weight
    linear = weight.to_linear()
    assert_near(
        weight.dequantize(torch.float32), dense_weight(linear.codes(), linear.scales, linear.codebook), 1e-6
    )
