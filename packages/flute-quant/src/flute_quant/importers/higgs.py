"""HIGGS checkpoints of Transformers: recognised, and refused with the reason.

Their weights are rotated by a Hadamard transform of the input without signs; the format's rotation has
random ones, from a seed. No seed gives all plus, and undoing the rotation leaves no table.

Source: ``quantize_with_higgs`` in transformers/integrations/higgs.py.
"""

from __future__ import annotations

from flute_quant.errors import QuantizationError
from flute_quant.importers.base import Candidate, Importer, Source

__all__ = ["IMPORTER"]


def _open(found: Candidate) -> Source:
    size = found.quantization.get("hadamard_size", 512)
    raise QuantizationError(
        f"{found.path} is rotated by HIGGS in blocks of {size} without random signs; the rotation of FLUTE's "
        "format has signs from a seed, so its codes cannot be kept. Quantize the 16-bit checkpoint with "
        "flute-quant quantize --vector-size 2 --hadamard instead."
    )


IMPORTER = Importer(
    "higgs", "refused: their rotation has no signs", lambda found: found.method == "higgs", _open
)
