"""CUDA tensors: the weight layout and the operators."""
