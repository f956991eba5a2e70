"""The command ``flute-quant``."""

from flute_quant.cli.main import main

__all__ = ["main"]
