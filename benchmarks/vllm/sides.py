"""What is compared, and folders without weights from which vLLM makes random ones of a model's shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import served
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flute_kernels import QuantizationConfig, QuantSpec

__all__ = ["ENVIRONMENT", "GROUP_SIZE", "SIDES", "VLLM", "alone", "config", "make_folder"]

GROUP_SIZE = 128
SIDES = ("16-bit", "int4", "flute-4", "flute-3", "flute-2")
"""16-bit, vLLM's own 4-bit integers (on Hopper through Machete), and FLUTE with tables of 4, 3 and 2 bits.

All have a head of 16 bits; ``flute-4-head`` and so on quantize it, too, if it is not tied to the embedding.
"""
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
"""The command ``vllm``, also where it is not on the path."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
}


def alone(side: str, **environment: str) -> dict[str, Any]:
    """The figures that the program writes to ``--result`` when it is run again, for one ``--side``.

    Raises:
        CalledProcessError: it failed.
    """
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "result.json"
        command = [sys.executable, *sys.argv, "--side", side, "--result", str(result)]
        subprocess.run(command, env={**os.environ, **ENVIRONMENT, **environment}, check=True)
        figures: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return figures


def config(model: str, side: str) -> dict[str, Any]:
    """``config.json`` of a model of :data:`served.SERVED`, as a checkpoint of that side would have it."""
    made = served.config(model)
    if side == "int4":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
        weights["group_size"] = GROUP_SIZE
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        made["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
    elif side != "16-bit":
        _, bits, *head = side.split("-")
        spec = QuantSpec(bits=int(bits), group_size=GROUP_SIZE)
        left = () if head else ("lm_head",)
        made["quantization_config"] = QuantizationConfig(spec, left).to_dict()
    return made


def make_folder(folder: Path, model: str, side: str, tokenizer: bool = False) -> Path:
    """A folder for ``load_format="dummy"``, with a tokenizer of one word a token where it is asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    made = config(model, side)
    (folder / "config.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
    if tokenizer:
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(made["vocab_size"])}, unk_token="w2"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1", unk_token="w2")
        fast.save_pretrained(folder)
    return folder
