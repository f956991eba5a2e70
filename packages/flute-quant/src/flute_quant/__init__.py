"""Quantizes language-model checkpoints to lookup-table weights, without data or with a text.

Three entries for three situations: :func:`quantize_tensor` for one weight, :func:`quantize_model`
for a torch module in memory, :func:`quantize_checkpoint` for a folder on disk.
"""

from flute_quant.allocation import Allocation, allocate_checkpoint, allocate_model
from flute_quant.calibration.text import CalibrationText
from flute_quant.checkpoint.compare import Comparison, compare_checkpoints, load_dequantized
from flute_quant.checkpoint.harness import evaluate_checkpoint
from flute_quant.checkpoint.inspect import Inspection, LayerInfo, inspect_checkpoint
from flute_quant.checkpoint.layout import CheckpointPlan, Coverage
from flute_quant.checkpoint.output import Progress
from flute_quant.checkpoint.quantize import (
    CheckpointReport,
    estimate_seconds,
    plan_checkpoint,
    quantize_checkpoint,
)
from flute_quant.codebooks import load_table
from flute_quant.errors import CheckpointError, QuantizationError
from flute_quant.importance import (
    IMPORTANCE_OPTIONS,
    column_importance,
    load_importance,
    random_token_importance,
)
from flute_quant.importers import ImportReport, import_checkpoint, importer_names
from flute_quant.learning import learn_scales
from flute_quant.methods import (
    Recipe,
    load_recipe,
    method_names,
    recipe_method,
    register_method,
    resolve_data_free_method,
    resolve_method,
    table_method,
)
from flute_quant.model import ModelReport, quantize_model
from flute_quant.patterns import Override
from flute_quant.plan import DEFAULT_IGNORE, PlannedLinear, QuantizationPlan, plan_modules
from flute_quant.tensor import ErrorStats, fit_spec, quantize_tensor

__all__ = [
    "DEFAULT_IGNORE",
    "IMPORTANCE_OPTIONS",
    "Allocation",
    "CalibrationText",
    "CheckpointError",
    "CheckpointPlan",
    "CheckpointReport",
    "Comparison",
    "Coverage",
    "ErrorStats",
    "ImportReport",
    "Inspection",
    "LayerInfo",
    "ModelReport",
    "Override",
    "PlannedLinear",
    "Progress",
    "QuantizationError",
    "QuantizationPlan",
    "Recipe",
    "allocate_checkpoint",
    "allocate_model",
    "column_importance",
    "compare_checkpoints",
    "estimate_seconds",
    "evaluate_checkpoint",
    "fit_spec",
    "import_checkpoint",
    "importer_names",
    "inspect_checkpoint",
    "learn_scales",
    "load_dequantized",
    "load_importance",
    "load_recipe",
    "load_table",
    "method_names",
    "plan_checkpoint",
    "plan_modules",
    "quantize_checkpoint",
    "quantize_model",
    "quantize_tensor",
    "random_token_importance",
    "recipe_method",
    "register_method",
    "resolve_data_free_method",
    "resolve_method",
    "table_method",
]
