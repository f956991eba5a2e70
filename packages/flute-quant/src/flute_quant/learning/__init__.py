"""Learning the scales of a quantized model by gradient descent on the whole of it."""

from flute_quant.learning.scales import learn_scales

__all__ = ["learn_scales"]
