"""How far one language model is from another on a text: windows of tokens, and distances of predictions."""

from flute_quant.evaluation.distance import Distance, DistanceMeter
from flute_quant.evaluation.windows import (
    BOS_POLICIES,
    TokenizedText,
    Windows,
    load_tokenizer,
    text_windows,
    tokenized,
)

__all__ = [
    "BOS_POLICIES",
    "Distance",
    "DistanceMeter",
    "TokenizedText",
    "Windows",
    "load_tokenizer",
    "text_windows",
    "tokenized",
]
