"""Learning the numbers of a quantized model by gradient descent on the whole model's output."""

from flute_quant.learning.scales import learn_scales

__all__ = ["learn_scales"]
