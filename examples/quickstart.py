"""The example of the top README: the lines between the two marks, word for word.

It reads a model's folder in the working directory, which this command makes::

    python examples/smollm2.py SmolLM2-135M-Instruct
"""
# ruff: noqa: F401 - importing flute_hf is all that it takes

# --- README begins
from transformers import AutoModelForCausalLM, AutoTokenizer

import flute_hf  # registers FLUTE with Transformers
from flute_kernels import QuantSpec
from flute_quant import quantize_checkpoint

quantize_checkpoint("SmolLM2-135M-Instruct", "SmolLM2-135M-4bit", QuantSpec(bits=4, group_size=64))

model = AutoModelForCausalLM.from_pretrained("SmolLM2-135M-4bit")
tokenizer = AutoTokenizer.from_pretrained("SmolLM2-135M-4bit")
prompt = tokenizer("The sky is blue because", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
# --- README ends
