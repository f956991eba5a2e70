"""Checkpoints of Transformers with bitsandbytes' 4-bit weights: NF4 and FP4.

The weight is one flat run of codes, two in a byte, the first in the high half; every ``blocksize`` codes
share an absolute maximum, so a block may hold parts of two rows. With double quantization the maxima are
bytes themselves: ``quant_map[byte] * nested_absmax[i // nested_blocksize] + nested_offset`` in float32.

Source: ``QuantState.as_dict`` and ``dequantize_4bit`` of github.com/bitsandbytes-foundation/bitsandbytes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flute_kernels import QuantizedLinear
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.errors import CheckpointError, QuantizationError
from flute_quant.importers.base import Candidate, Imported, Importer, Source, SourceLinear, checked_spec
from flute_quant.importers.folder import folder_source, require_tensors, stems
from flute_quant.importers.scales import FittedScales, fit_scales, group_for, rounding_error

__all__ = ["IMPORTER"]

_STATE = ".weight.quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")
_MAX_STATE = 1 << 16


def _open(found: Candidate) -> Source:
    folder = CheckpointFolder.open(found.path)
    if found.quantization.get("load_in_8bit") or found.quantization.get("_load_in_8bit"):
        raise QuantizationError(
            f"{folder.path} has bitsandbytes' 8-bit weights; supported are its 4-bit ones, NF4 and FP4."
        )
    linears = {}
    for kind in _TYPES:
        for module in stems(folder, _STATE + kind):
            linears[f"{module}.weight"] = _linear(folder, module, kind)
    # "NAME.weight" itself, and the tensors "NAME.weight.absmax" and so on that belong to it.
    consumed = [t for t in folder.location if f"{t.partition('.weight')[0]}.weight" in linears]
    return folder_source(folder, linears, consumed)


def _linear(folder: CheckpointFolder, module: str, kind: str) -> SourceLinear:
    prefix = f"{module}.weight"
    state = _state(folder, module, kind)
    n, k = state["shape"]
    block = state["blocksize"]
    require_tensors(folder, {f"{prefix}.quant_map": ("F32",), f"{prefix}.absmax": ("F32", "U8")})
    if prefix not in folder.location:
        raise CheckpointError(f"{folder.path} lacks {prefix}, whose state it has.")
    packed = folder.tensor(prefix)
    if packed.nbytes * 2 != n * k:
        raise CheckpointError(
            f"{prefix} has {packed.nbytes} bytes; {n} x {k} codes of 4 bits take {n * k // 2}."
        )
    expected = {f"{prefix}.quant_map": 16, f"{prefix}.absmax": -(-n * k // block)}
    for tensor, count in expected.items():
        if folder.tensor(tensor).numel != count:
            raise CheckpointError(
                f"{tensor} has {folder.tensor(tensor).numel} values; expected {count} for {n} x {k} weights "
                f"in blocks of {block}."
            )
    group = group_for(block, k, prefix)
    spec = checked_spec(prefix, n, k, bits=4, group_size=group)
    fitted = _fitted(folder, module, state)
    kind_of = "double-quantized" if "nested_blocksize" in state else "32-bit"
    note = None if fitted.exact else f"{kind_of} scales rounded to float16"
    return SourceLinear(
        module, n, k, spec, fitted.scales.dtype, torch.float32, partial(_read, folder, module, kind), note
    )


def _read(folder: CheckpointFolder, module: str, kind: str) -> Imported:
    prefix = f"{module}.weight"
    state = _state(folder, module, kind)
    n, k = state["shape"]
    spec = checked_spec(prefix, n, k, bits=4, group_size=group_for(state["blocksize"], k, prefix))
    packed = folder.read(prefix).reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], 1).view(n, k)
    # The block that each of our groups lies in; blocks are counted along the flat weight.
    size = spec.group_size_for(k)
    block_of = torch.arange(n * k // size) * size // state["blocksize"]
    fitted = _fitted(folder, module, state)
    fitted = replace(fitted, scales=fitted.scales[block_of].view(n, k // size))
    table = folder.read(f"{prefix}.quant_map").reshape(-1)
    stored = (table.double() * fitted.factor).to(torch.float32)
    linear = QuantizedLinear.from_codes(codes, fitted.scales, stored, spec)
    if fitted.exact:
        return Imported(linear)
    wanted = _absmax(folder, module, state)[block_of].view(n, k // size)
    return Imported(linear, rounding_error(fitted, wanted, codes, table))


def _fitted(folder: CheckpointFolder, module: str, state: dict[str, Any]) -> FittedScales:
    return fit_scales(_absmax(folder, module, state), f"{module}.weight.absmax")


def _absmax(folder: CheckpointFolder, module: str, state: dict[str, Any]) -> Tensor:
    """Absolute maxima of the blocks, float32, as bitsandbytes computes them."""
    prefix = f"{module}.weight"
    stored = folder.read(f"{prefix}.absmax").reshape(-1)
    if "nested_blocksize" not in state:
        require_tensors(folder, {f"{prefix}.absmax": ("F32",)})
        return stored
    require_tensors(folder, {f"{prefix}.nested_absmax": ("F32",), f"{prefix}.nested_quant_map": ("F32",)})
    table = folder.read(f"{prefix}.nested_quant_map").reshape(-1)
    nested = folder.read(f"{prefix}.nested_absmax").reshape(-1)
    block = state["nested_blocksize"]
    count = -(-len(stored) // block)
    if table.numel() != 256 or nested.numel() != count or stored.dtype != torch.uint8:
        raise CheckpointError(
            f"{prefix} has {len(stored)} maxima as {stored.dtype}, {nested.numel()} nested ones and a table "
            f"of {table.numel()}; expected uint8, {count} and 256."
        )
    # Two roundings in float32, the product and then the sum: this order is part of the format.
    maxima: Tensor = table[stored.long()] * nested[torch.arange(len(stored)) // block]
    return maxima + float(state["nested_offset"])


def _state(folder: CheckpointFolder, module: str, kind: str) -> dict[str, Any]:
    """The JSON that bitsandbytes stores as bytes in a tensor, checked."""
    name = f"{module}{_STATE}{kind}"
    stored = folder.tensor(name)
    if stored.nbytes > _MAX_STATE:
        raise CheckpointError(f"{name} has {stored.nbytes} bytes; expected at most {_MAX_STATE}.")
    try:
        state = json.loads(folder.read(name).reshape(-1).view(torch.uint8).numpy().tobytes())
        shape, block = state["shape"], state["blocksize"]
        numbers = [*shape, block]
        if "nested_blocksize" in state:
            numbers.append(state["nested_blocksize"])
            state["nested_offset"] = float(state["nested_offset"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{name} is not the state of a 4-bit weight: {error!r}.") from None
    if len(shape) != 2 or not all(isinstance(v, int) and 0 < v < 1 << 40 for v in numbers):
        raise CheckpointError(
            f"{name} has shape {shape} and blocks {numbers[2:]}; expected [N, K], positive."
        )
    if state.get("quant_type", kind) != kind:
        raise CheckpointError(f"{name} says quant_type {state['quant_type']!r}; expected {kind!r}.")
    result: dict[str, Any] = state
    return result


IMPORTER = Importer(
    "bitsandbytes",
    "NF4 and FP4 weights of bitsandbytes, in a Transformers folder",
    lambda found: found.method == "bitsandbytes",
    _open,
)
