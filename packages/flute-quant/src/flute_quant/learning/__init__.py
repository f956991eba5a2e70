"""Learning the numbers of a quantized model by gradient descent, on one layer or on the whole model."""

from flute_quant.learning.scales import learn_scales

__all__ = ["learn_scales"]
