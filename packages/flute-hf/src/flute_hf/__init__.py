"""FLUTE's lookup-table-quantized models in Hugging Face Transformers.

Importing this package is what lets Transformers load them::

    import flute_hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("model-4bit")
"""

from importlib.util import find_spec

from flute_hf.config import FluteConfig
from flute_hf.linear import FluteLinear
from flute_hf.prepare import prepare_model
from flute_hf.quantizer import FluteQuantizer

__all__ = ["FluteConfig", "FluteLinear", "FluteQuantizer", "prepare_model"]

if find_spec("peft") is not None:
    from flute_hf.adapters import register as _register_adapters

    _register_adapters()
