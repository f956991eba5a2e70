"""Products of a mixture of experts: each row of x times the weight of its own expert."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from flute_kernels import FormatError, LutWeight, QuantSpec, UnsupportedError, dequantize, qgemm_grouped
from flute_kernels.cuda.grouped import multiply_grouped

from .cuda_cases import BLOCKS, Mixture
from .helpers import (
    BITS_AND_VECTORS,
    DTYPES,
    GROUP_SIZES,
    TOLERANCE,
    Layer,
    assert_near,
    operands,
    random_layer,
    reference,
    refusal,
    same_bits,
)
from .test_hadamard import rotated

OP = torch.ops.flute_kernels.qgemm_grouped.default
SPEC = QuantSpec(bits=3, group_size=32)
EXPERTS, N, K = 4, 32, 96

COUNTS = {
    "some for each": [3, 1, 9, 20],
    "experts without rows": [0, 5, 0, 12],
    "all with the first": [17, 0, 0, 0],
    "all with one": [0, 0, 17, 0],
    "all with the last": [0, 0, 0, 17],
    "none with any": [0, 0, 0, 0],
}


@pytest.fixture
def layer() -> Layer:
    return stacked(SPEC)


def stacked(spec: QuantSpec, n: int = N, k: int = K, experts: int = EXPERTS, tables: int = 1) -> Layer:
    """The experts' weights on top of each other."""
    return random_layer(spec, experts * n, k, tables=tables)


def int32(counts: list[int]) -> Tensor:
    return torch.tensor(counts, dtype=torch.int32)


def expected(x: Tensor, counts: list[int], dense: Tensor) -> Tensor:
    """One float64 product for each expert, and zeros below."""
    weights = dense.unflatten(0, (len(counts), -1))
    parts = x.split([*counts, len(x) - sum(counts)])
    outs = [reference(part, weight) for part, weight in zip(parts, weights, strict=False)]
    return torch.cat([*outs, torch.zeros(len(parts[-1]), weights.shape[1], dtype=torch.float64)])


@pytest.mark.usefixtures("isa", "poisoned")
class TestOnEveryInstructionSet:
    @pytest.mark.parametrize("tables", [1, EXPERTS, 2 * EXPERTS], ids="{} tables".format)
    @pytest.mark.parametrize("group_size", GROUP_SIZES)
    @pytest.mark.parametrize(("bits", "vector_size"), BITS_AND_VECTORS)
    def test_every_spec(self, bits: int, vector_size: int, group_size: int, tables: int) -> None:
        spec = QuantSpec(bits=bits, group_size=group_size, vector_size=vector_size)
        layer = stacked(spec, k=256, tables=tables)
        counts = [2, 0, 19, 7]
        for dtype in DTYPES:
            x = torch.randn(sum(counts), 256).to(dtype)
            out = layer.weight.linear_grouped(x, int32(counts))
            assert out.dtype == dtype
            assert_near(out, expected(x, counts, layer.dense))

    @pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
    @pytest.mark.parametrize("rest", [0, 1, 6])
    def test_whoever_has_the_rows(self, layer: Layer, counts: list[int], rest: int) -> None:
        """Rows after the last expert's belong to none: whatever they hold, they give zeros."""
        x = torch.randn(sum(counts) + rest, K)
        x[sum(counts) :] = float("nan")
        out = layer.weight.linear_grouped(x, int32(counts))
        assert_near(out, expected(x, counts, layer.dense))
        assert (out[sum(counts) :] == 0).all()

    @pytest.mark.parametrize("n", [16, 48, 112])
    def test_experts_of_odd_numbers_of_blocks(self, n: int) -> None:
        layer = stacked(SPEC, n=n, experts=3, tables=3)
        for counts, dtype in product(([1, 2, 1], [30, 8, 1]), DTYPES):
            x = torch.randn(sum(counts), K).to(dtype)
            assert_near(layer.weight.linear_grouped(x, int32(counts)), expected(x, counts, layer.dense))


@pytest.mark.parametrize("experts", [1, 2, 64])
def test_any_number_of_experts(experts: int) -> None:
    layer = stacked(SPEC, n=16, experts=experts)
    counts = torch.randint(0, 4, (experts,)).tolist()
    x = torch.randn(sum(counts), K)
    assert_near(layer.weight.linear_grouped(x, int32(counts)), expected(x, counts, layer.dense))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_gives_the_bits_that_it_gives_alone(layer: Layer, dtype: torch.dtype) -> None:
    counts, x = [3, 1, 9, 20], torch.randn(33, K).to(dtype)
    out = layer.weight.linear_grouped(x, int32(counts))
    alone = [layer.weight.linear(part) for part in x.split(counts)]
    own = [part[:, e * N : (e + 1) * N] for e, part in enumerate(alone)]
    assert same_bits(out, torch.cat(own).contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    weight, counts = stacked(SPEC, n=256, k=512).weight, int32([1, 3, 9, 64])
    x = torch.randn(80, 512).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(weight.linear_grouped(x, counts))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_any_strides(layer: Layer) -> None:
    counts = int32([2, 0, 3, 4])
    wide, every_other = torch.randn(20, 200), torch.stack([counts, counts], 1)[:, 0]
    for x in (wide[:9, :K], wide[::2, 3 : 3 + K][:9], torch.randn(K, 9).T, wide[:9, ::2][:, :K]):
        out = layer.weight.linear_grouped(x, every_other)
        assert_near(out, expected(x, counts.tolist(), layer.dense))


def test_no_rows_at_all(layer: Layer) -> None:
    out = layer.weight.linear_grouped(torch.empty(0, K), int32([0, 0, 0, 0]))
    assert out.shape == (0, N)


def test_one_rotation_serves_all_experts() -> None:
    layer = stacked(QuantSpec(bits=4, group_size=32, hadamard=32, hadamard_seed=3), tables=EXPERTS)
    counts, x = [3, 0, 2, 5], torch.randn(12, K)
    turned = rotated(x, layer.stored.signs(), 32)
    assert_near(layer.weight.linear_grouped(x, int32(counts)), expected(turned, counts, layer.dense))


# --- refusals ---------------------------------------------------------------------------------------


def test_counts_that_x_does_not_have(layer: Layer) -> None:
    with refusal(FormatError, "15", "14"):
        layer.weight.linear_grouped(torch.randn(14, K), int32([3, 0, 2, 10]))
    with refusal(FormatError, "counts[2]", "-1"):
        layer.weight.linear_grouped(torch.randn(14, K), int32([3, 0, -1, 10]))


@pytest.mark.parametrize(("experts", "each"), [(3, "42.6667"), (16, "8"), (5, "25.6")])
def test_rows_that_experts_cannot_share(layer: Layer, experts: int, each: str) -> None:
    with refusal(FormatError, "128", f"{experts} experts", each, "16"):
        layer.weight.linear_grouped(torch.randn(2, K), int32([0] * experts))


def test_wrong_shapes_and_dtypes(layer: Layer) -> None:
    weight, counts, x = layer.weight, int32([1, 1, 1, 1]), torch.randn(4, K)
    with refusal(FormatError, "[4, 95]", K):
        weight.linear_grouped(x[:, :95], counts)
    for wrong in (x[0], x[None]):
        with refusal(FormatError, list(wrong.shape), f"[rows, {K}]"):
            weight.linear_grouped(wrong, counts)
    with refusal(UnsupportedError, "torch.float64"):
        weight.linear_grouped(x.double(), counts)
    with refusal(FormatError, "torch.int64", "torch.int32"):
        weight.linear_grouped(x, counts.long())
    for wrong in (counts[:0], counts[0], counts[None]):
        with refusal(FormatError, list(wrong.shape), "[experts]"):
            weight.linear_grouped(x, wrong)
    with refusal(FormatError, "counts", "meta", "cpu"):
        weight.linear_grouped(x, counts.to("meta"))


def test_gradients_are_refused_before_the_product(layer: Layer) -> None:
    x, counts = torch.randn(4, K, requires_grad=True), int32([1, 1, 1, 1])
    with refusal(UnsupportedError, "[4, 96]", "gradient", "4 experts"):
        layer.weight.linear_grouped(x, counts)
    with torch.no_grad():
        assert_near(layer.weight.linear_grouped(x, counts), expected(x, [1] * 4, layer.dense))
    with forward_ad.dual_level(), refusal(UnsupportedError, "Forward-mode"):
        layer.weight.linear_grouped(forward_ad.make_dual(x.detach(), torch.ones_like(x)), counts)


# --- as torch sees it -------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", [1, EXPERTS])
def test_opcheck(tables: int) -> None:
    weight = operands(stacked(SPEC, tables=tables).weight)
    torch.library.opcheck(OP, (torch.randn(7, K), int32([2, 0, 4, 0]), *weight))


def test_fake_tensors_give_what_real_ones_give(layer: Layer) -> None:
    wide, counts, weight = torch.randn(K, 9), int32([2, 0, 3, 4]), operands(layer.weight)
    real = qgemm_grouped(wide.T, counts, *weight)
    with FakeTensorMode() as mode:
        made = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in (wide, counts, *weight)]
        fake = qgemm_grouped(made[0].T, *made[1:])
        with refusal(FormatError, "3 experts"):
            qgemm_grouped(made[0].T, made[1][:3], *made[2:])
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_serves_every_batch(backend: str) -> None:
    torch._dynamo.reset()
    layer = stacked(QuantSpec(bits=4, group_size=32, hadamard=32), tables=2 * EXPERTS)
    weight = layer.weight

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def compiled(x: Tensor, expert: Tensor) -> Tensor:
        order = expert.argsort(stable=True)
        counts = (expert[:, None] == torch.arange(EXPERTS)).sum(0, dtype=torch.int32)
        return weight.linear_grouped(x[order], counts)[order.argsort()]

    for rows in (2, 9, 40):
        x, expert = torch.randn(rows, K), torch.randint(0, EXPERTS, (rows,))
        dense = layer.dense.unflatten(0, (EXPERTS, N))[expert].double()
        turned = rotated(x, layer.stored.signs(), 32)
        assert_near(compiled(x, expert), torch.einsum("mk,mnk->mn", turned, dense))


# --- where no fused kernel serves a GPU's problem ---------------------------------------------------


def by_tiles(layer: Layer, x: Tensor, counts: list[int]) -> Tensor:
    """:func:`multiply_grouped`, which knows no device, with parts of the weight from the CPU's kernels."""
    dense = dequantize(*operands(layer.weight), x.dtype)

    def part_of_weight(part: Tensor, first: int) -> None:
        assert first % 16 == 0
        part.copy_(dense[first : first + len(part)])

    out = x.new_full((len(x), len(dense) // len(counts)), float("nan"))
    multiply_grouped(x, int32(counts), out, part_of_weight)
    return out


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("rest", [0, 1, 6])
def test_tiles_hold_whoever_has_the_rows(layer: Layer, counts: list[int], rest: int) -> None:
    x = torch.randn(max(1, sum(counts) + rest), K)
    x[sum(counts) :] = float("nan")
    assert_near(by_tiles(layer, x, counts), expected(x, counts, layer.dense))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 33, 400, 1300])
def test_there_are_tiles_enough(rows: int) -> None:
    layer = stacked(SPEC, n=16, experts=8)
    for _ in range(20):
        borders = sorted(torch.randint(0, rows + 1, (8,)).tolist())
        counts = [b - a for a, b in zip([0, *borders], borders, strict=False)]
        x = torch.randn(rows, K)
        assert_near(by_tiles(layer, x, counts), expected(x, counts, layer.dense))


def test_parts_of_the_weight_join(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flute_kernels.cuda.grouped._CHUNK_BYTES", 1)
    layer = stacked(SPEC, n=80, experts=3)
    x = torch.randn(20, K)
    assert_near(by_tiles(layer, x, [4, 0, 15]), expected(x, [4, 0, 15], layer.dense))


@pytest.mark.parametrize("counts", [[9, 0, -3, 2], [50, 50, 50, 50], [-(2**31)] * 4, [2**31 - 1] * 4])
def test_counts_that_lie_read_nothing_beyond_x(layer: Layer, counts: list[int]) -> None:
    """An index beyond a tensor would raise."""
    assert by_tiles(layer, torch.randn(20, K), counts).isfinite().all()


# --- on a GPU ---------------------------------------------------------------------------------------


def on_gpu(layer: Layer) -> LutWeight:
    return LutWeight.from_linear(layer.stored, "cuda")


# Rows of an expert: too few for a block of the sm90 room, and enough for several.
FEW, MANY = 48, 336


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:x is float32")
class TestOnGpu:
    @pytest.mark.parametrize("block", range(BLOCKS), ids="{:02}".format)
    def test_random_mixtures(self, poisoned: None, block: int) -> None:
        """Bits, groups, vectors, tables, dtypes, shapes, and who has how many rows, drawn at random."""
        cases = [Mixture(seed) for seed in range(100 * block, 100 * (block + 1))]
        failures = [(error, c) for c in cases if not (error := c.error()) <= TOLERANCE[c.dtype]]
        assert not failures, f"{len(failures)} of {len(cases)}: {failures[:5]}"

    @pytest.mark.parametrize("n", [64, 384])
    @pytest.mark.parametrize("tables", [1, EXPERTS, 2 * EXPERTS], ids="{} tables".format)
    @pytest.mark.parametrize("group_size", GROUP_SIZES)
    @pytest.mark.parametrize(("bits", "vector_size"), BITS_AND_VECTORS)
    def test_every_spec(self, bits: int, vector_size: int, group_size: int, tables: int, n: int) -> None:
        spec = QuantSpec(bits=bits, group_size=group_size, vector_size=vector_size)
        layer = stacked(spec, n=n, k=256, tables=tables)
        counts = [2, 0, 19, 7]
        for dtype in DTYPES:
            x = torch.randn(sum(counts), 256).to(dtype)
            out = on_gpu(layer).linear_grouped(x.cuda(), int32(counts).cuda())
            assert out.dtype == dtype
            assert_near(out.cpu(), expected(x, counts, layer.dense))

    @pytest.mark.parametrize("n", [FEW, MANY])
    @pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
    @pytest.mark.parametrize("rest", [0, 6])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_representative_counts(
        self, counts: list[int], rest: int, dtype: torch.dtype, n: int, poisoned: None
    ) -> None:
        layer = stacked(QuantSpec(bits=4, group_size=64), n=n, k=320, tables=EXPERTS)
        x = torch.randn(sum(counts) + rest, 320).to(dtype)
        x[sum(counts) :] = float("nan")
        out = on_gpu(layer).linear_grouped(x.cuda(), int32(counts).cuda()).cpu()
        assert_near(out, expected(x, counts, layer.dense))
        assert (out[sum(counts) :] == 0).all()

    @pytest.mark.parametrize(("experts", "rows"), [(8, 16), (8, 3000), (64, 500), (128, 64)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sizes_of_real_models(self, experts: int, rows: int, dtype: torch.dtype) -> None:
        layer = stacked(QuantSpec(bits=4, group_size=128), n=512, k=1024, experts=experts, tables=experts)
        borders = sorted(torch.randint(0, rows + 1, (experts - 1,)).tolist())
        counts = [b - a for a, b in zip([0, *borders], [*borders, rows], strict=True)]
        x = torch.randn(rows, 1024).to(dtype)
        out = on_gpu(layer).linear_grouped(x.cuda(), int32(counts).cuda())
        assert_near(out.cpu(), expected(x, counts, layer.dense))
        assert torch.equal(out, on_gpu(layer).linear_grouped(x.cuda(), int32(counts).cuda()))

    @pytest.mark.parametrize("n", [FEW, MANY])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_host_waits_for_nothing_and_a_graph_takes_other_counts(
        self, dtype: torch.dtype, n: int
    ) -> None:
        layer = stacked(QuantSpec(bits=4, group_size=64), n=n, k=320, tables=EXPERTS)
        weight, x = on_gpu(layer), torch.randn(40, 320).to(dtype)
        given, counts = x.cuda(), int32([10, 10, 10, 10]).cuda()
        weight.linear_grouped(given, counts)  # what happens once has happened
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = weight.linear_grouped(given, counts)
        for other in ([40, 0, 0, 0], [1, 2, 3, 4], [0, 20, 0, 20]):
            counts.copy_(int32(other))
            graph.replay()
            assert_near(out.cpu(), expected(x, other, layer.dense))

    @pytest.mark.parametrize("counts", [[9, 0, -3, 2], [50, 50, 50, 50], [-(2**31)] * 4, [2**31 - 1] * 4])
    @pytest.mark.parametrize("n", [FEW, MANY])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_counts_that_lie_end_nothing(self, counts: list[int], dtype: torch.dtype, n: int) -> None:
        weight = on_gpu(stacked(QuantSpec(bits=4, group_size=64), n=n, k=320))
        weight.linear_grouped(torch.randn(20, 320).to(dtype).cuda(), int32(counts).cuda())
        torch.cuda.synchronize()

    def test_rotation_no_rows_and_opcheck(self) -> None:
        layer = stacked(QuantSpec(bits=4, group_size=32, hadamard=32, hadamard_seed=3), tables=EXPERTS)
        weight, counts, x = on_gpu(layer), [3, 0, 2, 5], torch.randn(12, K)
        out = weight.linear_grouped(x.cuda(), int32(counts).cuda())
        turned = rotated(x, layer.stored.signs(), 32)
        assert_near(out.cpu(), expected(turned, counts, layer.dense))
        nothing = weight.linear_grouped(x[:0].cuda(), int32([0] * EXPERTS).cuda())
        assert nothing.shape == (0, N)
        torch.library.opcheck(OP, (x.half().cuda(), int32(counts).cuda(), *operands(weight)))
