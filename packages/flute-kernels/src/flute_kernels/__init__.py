"""Weight format and matrix-multiplication kernels for lookup-table-quantized language models."""

import torch  # noqa: F401 - brings the OpenMP runtime that the CPU kernels share

from flute_kernels.build_info import BuildInfo, build_info, check_environment
from flute_kernels.checks import ACTIVATION_DTYPES
from flute_kernels.errors import FluteError, FormatError, UnsupportedError
from flute_kernels.format import QuantizationConfig, QuantizedLinear, QuantSpec, pack_codes, unpack_codes
from flute_kernels.ops import dequantize, hadamard, qgemm, qgemm_grouped
from flute_kernels.weight import LutWeight

__all__ = [
    "ACTIVATION_DTYPES",
    "BuildInfo",
    "FluteError",
    "FormatError",
    "LutWeight",
    "QuantSpec",
    "QuantizationConfig",
    "QuantizedLinear",
    "UnsupportedError",
    "build_info",
    "dequantize",
    "hadamard",
    "pack_codes",
    "qgemm",
    "qgemm_grouped",
    "unpack_codes",
]

check_environment()
