"""Checkpoints that others quantized, turned into FLUTE checkpoints without quantizing anew."""

from flute_quant.importers.registry import importer_names, importers
from flute_quant.importers.run import ImportReport, import_checkpoint

__all__ = ["ImportReport", "import_checkpoint", "importer_names", "importers"]
