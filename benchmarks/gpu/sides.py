"""FLUTE, torch and the peers, each as a call on one problem.

A side is a function of a :class:`Problem` that returns a :class:`Side`, or raises :class:`Absent` with the
reason where the package is not installed or does not serve the problem. The peers' calls follow vLLM 0.26
and later, humming-kernels 0.1 and bitsandbytes 0.50; a newer interface fails in its own row alone.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from problem import NF4, Problem
from torch import Tensor

from flute_kernels import _C
from flute_kernels.cuda import kernels

__all__ = ["SIDES", "Absent", "Side"]

_FEW_ROWS, _ROWS_OF_AMPERE, _MANY_ROWS = 64, 1024, 512
"""Rows up to which a side that takes long tells anything, one by one or with Ampere's instructions; and those
from which on it may pay to dequantize a weight."""


class Absent(Exception):
    """Why a side takes no part."""


@dataclass
class Side:
    """A way to multiply.

    Attributes:
        call: ``call(i, x)`` multiplies with copy ``i`` of the weight and returns ``[M, N]``.
        copies: of the weight.
        weight: float32 ``[N, K]`` that the results are checked against.
        most_rows: of x; more are not offered.
        fewest_rows: nor are fewer than these.
    """

    call: Callable[[int, Tensor], Tensor]
    copies: int
    weight: Tensor
    most_rows: int = 1 << 30
    fewest_rows: int = 0


def torch_mm(p: Problem) -> Side:
    """16-bit weights."""
    weights = _clones(p.uniform.to(p.dtype), p.copies(p.n * p.k * 2))
    return Side(lambda i, x: torch.mm(x, weights[i].t()), len(weights), p.uniform)


def flute(p: Problem) -> Side:
    """This project, as a chain of calls that may start early (programmatic dependent launch)."""
    weights = [p.flute() for _ in range(p.copies())]

    def call(i: int, x: Tensor) -> Tensor:
        return weights[i].linear(x)

    return Side(call, len(weights), p.looked_up)


def flute_one_by_one(p: Problem) -> Side:
    """This project, each call waiting for the one before."""
    side = flute(p)

    def call(i: int, x: Tensor) -> Tensor:
        _C.launch_early(False)
        try:
            return side.call(i, x)
        finally:
            _C.launch_early(True)

    return Side(call, side.copies, side.weight, _FEW_ROWS)


def flute_dequantized(p: Problem) -> Side:
    """This project's way where no kernel serves: the weight dequantized part by part, torch's product."""
    weights = [p.flute().packed for _ in range(p.copies())]

    def call(i: int, x: Tensor) -> Tensor:
        out = x.new_empty(len(x), p.n)
        kernels.multiply_dequantized(kernels.weight_handle(weights[i]), x, weights[i], None, out)
        return out

    return Side(call, len(weights), p.looked_up, fewest_rows=_MANY_ROWS)


def marlin(p: Problem) -> Side:
    """vLLM's int4 kernel for Ampere."""
    ops, uint4b8 = _vllm(p)
    # Until 0.32, rows of the weight could be in another order: which, is an operand more here and two below.
    orders = "perm" in {a.name for a in ops.gptq_marlin_repack.default._schema.arguments}
    as_they_are = torch.empty(0, dtype=torch.int32, device="cuda")
    packed = ops.gptq_marlin_repack(_along_k(p.codes), *[as_they_are] * orders, p.k, p.n, 4, False)
    order = [i + 8 * j for i in range(8) for j in range(8)]
    scales = p.scales.t().contiguous().reshape(-1, 64)[:, order].reshape(-1, p.n).contiguous()
    weights = list(zip(_clones(packed, p.copies()), _clones(scales, p.copies()), strict=True))
    locks = torch.zeros(
        torch.cuda.get_device_properties(0).multi_processor_count * 4, dtype=torch.int32, device="cuda"
    )

    def call(i: int, x: Tensor) -> Tensor:
        codes, s = weights[i]
        head = (x, None, codes, None, s, None, None, None, *[None, None] * orders)
        tail = (len(x), p.n, p.k, *[True] * orders, False, True, False)
        out: Tensor = ops.marlin_gemm(*head, locks, uint4b8, *tail)
        return out

    return Side(call, len(weights), p.uniform, _ROWS_OF_AMPERE)


def machete(p: Problem) -> Side:
    """vLLM's int4 kernel for Hopper."""
    ops, uint4b8 = _vllm(p)
    columns = _along_k(p.codes).t().contiguous().t()
    packed, scales = ops.machete_prepack_B(columns, p.dtype, uint4b8, p.dtype), p.scales.t().contiguous()
    weights = list(zip(_clones(packed, p.copies()), _clones(scales, p.copies()), strict=True))

    def call(i: int, x: Tensor) -> Tensor:
        codes, s = weights[i]
        out: Tensor = ops.machete_mm(x, codes, uint4b8, None, s, None, p.group_size, None, None, None)
        return out

    return Side(call, len(weights), p.uniform)


def humming(p: Problem) -> Side:
    """humming-kernels: uniform integers of any width, compiled for the shape when first called."""
    layers, forward = _import("humming.layer"), _import("humming.forward")
    tune = _import("humming.tune")
    shape = {"shape_n": p.n, "shape_k": p.k, "torch_dtype": p.dtype}
    codes_are = {"dtype": f"uint{p.bits}", "group_size": p.group_size}
    layer = layers.HummingLayer(weight_config=codes_are, **shape).to("cuda")
    layer.load_from_unquantized(p.uniform.to(p.dtype))
    parts = {name: getattr(layer, name).data.clone() for name in ("weight", "weight_scale")}
    dense = layer.weight_schema.dequant_tensors(parts).float()
    layer.transform()
    scales = _clones(layer.weight_scale.data, p.copies())
    weights = list(zip(_clones(layer.weight.data, p.copies()), scales, strict=True))
    rest = {"zero_point": getattr(layer, "zero_point", None), "locks": layer.locks}
    config, tuned = layer.humming_config, dict[int, str]()

    def call(i: int, x: Tensor) -> Tensor:
        if len(x) not in tuned:
            tuned[len(x)] = json.dumps(tune.get_heuristics_config(config, shape_m=len(x)))
        codes, s = weights[i]
        operands = {"inputs": x, "weight": codes, "weight_scale": s, "tuning_config": tuned[len(x)]}
        out: Tensor = forward.humming_forward(config, **operands, **rest)
        return out

    return Side(call, len(weights), dense)


def bitsandbytes(p: Problem) -> Side:
    """NF4 tables: the only peer beside upstream FLUTE that holds one."""
    _import("bitsandbytes")
    if p.bits != 4:
        raise Absent("it has 4 bits alone")
    packed = ((p.codes[:, 0::2] << 4) | p.codes[:, 1::2]).contiguous().view(-1, 1)
    absmax = p.scales.float().contiguous().view(-1)
    weights = list(zip(_clones(packed, p.copies()), _clones(absmax, p.copies()), strict=True))
    op = torch.ops.bitsandbytes.gemm_4bit.default
    dense = p.scaled(torch.tensor(NF4, device="cuda")[p.codes.int()])

    def call(i: int, x: Tensor) -> Tensor:
        out: Tensor = op(x, weights[i][0], [p.n, p.k], weights[i][1], p.group_size, "nf4")
        return out

    return Side(call, len(weights), dense, _ROWS_OF_AMPERE)


def tinygemm(p: Problem) -> Side:
    """torch's own int4 kernel."""
    if p.bits != 4 or p.dtype != torch.bfloat16:
        raise Absent("it has 4 bits and bfloat16 alone")
    packed = ((p.codes[:, 0::2] << 4) | p.codes[:, 1::2]).contiguous()
    tiles = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
    scales = torch.stack([p.scales.t(), torch.zeros_like(p.scales.t())], -1).contiguous()
    weights = list(zip(_clones(tiles, p.copies()), _clones(scales, p.copies()), strict=True))
    op = torch.ops.aten._weight_int4pack_mm
    return Side(lambda i, x: op(x, weights[i][0], p.group_size, weights[i][1]), len(weights), p.uniform, 1024)


SIDES: dict[str, Callable[[Problem], Side]] = {
    "torch.mm": torch_mm,
    "FLUTE": flute,
    "FLUTE one by one": flute_one_by_one,
    "FLUTE dequantized": flute_dequantized,
    "Marlin": marlin,
    "Machete": machete,
    "humming": humming,
    "bitsandbytes": bitsandbytes,
    "tinygemm": tinygemm,
}


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(str(error)) from error


def _vllm(p: Problem) -> tuple[Any, int]:
    """vLLM's compiled operators, and its number for 4-bit integers that stand for their value minus 8."""
    if p.bits != 4:
        raise Absent("it has 4 and 8 bits alone")
    _import("vllm._C_stable_libtorch")
    return torch.ops._C, 1125899907892224


def _clones(tensor: Tensor, count: int) -> list[Tensor]:
    """Copies in the same strides, which some layouts live in."""
    empty = [
        torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
        for _ in range(count)
    ]
    return [copy.copy_(tensor) for copy in empty]


def _along_k(codes: Tensor) -> Tensor:
    """int32 ``[K/8, N]``: eight codes of a row in a word, the first one lowest, as GPTQ stores them."""
    nibbles = codes.t().reshape(codes.shape[1] // 8, 8, codes.shape[0]).to(torch.int32)
    words = torch.zeros(len(nibbles), codes.shape[0], dtype=torch.int32, device=codes.device)
    for j in range(8):
        words |= nibbles[:, j] << (4 * j)
    return words
