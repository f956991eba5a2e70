"""How one linear layer's weight is quantized: the few numbers that fix every shape and every bit."""

from __future__ import annotations

from dataclasses import dataclass

from flute_kernels.errors import FormatError

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "K_MULTIPLE",
    "MAX_HADAMARD",
    "NO_SIGNS",
    "PER_ROW",
    "VECTOR_SIZES",
    "QuantSpec",
]

BITS = (2, 3, 4)
GROUP_SIZES = (32, 64, 128, 256)
VECTOR_SIZES = (1, 2)
PER_ROW = -1
"""``group_size`` that means one scale for a whole row."""
K_MULTIPLE = 32
"""K is a multiple of this, so that every row is a whole number of 32-bit words at every bit width."""
MAX_HADAMARD = 4096
NO_SIGNS = -1
"""``hadamard_seed`` of a rotation without random signs, such as that of HIGGS checkpoints."""


@dataclass(frozen=True)
class QuantSpec:
    """Bits, groups and tables of one quantized linear layer.

    Args:
        bits: bits per weight, 2, 3 or 4.
        group_size: neighbouring weights of a row that share a scale: 32, 64, 128, 256,
            or -1 for the whole row.
        vector_size: 1 for a scalar table, 2 for a table of pairs indexed by ``2 * bits`` bits.
        hadamard: 0, or the block size (a power of two dividing K) of the Hadamard rotation that
            is applied to the layer's input.
        hadamard_seed: seed of that rotation's random signs (64 bits, unsigned), or -1 for none.

    Raises:
        FormatError: a number is outside of what the format has.
    """

    bits: int = 4
    group_size: int = 64
    vector_size: int = 1
    hadamard: int = 0
    hadamard_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("bits", "group_size", "vector_size", "hadamard", "hadamard_seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise FormatError(f"{name} is {value!r}; expected an integer.")
        if self.bits not in BITS:
            raise FormatError(f"bits is {self.bits}; supported are {_either(BITS)}.")
        if self.group_size not in (*GROUP_SIZES, PER_ROW):
            raise FormatError(
                f"group_size is {self.group_size}; supported are {_either(GROUP_SIZES)}, "
                f"and {PER_ROW} for one scale a row."
            )
        if self.vector_size not in VECTOR_SIZES:
            raise FormatError(f"vector_size is {self.vector_size}; supported are {_either(VECTOR_SIZES)}.")
        h = self.hadamard
        if h != 0 and (h < 2 or h > MAX_HADAMARD or h & (h - 1)):
            raise FormatError(
                f"hadamard is {h}; supported are 0 (none) and powers of two from 2 to {MAX_HADAMARD}."
            )
        if self.hadamard_seed != NO_SIGNS and not 0 <= self.hadamard_seed < 1 << 64:
            raise FormatError(
                f"hadamard_seed is {self.hadamard_seed}; expected 0 <= seed < 2**64, "
                f"or {NO_SIGNS} for no signs."
            )

    @property
    def code_bits(self) -> int:
        """Bits of one code: it names one table entry, which holds ``vector_size`` weights."""
        return self.bits * self.vector_size

    @property
    def table_entries(self) -> int:
        """Entries of one lookup table, each of ``vector_size`` values."""
        return 1 << self.code_bits

    def group_size_for(self, in_features: int) -> int:
        """The number of weights that share a scale in rows of ``in_features`` weights."""
        return in_features if self.group_size == PER_ROW else self.group_size

    def check_in_features(self, in_features: int) -> None:
        """Raise FormatError unless rows of ``in_features`` weights can be stored under this spec."""
        if in_features <= 0 or in_features % K_MULTIPLE:
            raise FormatError(
                f"in_features is {in_features}; it must be a positive multiple of {K_MULTIPLE}."
            )
        group = self.group_size_for(in_features)
        if in_features % group:
            fits = [g for g in GROUP_SIZES if in_features % g == 0]
            raise FormatError(
                f"in_features is {in_features}, which group_size {group} does not divide; "
                f"{_either([*fits, PER_ROW])} would."
            )
        if self.hadamard and in_features % self.hadamard:
            raise FormatError(
                f"in_features is {in_features}, which the Hadamard block {self.hadamard} does not divide."
            )

    def shapes(self, out_features: int, in_features: int, tables: int = 1) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored tensors of a ``[out_features, in_features]`` weight with ``tables`` tables."""
        if out_features <= 0:
            raise FormatError(f"out_features is {out_features}; it must be positive.")
        self.check_in_features(in_features)
        return {
            "qweight": (out_features, in_features * self.bits // 32),
            "scales": (out_features, in_features // self.group_size_for(in_features)),
            "codebook": (tables, self.table_entries, self.vector_size),
        }

    def bits_per_weight(
        self, out_features: int, in_features: int, *, tables: int = 1, table_bits: int = 16
    ) -> float:
        """True storage per weight in bits: codes, 16-bit scales and tables."""
        shapes = self.shapes(out_features, in_features, tables)
        stored = 32 * _size(shapes["qweight"]) + 16 * _size(shapes["scales"])
        stored += table_bits * _size(shapes["codebook"])
        return stored / (out_features * in_features)


def _either(values: tuple[int, ...] | list[int]) -> str:
    words = [str(v) for v in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
