"""What an error in each input channel of a linear module costs: measured, given, or guessed from weights.

A channel that carries large inputs passes an error of its weights on enlarged, so errors are weighted
by the mean square of the inputs. No text is needed to see which channels those are: tokens drawn at
random excite the same ones.
"""

from flute_quant.importance.channels import (
    IMPORTANCE_OPTIONS,
    ChannelImportance,
    ImportanceOption,
    column_importance,
    load_importance,
    planned_importance,
    resolve_importance,
)
from flute_quant.importance.meter import ChannelMeter
from flute_quant.importance.model import measured_importance, random_token_importance
from flute_quant.importance.tokens import NoPassError, run_random_tokens

__all__ = [
    "IMPORTANCE_OPTIONS",
    "ChannelImportance",
    "ChannelMeter",
    "ImportanceOption",
    "NoPassError",
    "column_importance",
    "load_importance",
    "measured_importance",
    "planned_importance",
    "random_token_importance",
    "resolve_importance",
    "run_random_tokens",
]
