"""The choice of a GPU kernel, which is pure host code: any problem has a plan that covers it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flute_kernels import _C

A100 = (108, 164 * 1024)
H100 = (132, 228 * 1024)
RTX_4090 = (128, 100 * 1024)


def plan(
    n: int,
    k: int,
    m: int,
    *,
    bits: int = 4,
    tables: int = 1,
    gpu: tuple[int, int] = H100,
    experts: int = 0,
    group: int = 128,
) -> dict[str, int]:
    return _C.plan_sm80(n, k, bits, min(group, k), tables, m, *gpu, experts)


@given(
    n=st.integers(1, 40_000),
    k=st.integers(1, 900).map(lambda i: 32 * i),
    m=st.integers(1, 65_536),
    bits=st.sampled_from((2, 3, 4)),
    gpu=st.sampled_from((A100, H100, RTX_4090, (1, 100 * 1024))),
)
def test_every_row_and_column_has_a_block(n: int, k: int, m: int, bits: int, gpu: tuple[int, int]) -> None:
    p = plan(n, k, m, bits=bits, gpu=gpu)
    assert p["column_blocks"] * p["columns"] >= m
    assert p["row_blocks"] * p["tiles"] * p["warps_n"] * 16 >= n
    assert p["shared_bytes"] + 1024 <= gpu[1]  # a block's, beside what the system keeps of it


@given(tables=st.integers(1, 12), tiles=st.integers(1, 64), m=st.sampled_from((1, 8, 16, 64)))
def test_no_block_crosses_from_one_table_to_the_next(tables: int, tiles: int, m: int) -> None:
    p = plan(16 * tiles * tables, 4096, m, tables=tables)
    assert p["tiles"] <= tiles  # a warp's tiles fit, moved back where they would reach beyond
    assert p["row_blocks"] == tables * p["blocks_per_table"]
    assert p["blocks_per_table"] * p["tiles"] * p["warps_n"] >= tiles


def test_one_row_of_x_takes_narrow_tiles() -> None:
    assert {plan(n, 4096, m)["columns"] for n in (16, 4096, 28672) for m in (1, 8)} == {8}


def test_common_shapes_fill_the_gpu_in_one_wave() -> None:
    shapes = ((4096, 4096), (6144, 4096), (4096, 14336), (8192, 28672), (57344, 8192), (10240, 8192))
    for n, k in shapes:
        for m in (1, 8):
            p = plan(n, k, m)
            assert 100 <= p["row_blocks"] * p["column_blocks"] <= 132, (n, k, m, p)


def test_at_three_bits_groups_of_32_have_two_blocks_a_multiprocessor() -> None:
    blocks = {group: plan(28672, 4096, 16, bits=3, group=group)["row_blocks"] for group in (32, 128)}
    assert blocks == {32: 256, 128: 128}


@given(
    tiles=st.integers(1, 300),
    k=st.integers(1, 300).map(lambda i: 32 * i),
    m=st.integers(1, 4096),
    experts=st.integers(1, 200),
    bits=st.sampled_from((2, 3, 4)),
    gpu=st.sampled_from((A100, H100, RTX_4090)),
)
def test_mixtures_have_blocks_for_any_counts(
    tiles: int, k: int, m: int, experts: int, bits: int, gpu: tuple[int, int]
) -> None:
    p = plan(16 * tiles * experts, k, m, bits=bits, gpu=gpu, experts=experts)
    assert p["blocks_per_table"] * p["tiles"] * p["warps_n"] >= tiles  # of an expert
    most = min(experts, m)  # that have a row each, and one of them all others
    assert p["column_blocks"] > most + (m - most) // p["columns"]  # one more, for rows that are nobody's
    assert p["shared_bytes"] + 1024 <= gpu[1]


def test_small_mixtures_have_small_blocks() -> None:
    p = plan(128 * 2048, 768, 8, experts=128)
    assert p["warps_k"] * p["warps_n"] == 4  # so that two kernels' blocks fit a multiprocessor
    p = plan(8 * 4096, 14336, 2, experts=8)
    assert p["warps_k"] * p["warps_n"] == 8  # a large weight has more to gain from warps


# --- sm90 -------------------------------------------------------------------------------------------


def plan90(
    n: int, k: int, m: int, *, bits: int = 4, tables: int = 1, multiprocessors: int = 132, experts: int = 0
) -> dict[str, int]:
    return _C.plan_sm90(n, k, bits, min(128, k), tables, m, multiprocessors, experts)


@given(
    n=st.integers(128, 60_000),
    k=st.integers(1, 900).map(lambda i: 32 * i),
    m=st.integers(1, 4096),
    multiprocessors=st.integers(1, 132),
)
def test_hopper_every_row_and_column_has_a_block(n: int, k: int, m: int, multiprocessors: int) -> None:
    p = plan90(n, k, m, multiprocessors=multiprocessors)
    assert p["column_blocks"] * p["columns"] >= m
    assert p["groups"] * p["rows"] >= n
    assert 1 <= p["blocks"] <= multiprocessors  # all run at once
    sets = p["groups"] * p["column_blocks"]
    shared = max(0, sets - p["waves"] * p["blocks"])
    if p["parts"] > 1:
        assert p["blocks"] == sets * p["parts"]
        assert p["parts"] <= -(-k // 64)  # none is idle
    else:
        few = p["waves"] == 0 and shared < p["blocks"]
        assert shared == 0 or few or p["blocks"] < shared < 2 * p["blocks"]


@given(tables=st.integers(1, 12), tiles=st.integers(1, 64))
def test_hopper_groups_stay_within_their_table(tables: int, tiles: int) -> None:
    p = plan90(16 * tiles * tables, 4096, 64, tables=tables)
    if tiles < 8:
        assert p == {}  # a block takes 128 rows: the other room serves such tables
    else:
        assert p["rows"] <= 16 * tiles
        assert p["groups"] % tables == 0


def test_hopper_columns_hold_x_in_one_block_or_two() -> None:
    narrowest = {1: 16, 17: 32, 32: 32, 33: 48, 50: 64, 65: 96, 97: 128, 128: 128, 200: 256}
    for m, columns in narrowest.items():
        for n, k in ((4096, 4096), (6144, 4096), (57344, 8192)):
            assert columns // 2 <= plan90(n, k, m)["columns"] <= columns, (n, k, m)


def test_hopper_every_multiprocessor_has_work() -> None:
    for n, k in ((4096, 4096), (6144, 4096), (4096, 14336), (8192, 28672), (28672, 4096), (57344, 8192)):
        for m in (17, 64, 128, 512):
            assert 96 <= plan90(n, k, m)["blocks"] <= 132, (n, k, m)


def test_hopper_few_sets_have_several_blocks_each() -> None:
    p = plan90(4096, 4096, 64)
    assert (p["blocks"], p["parts"], p["cluster"]) == (128, 2, False)
    p = plan90(4096, 4096, 32)  # 32 clusters of three can be had at once, of four not
    assert (p["blocks"], p["parts"], p["cluster"]) == (96, 3, True)


def test_hopper_192_rows_suit_weights_that_128_do_not() -> None:
    p = plan90(6144, 4096, 512)  # 32 groups and 4 blocks of columns, where 48 and 2 would be 96 of 132
    assert (p["rows"], p["columns"], p["blocks"], p["waves"]) == (192, 128, 128, 1)


def test_hopper_nearly_as_many_sets_as_multiprocessors_are_shared_by_all() -> None:
    p = plan90(4096, 14336, 64)  # 32 sets, whose parts of a quarter would come in 128 blocks
    assert (p["blocks"], p["parts"], p["waves"]) == (132, 1, 0)


def test_hopper_many_sets_are_shared_so_that_all_blocks_end_together() -> None:
    p = plan90(57344, 8192, 64)
    assert (p["blocks"], p["parts"]) == (132, 1)
    assert p["waves"] == p["groups"] // 132 - 1  # the rest, between one and two sets a block, is divided


def test_hopper_nearly_full_waves_are_not_shared() -> None:
    p = plan90(4096, 4096, 2048)  # 256 sets of 256 columns are two waves of 132, but for eight
    assert (p["columns"], p["blocks"], p["waves"]) == (256, 132, 2)
    p = plan90(28672, 4096, 2048)  # 13.6 waves: the last 208 sets are divided
    assert (p["columns"], p["blocks"], p["waves"]) == (256, 132, 12)


def test_hopper_sixteen_columns_are_for_four_bits() -> None:
    assert plan90(57344, 8192, 16)["columns"] == 16
    assert plan90(57344, 8192, 16, bits=3)["columns"] == 32


def test_hopper_columns_suit_the_rows_of_an_expert() -> None:
    columns = {8: 32, 16: 32, 32: 64, 64: 128, 1024: 256}  # wide ones have loops for fewer columns
    for rows, expected in columns.items():
        assert plan90(128 * 1536, 2048, 128 * rows, experts=128)["columns"] == expected, rows


def test_hopper_workspace_stays_small() -> None:
    for n, k in ((4096, 4096), (28672, 4096), (57344, 8192), (8192, 28672)):
        for m in (17, 64, 128, 1024):
            p = plan90(n, k, m)
            assert p["workspace_bytes"] <= 17 << 20, (n, k, m, p)
