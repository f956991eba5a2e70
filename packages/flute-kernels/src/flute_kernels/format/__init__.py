"""The weight format: what a checkpoint stores, independent of any kernel."""

from flute_kernels.format.bitstream import pack_codes, unpack_codes
from flute_kernels.format.config import FORMAT_VERSION, QUANT_METHOD, QuantizationConfig
from flute_kernels.format.linear import TENSOR_NAMES, QuantizedLinear
from flute_kernels.format.signs import hadamard_signs
from flute_kernels.format.spec import GROUP_SIZES, K_MULTIPLE, NO_SIGNS, PER_ROW, QuantSpec

__all__ = [
    "FORMAT_VERSION",
    "GROUP_SIZES",
    "K_MULTIPLE",
    "NO_SIGNS",
    "PER_ROW",
    "QUANT_METHOD",
    "TENSOR_NAMES",
    "QuantSpec",
    "QuantizationConfig",
    "QuantizedLinear",
    "hadamard_signs",
    "pack_codes",
    "unpack_codes",
]
