"""GGUF files: linears in block types that are tables keep their codes; all else is dequantized.

The file's own names, config and tokenizer are turned into Hugging Face's by the gguf package and by
Transformers. Their conversion to GGUF reorders rows of some weights and shifts some norms, which is undone
here: rows of codes and scales can be moved like rows of a weight.

Source of what is undone: ``modify_tensors`` in convert_hf_to_gguf.py of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flute_kernels import QuantizedLinear
from flute_quant.checkpoint.safetensors_reader import DTYPE_NAMES
from flute_quant.checkpoint.safetensors_writer import TensorSlot
from flute_quant.checkpoint.source import SINGLE_NAME
from flute_quant.checkpoint.structure import build_structure, quiet_transformers
from flute_quant.errors import CheckpointError, QuantizationError, one_line
from flute_quant.importers.base import (
    Candidate,
    Imported,
    Importer,
    PassedTensor,
    Source,
    SourceFile,
    SourceLinear,
    checked_spec,
)
from flute_quant.importers.ggml import BLOCK, BLOCK_TYPES, BlockType
from flute_quant.importers.rope import llama3_scaling
from flute_quant.patterns import matches
from flute_quant.plan import DEFAULT_IGNORE

__all__ = ["IMPORTER"]

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FREQUENCIES = "rope_freqs.weight"
_MAX_FILE = 4 << 30
# Dequantized at once: 16 M values are 64 MB.
_VALUES = 1 << 24


@dataclass(frozen=True)
class _Stored:
    """A tensor of the file: its name and type there, its mapped rows, and the order that the model wants."""

    name: str
    kind: str
    data: Any
    shape: tuple[int, ...]
    order: Tensor | None

    def rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows of the model's weight, as stored, copied into memory."""
        picked = self.data[start:stop] if self.order is None else self.data[self.order[start:stop].numpy()]
        return np.array(picked)


@dataclass(frozen=True)
class _Architecture:
    """What llama.cpp's conversion did to the tensors of a model.

    Args:
        rotary: whether rows of query and key weights are reordered for its kind of rotary embedding.
        norm_offset: what was added to the weights of norms.
    """

    rotary: bool = False
    norm_offset: float = 0.0


_ARCHITECTURES = {
    "llama": _Architecture(rotary=True),
    "qwen2": _Architecture(),
    "qwen3": _Architecture(),
    "gemma2": _Architecture(norm_offset=1.0),
    "gemma3": _Architecture(norm_offset=1.0),
}


def _open(found: Candidate) -> Source:
    file = found.gguf
    if file is None:
        raise CheckpointError(f"{found.path} is no GGUF file and holds none.")
    reader = _reader(file)
    field = reader.get_field("general.architecture")
    kind = str(field.contents()) if field is not None else "none"
    known = _ARCHITECTURES.get(kind)
    if known is None:
        raise QuantizationError(
            f"{file} holds a model of the architecture {kind!r}; supported are {', '.join(_ARCHITECTURES)}."
        )
    tensors = {t.name: t for t in reader.tensors}
    config = _config(file)
    _scale_rotation(file, reader, kind, config, tensors)
    model = build_structure(file.parent, config, len(tensors))
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(found.dtype).removeprefix("torch.")
    names = _names(file, model, kind, tensors)
    modules = dict(model.named_modules())
    linears: dict[str, SourceLinear] = {}
    left: dict[str, str] = {}
    unheld: list[str] = []
    packed: dict[str, str] = {}
    parts: list[SourceLinear | PassedTensor] = []
    for parameter, tensor_name in names.items():
        tensor = tensors[tensor_name]
        stem = parameter.removesuffix(".weight")
        shape = tuple(int(v) for v in reversed(tensor.shape))
        expected = tuple(model.get_parameter(parameter).shape)
        if shape != expected:
            raise CheckpointError(f"{tensor_name} in {file} is {list(shape)}; expected {list(expected)}.")
        type_name = tensor.tensor_type.name
        order = _rows(known, model, tensor_name, shape[0])
        stored = _Stored(tensor_name, type_name, tensor.data, shape, order)
        wanted = isinstance(modules.get(stem), nn.Linear) and parameter.endswith(".weight")
        head = any(matches(stem, p) for p in DEFAULT_IGNORE)
        if wanted and not head and type_name in BLOCK_TYPES:
            linear = _linear(stored, stem, BLOCK_TYPES[type_name])
            linears[stem] = linear
            parts.append(linear)
            continue
        if wanted and head:
            left[stem] = "a head or a router"
        elif wanted:
            left[stem] = f"stored as {type_name}, which is no table of 16"
            if type_name not in _FLOATS:
                unheld.append(stem)
        if type_name not in _FLOATS:
            packed[parameter] = type_name
        offset = known.norm_offset if tensor_name.endswith("norm.weight") else 0.0
        parts.append(_passed(stored, parameter, offset, found.dtype))
    if not linears:
        types = sorted({t.tensor_type.name for t in tensors.values()})
        raise QuantizationError(
            f"{file} has no linear in a block type that is a table; its tensors are {', '.join(types)}, "
            f"supported are {', '.join(BLOCK_TYPES)}."
        )
    status = file.stat()
    files = _files(parts)
    return Source(
        path=file,
        config=config,
        files=files,
        sharded=len(files) > 1,
        identity=[file.name, status.st_size, status.st_mtime_ns],
        nbytes=status.st_size,
        side_files=partial(_write_tokenizer, file),
        left=left,
        unheld=frozenset(unheld),
        notes=_notes(packed, found.dtype),
    )


def _notes(packed: dict[str, str], dtype: torch.dtype) -> tuple[str, ...]:
    """What happens to the tensors (name to type) that are stored in blocks and become no linears of ours."""
    if not packed:
        return ()
    done = "dequantized" if dtype == torch.float32 else f"dequantized and rounded to {str(dtype)[6:]}"
    types = ", ".join(sorted(set(packed.values())))
    return (f"{len(packed)} other tensors of the types {types} are {done} (such as {next(iter(packed))}).",)


def _reader(file: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            f"Reading {file} needs the gguf package: pip install 'flute-quant[gguf]'."
        ) from None
    try:
        return gguf.GGUFReader(str(file))
    except Exception as error:  # a third party's parser on a file that nobody vouches for
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) cannot be read as GGUF: {one_line(error)}"
        ) from None


def _config(file: Path) -> dict[str, Any]:
    with quiet_transformers():
        import transformers

        try:
            found = transformers.AutoConfig.from_pretrained(
                str(file.parent), gguf_file=file.name, local_files_only=True
            )
        except Exception as error:
            raise CheckpointError(
                f"Transformers {transformers.__version__} cannot read the config in {file}: {one_line(error)}"
            ) from None
    config: dict[str, Any] = found.to_diff_dict()
    config.pop("_name_or_path", None)
    return config


def _scale_rotation(
    file: Path, reader: Any, kind: str, config: dict[str, Any], tensors: dict[str, Any]
) -> None:
    """Put the scaling of rotary frequencies into the config; refuse one that would be lost."""
    found = reader.get_field(f"{kind}.rope.scaling.type")
    if found is not None and found.contents() != "none":
        raise QuantizationError(
            f"{file} scales rotary frequencies by {found.contents()!r}, which Transformers does not read "
            "from GGUF; supported are none and Llama 3's."
        )
    if _FREQUENCIES not in tensors:
        return
    factors = torch.from_numpy(np.array(tensors.pop(_FREQUENCIES).data, dtype=np.float32))
    theta = config["rope_parameters"]["rope_theta"]
    scaling = llama3_scaling(factors, theta)
    if scaling is None:
        raise QuantizationError(
            f"{_FREQUENCIES} in {file} has {len(factors)} factors from {float(factors.min()):.4g} to "
            f"{float(factors.max()):.4g} for theta {theta:g}, which are not Llama 3's; no others are "
            "supported."
        )
    config["rope_parameters"] = {**config["rope_parameters"], **scaling}


def _write_tokenizer(file: Path, target: Path) -> None:
    with quiet_transformers():
        import transformers

        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(file.parent), gguf_file=file.name, local_files_only=True
            )
            tokenizer.save_pretrained(target)
        except OSError as error:
            if error.errno is not None:  # the disk's, not Transformers' own use of this type
                raise
            raise _no_tokenizer(file, error) from None
        except Exception as error:
            raise _no_tokenizer(file, error) from None


def _no_tokenizer(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"Transformers cannot read the tokenizer in {file}: {one_line(error)}")


def _names(file: Path, model: nn.Module, kind: str, tensors: dict[str, Any]) -> dict[str, str]:
    """Parameter to the tensor that it is stored as; each has one, and each tensor has one."""
    import gguf

    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == kind)
    layers = int(getattr(model.config, "num_hidden_layers", 0))
    known = gguf.get_tensor_name_map(arch, layers)
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    names = {}
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        stem, dot, suffix = parameter.rpartition(".")
        base = known.get_name(stem)
        found = f"{base}{dot}{suffix}"
        if base is None or found not in tensors:
            if parameter in tied and model.config.tie_word_embeddings:  # type: ignore[union-attr]
                continue
            raise CheckpointError(f"{file} has no tensor for {parameter}; expected {found}.")
        names[parameter] = found
    rest = sorted(set(tensors) - set(names.values()))
    if rest:
        raise QuantizationError(
            f"{file} has {len(rest)} tensors that its model, as Transformers reads it, has no parameter for; "
            f"one is {rest[0]} {[int(v) for v in tensors[rest[0]].shape]}."
        )
    return names


def _rows(known: _Architecture, model: nn.Module, tensor: str, rows: int) -> Tensor | None:
    """The order in which the model wants a tensor's rows, or None where it is the file's."""
    config: Any = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    part = tensor.split(".")[-2]
    if not known.rotary or part not in heads:
        return None
    # Pairs that are rotated together are neighbours in the file, and half a head apart in the model.
    return torch.arange(rows).view(heads[part], rows // heads[part] // 2, 2).transpose(1, 2).reshape(-1)


def _linear(stored: _Stored, stem: str, block: BlockType) -> SourceLinear:
    n, k = stored.shape
    spec = checked_spec(stored.name, n, k, bits=4, group_size=BLOCK)

    def read() -> Imported:
        codes, scales = block.split(torch.from_numpy(stored.rows(0, n)).view(n, -1))
        table = torch.tensor(block.table, dtype=torch.float16)
        return Imported(QuantizedLinear.from_codes(codes, scales, table, spec))

    return SourceLinear(stem, n, k, spec, block.scale_dtype, torch.float16, read)


def _passed(stored: _Stored, parameter: str, offset: float, packed: torch.dtype) -> PassedTensor:
    dtype = _FLOATS.get(stored.kind, packed)

    def blocks() -> Iterator[memoryview]:
        import gguf

        kind = gguf.GGMLQuantizationType[stored.kind]
        step = max(1, _VALUES // max(1, int(np.prod(stored.shape[1:]))))
        for start in range(0, stored.shape[0], step):
            rows = stored.rows(start, min(start + step, stored.shape[0]))
            if stored.kind in _FLOATS and not offset:
                yield rows.reshape(-1).view(np.uint8).data
                continue
            try:
                values = torch.from_numpy(np.array(gguf.dequantize(rows, kind), dtype=np.float32))
            except NotImplementedError:
                raise QuantizationError(
                    f"{stored.name} is stored as {stored.kind}, which the gguf package cannot dequantize."
                ) from None
            values = (values - offset).to(dtype)
            bad = int((~torch.isfinite(values)).sum())
            if bad:
                raise QuantizationError(
                    f"{stored.name} has {bad} of {values.numel()} values that are NaN or infinite "
                    f"as {dtype}; expected none."
                )
            yield values.view(torch.uint8).numpy().reshape(-1).data

    return PassedTensor(TensorSlot(parameter, DTYPE_NAMES[dtype], stored.shape), blocks)


def _files(parts: list[SourceLinear | PassedTensor]) -> tuple[SourceFile, ...]:
    """Output files of at most 4 GB, so that an interrupted run has something to resume from."""
    groups: list[list[SourceLinear | PassedTensor]] = [[]]
    size = 0
    for part in parts:
        nbytes = sum(s.nbytes for s in part.slots) if isinstance(part, SourceLinear) else part.slot.nbytes
        if groups[-1] and size + nbytes > _MAX_FILE:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += nbytes
    count = len(groups)
    names = (
        [SINGLE_NAME] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    return tuple(
        SourceFile(
            name,
            tuple(p for p in group if isinstance(p, SourceLinear)),
            tuple(p for p in group if isinstance(p, PassedTensor)),
        )
        for name, group in zip(names, groups, strict=True)
    )


IMPORTER = Importer(
    "gguf",
    f"GGUF files with linears of the types {', '.join(BLOCK_TYPES)}",
    lambda found: found.gguf is not None,
    _open,
)
