"""Lookup tables: where the values that codes stand for come from."""

from flute_quant.codebooks.grids import float_table, int_table
from flute_quant.codebooks.lloyd_max import lloyd_max_table
from flute_quant.codebooks.lloyd_pairs import gaussian_pairs, lloyd_pairs_table
from flute_quant.codebooks.normalfloat import normalfloat_table
from flute_quant.codebooks.signed import signed_table
from flute_quant.codebooks.tables import cartesian_square, stored_table
from flute_quant.codebooks.user import check_table, load_table, table_values

__all__ = [
    "cartesian_square",
    "check_table",
    "float_table",
    "gaussian_pairs",
    "int_table",
    "lloyd_max_table",
    "lloyd_pairs_table",
    "load_table",
    "normalfloat_table",
    "signed_table",
    "stored_table",
    "table_values",
]
