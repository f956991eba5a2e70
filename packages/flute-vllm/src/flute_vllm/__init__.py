"""FLUTE's lookup-table-quantized models in vLLM.

vLLM finds the package by its entry point: where it is installed, ``vllm serve`` knows the quantization method
``flute``, for checkpoints that are quantized already and for 16-bit ones, which it quantizes while they load.
"""

__all__ = ["register"]


def register() -> None:
    """Make the method known. vLLM calls this once in each of its processes."""
    import flute_vllm.config  # noqa: F401 - importing it registers it
