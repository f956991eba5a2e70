"""The methods by name. To add one: write it in a line here; to change the default: re-point ``ALIASES``."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from flute_kernels import QuantSpec
from flute_quant.codebooks import (
    check_table,
    float_table,
    int_table,
    lloyd_max_table,
    lloyd_pairs_table,
    normalfloat_table,
    signed_table,
    table_values,
)
from flute_quant.errors import QuantizationError
from flute_quant.methods.base import Method
from flute_quant.methods.calibrated import CalibratedMethod
from flute_quant.methods.recipe import Recipe
from flute_quant.methods.scales import AbsMax, Loss, Search
from flute_quant.methods.table_method import LearnedTable, TableMethod, TableSource

__all__ = [
    "ALIASES",
    "data_free_method",
    "method_names",
    "methods",
    "recipe_method",
    "register_method",
    "resolve_data_free_method",
    "resolve_method",
    "table_method",
]


def _lloyd_pairs(spec: QuantSpec) -> Any:
    if spec.vector_size != 2:
        raise QuantizationError(f"lloyd-pairs needs vectors of 2; vector_size is {spec.vector_size}.")
    return lloyd_pairs_table(spec.bits)


def _gaussian(spec: QuantSpec) -> Any:
    return lloyd_max_table(spec.bits) if spec.vector_size == 1 else lloyd_pairs_table(spec.bits)


def _scalar(make: Any) -> TableSource:
    def table(spec: QuantSpec) -> Any:
        return make(spec.bits)

    return table


_NORMALFLOAT = _scalar(normalfloat_table)
_LLOYD = _scalar(lloyd_max_table)

_SIGNED = TableMethod(
    "signed",
    "table for signed scales, errors weighted by the weight's magnitude and the inputs'",
    _scalar(signed_table),
    # 25 steps of 1/24 octave, the 22nd of which maps the largest weight exactly onto the +1. No
    # refit: it would trade the exact largest weight for squared error, which models do not like.
    Search(Loss(keep=0.5), candidates=25, span=(2 ** (-21 / 24), 2 ** (3 / 24)), refits=0, signed=True),
    wants_importance=True,
)

_NF = TableMethod("nf", "NormalFloat, scaled by the largest weight of a group", _NORMALFLOAT, AbsMax())

_PAIRS = TableMethod(
    "lloyd-pairs",
    "2-D Gaussian table of pairs (vector size 2), scale of least squared error",
    _lloyd_pairs,
    Search(),
)

_METHODS: dict[str, Method] = {}
for _method in (
    _SIGNED,
    _NF,
    TableMethod(
        "nf-search", "NormalFloat, signed scale of least squared error", _NORMALFLOAT, Search(signed=True)
    ),
    TableMethod(
        "nf-keep",
        "NormalFloat, signed scale, errors weighted by the weight's magnitude",
        _NORMALFLOAT,
        Search(Loss(keep=1.0), signed=True),
    ),
    TableMethod("lloyd", "Gaussian Lloyd-Max table, scale of least squared error", _LLOYD, Search()),
    _PAIRS,
    TableMethod(
        "higgs",
        "optimum for a Gaussian, scalars or pairs, for weights that --hadamard auto makes Gaussian",
        _gaussian,
        Search(),
    ),
    TableMethod(
        "learned",
        "a table fitted to each tensor, scale of least squared error",
        LearnedTable(_LLOYD),
        Search(),
    ),
    TableMethod(
        "int", "integers, signed scale of least squared error", _scalar(int_table), Search(signed=True)
    ),
    TableMethod(
        "fp", "e2m1 floats (e2m0 at 3 bits), scale of least squared error", _scalar(float_table), Search()
    ),
    CalibratedMethod("gptq", "error feedback (GPTQ) with the default's table", _SIGNED, _PAIRS),
    CalibratedMethod(
        "calibrated",
        "error feedback, then scales, table and codes by alternating least squares",
        _SIGNED,
        _PAIRS,
        Recipe(shrink=0.3, damping=0.1, rounds=2),
    ),
    CalibratedMethod(
        "blockwise",
        "codes and scales trained for the output of one layer at a time",
        _SIGNED,
        _PAIRS,
        Recipe(feedback=False, epochs=2),
    ),
    CalibratedMethod(
        "blockwise-pairs",
        "calibrated, then scales trained for the output of one layer at a time",
        _SIGNED,
        _PAIRS,
        Recipe(shrink=0.3, damping=0.1, rounds=2, epochs=2, reach=0),
    ),
    CalibratedMethod(
        "nfl",
        "NormalFloat, scales learned on the whole model, which is in memory",
        _NF,
        recipe=Recipe(start="nf", feedback=False, propagate=False, learn="kl"),
    ),
):
    _METHODS[_method.name] = _method

ALIASES = {"default": "signed"}
"""Names that stand for another; checkpoints record the name that they stood for."""

_ALIASES_OF_PAIRS = {"default": "lloyd-pairs", "blockwise": "blockwise-pairs"}


def methods() -> dict[str, Method]:
    """All methods by their own name."""
    return dict(_METHODS)


def method_names() -> list[str]:
    """What ``method=`` and ``--method`` take."""
    return [*ALIASES, *_METHODS]


def register_method(method: Method) -> None:
    """Add a method, or replace the one of the same name."""
    _METHODS[method.name] = method


def resolve_method(method: str | Method, spec: QuantSpec | None = None) -> Method:
    """A method by name or alias; a method itself is given back.

    Args:
        method: ``"default"`` is ``signed``, and ``lloyd-pairs`` where ``spec`` asks for vectors of 2;
            ``"blockwise"`` is ``blockwise-pairs`` there.
        spec: of the weights, or of most of them.

    Raises:
        QuantizationError: no method has that name.
    """
    if not isinstance(method, str):
        return method
    aliases = _ALIASES_OF_PAIRS if spec is not None and spec.vector_size == 2 else ALIASES
    name = aliases.get(method, method)
    if name not in _METHODS:
        raise QuantizationError(f"The method {method!r} is unknown; there are {', '.join(method_names())}.")
    return _METHODS[name]


def recipe_method(recipe: Recipe, *, name: str = "recipe") -> CalibratedMethod:
    """A calibrated method from a recipe (:func:`~flute_quant.methods.load_recipe` reads one from a file).

    Args:
        recipe: its steps.
        name: what the checkpoint's config calls it.

    Raises:
        QuantizationError: ``recipe.start`` is no data-free method with a table.
    """
    start = _METHODS.get(ALIASES.get(recipe.start, recipe.start))
    pairs = _PAIRS if recipe.start == "default" else None
    if not isinstance(start, TableMethod):
        known = [other for other, method in _METHODS.items() if isinstance(method, TableMethod)]
        raise QuantizationError(
            f"The recipe has start = {recipe.start!r}; "
            f"expected a data-free method, one of {', '.join(known)}."
        )
    return CalibratedMethod(name, "a recipe of the user", start, pairs, recipe)


def resolve_data_free_method(method: str | Method, spec: QuantSpec) -> Method:
    """Like :func:`resolve_method`, where there is no text: while a model loads.

    Raises:
        QuantizationError: no method has that name, or it needs a text.
    """
    chosen = resolve_method(method, spec)
    if isinstance(chosen, CalibratedMethod):
        raise QuantizationError(
            f"The method {chosen.name!r} needs a calibration text, which there is none of here; "
            "flute-quant quantize --calibration makes such a checkpoint."
        )
    return chosen


def data_free_method(method: Method, spec: QuantSpec) -> Method:
    """The method for a weight of which no inputs are known: what a calibrated one starts from, or itself."""
    return method.without_data(spec) if isinstance(method, CalibratedMethod) else method


def table_method(table: Any, *, scales: AbsMax | Search | None = None, name: str = "table") -> TableMethod:
    """A method from the user's own table (numbers, a tensor, or :func:`~flute_quant.codebooks.load_table`).

    Args:
        table: ``[2**bits]`` scalars or ``[2**(2 * bits), 2]`` pairs; kept as given, in float16 where
            that is exact and in float32 otherwise.
        scales: how scales are chosen, by default the search of least squared error.
        name: what the checkpoint's config calls it.

    Raises:
        QuantizationError: not numbers; or later, when it meets a spec that the table does not fit.
    """
    values = table_values(table)

    def source(spec: QuantSpec) -> Any:
        return check_table(values, spec)

    key = hashlib.sha256(json.dumps(values.tolist()).encode()).hexdigest()
    return TableMethod(name, "a table of the user", source, scales or Search(), exact=True, table_key=key)
