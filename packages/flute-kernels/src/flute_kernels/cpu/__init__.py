"""CPU tensors: the weight layout, its memory, and the operators."""
