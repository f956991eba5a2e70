"""FLUTE's lookup-table-quantized models in vLLM.

The package is in the making: this version holds its place, so that the four packages are built and
versioned together. It registers nothing with vLLM yet.
"""
