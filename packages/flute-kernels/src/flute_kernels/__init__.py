"""Weight format and matrix-multiplication kernels for lookup-table-quantized language models."""

from flute_kernels.errors import FluteError, FormatError, UnsupportedError
from flute_kernels.format import QuantizationConfig, QuantizedLinear, QuantSpec, pack_codes, unpack_codes

__all__ = [
    "FluteError",
    "FormatError",
    "QuantSpec",
    "QuantizationConfig",
    "QuantizedLinear",
    "UnsupportedError",
    "pack_codes",
    "unpack_codes",
]
