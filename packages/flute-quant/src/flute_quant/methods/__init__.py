"""Quantization methods: how codes, scales and tables are chosen for a weight."""

from flute_quant.methods.base import Encoded, InputMoments, Method, WeightRows
from flute_quant.methods.calibrated import CalibratedMethod
from flute_quant.methods.recipe import Recipe, load_recipe
from flute_quant.methods.registry import (
    ALIASES,
    data_free_method,
    method_names,
    methods,
    recipe_method,
    register_method,
    resolve_data_free_method,
    resolve_method,
    table_method,
)
from flute_quant.methods.scales import AbsMax, Loss, Search
from flute_quant.methods.table_method import LearnedTable, TableMethod

__all__ = [
    "ALIASES",
    "AbsMax",
    "CalibratedMethod",
    "Encoded",
    "InputMoments",
    "LearnedTable",
    "Loss",
    "Method",
    "Recipe",
    "Search",
    "TableMethod",
    "WeightRows",
    "data_free_method",
    "load_recipe",
    "method_names",
    "methods",
    "recipe_method",
    "register_method",
    "resolve_data_free_method",
    "resolve_method",
    "table_method",
]
