"""A table that the user brings, from a list, a tensor or a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flute_kernels import QuantSpec
from flute_quant.errors import QuantizationError

__all__ = ["check_table", "load_table", "table_values"]

# 256 pairs written out with 17 digits are 11 kB; a file beyond this is something else.
_MAX_JSON = 1 << 20


def check_table(table: Any, spec: QuantSpec) -> Tensor:
    """A user's table as float32: ``[2**bits]`` scalars, or ``[2**(2 * bits), 2]`` pairs.

    With ``vector_size`` 2 a scalar table is taken too; its Cartesian square is stored.

    Raises:
        QuantizationError: not numbers, of another shape, not finite, or all zero.
    """
    values = table_values(table)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    scalar, pairs = (1 << spec.bits,), (1 << 2 * spec.bits, 2)
    allowed = [scalar, pairs] if spec.vector_size == 2 else [scalar]
    if tuple(values.shape) not in allowed:
        wanted = " or ".join(str(list(shape)) for shape in allowed)
        raise QuantizationError(
            f"The table has shape {list(values.shape)}; "
            f"{spec.bits} bits with vectors of {spec.vector_size} need {wanted}."
        )
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise QuantizationError(f"The table has {bad} of {values.numel()} values that are NaN or infinite.")
    if not bool(values.any()):
        raise QuantizationError(
            f"All {values.numel()} values of the table are zero; no scale can fit weights."
        )
    return values


def table_values(table: Any) -> Tensor:
    """Numbers, nested lists of them or a tensor as a float32 tensor; QuantizationError for anything else."""
    try:
        return torch.as_tensor(table, dtype=torch.float32).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise QuantizationError(f"The table is not an array of numbers: {error}.") from None


def load_table(path: str | Path) -> Tensor:
    """Read a table: a ``.json`` file with a list of numbers or of pairs, or a one-tensor ``.safetensors``.

    Raises:
        QuantizationError: the file is neither, or not readable.
    """
    from flute_quant.checkpoint.safetensors_reader import SafetensorsFile
    from flute_quant.errors import CheckpointError

    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            file = SafetensorsFile(path)
            if len(file.tensors) != 1:
                raise QuantizationError(f"{path} holds {len(file.tensors)} tensors; a table file holds one.")
            return file.read(next(iter(file.tensors))).to(torch.float32)
        if path.suffix != ".json":
            raise QuantizationError(f"{path} is neither a .json nor a .safetensors file.")
        size = path.stat().st_size
        if size > _MAX_JSON:
            raise QuantizationError(f"{path} has {size} bytes; a table file has at most {_MAX_JSON}.")
        values = json.loads(path.read_text(encoding="utf-8"))
        return torch.as_tensor(values, dtype=torch.float32)
    except (OSError, CheckpointError) as error:
        raise QuantizationError(f"The table cannot be read: {error}") from None
    except (ValueError, TypeError, RuntimeError, RecursionError) as error:
        if isinstance(error, QuantizationError):
            raise
        raise QuantizationError(f"{path} is not an array of numbers: {error}.") from None
