"""GGUF files: Transformers turns them into an ordinary checkpoint, which is then quantized as any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from flute_quant.checkpoint.source import INDEX_NAME, SINGLE_NAME
from flute_quant.checkpoint.structure import quiet_transformers
from flute_quant.errors import CheckpointError, one_line

__all__ = ["convert_gguf", "find_gguf"]


def find_gguf(src: Path) -> Path | None:
    """The GGUF file that ``src`` is or holds; None where it is an ordinary checkpoint folder.

    Raises:
        CheckpointError: a folder with several GGUF files and no safetensors.
    """
    if src.is_file() and src.suffix == ".gguf":
        return src
    if not src.is_dir() or (src / SINGLE_NAME).exists() or (src / INDEX_NAME).exists():
        return None
    found = sorted(src.glob("*.gguf"))
    if len(found) > 1:
        raise CheckpointError(f"{src} holds {len(found)} GGUF files; name one of them, such as {found[0]}.")
    return found[0] if found else None


def convert_gguf(file: Path, target: Path) -> None:
    """Write the float32 checkpoint of a GGUF file into the folder ``target``, complete or not at all.

    Unlike everything else here this holds the whole model in memory, dequantized: Transformers
    offers nothing smaller, and the file's own blocks are no weights to quantize from.

    Raises:
        CheckpointError: Transformers cannot read the file.
    """
    temporary = target.with_name(f".{target.name}.converting")
    shutil.rmtree(temporary, ignore_errors=True)
    where, name = str(file.parent), file.name
    with quiet_transformers():
        import transformers

        options: dict[str, object] = {}
        try:
            # Where it exists, Transformers otherwise keeps the file's blocks and refuses to save them.
            from transformers.utils.quantization_config import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
        except ImportError:
            pass
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                where, gguf_file=name, dtype=torch.float32, local_files_only=True, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                where, gguf_file=name, local_files_only=True
            )
            model.save_pretrained(temporary, max_shard_size="2GB")
            tokenizer.save_pretrained(temporary)
        except OSError as error:
            if error.errno is not None:  # the disk's, not Transformers' own use of this type
                raise
            raise _unreadable(file, transformers.__version__, error) from None
        except Exception as error:  # a third party's parser on a file that nobody vouches for
            raise _unreadable(file, transformers.__version__, error) from None
    temporary.rename(target)


def _unreadable(file: Path, version: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"Transformers {version} cannot read {file} ({file.stat().st_size} bytes): {one_line(error)}"
    )
