"""A Hugging Face checkpoint folder as a source: its files, its index, its tensors; all of it distrusted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from flute_quant.checkpoint.safetensors_reader import SafetensorsFile, StoredTensor
from flute_quant.errors import CheckpointError

__all__ = ["INDEX_NAME", "SINGLE_NAME", "CheckpointFolder", "read_json"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# The index of a 1-TB model has 10 MB.
_MAX_JSON = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB."""
    try:
        size = path.stat().st_size
        if size > _MAX_JSON:
            raise CheckpointError(f"{path} has {size} bytes; expected at most {_MAX_JSON}.")
        value = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected an object.")
    return value


@dataclass(frozen=True)
class CheckpointFolder:
    """A checked folder.

    Args:
        path: the folder.
        config: the content of ``config.json``.
        files: weight file name to its checked header.
        location: tensor name to the file that holds it.
        sharded: whether an index names the files.
    """

    path: Path
    config: dict[str, Any]
    files: dict[str, SafetensorsFile]
    location: dict[str, str]
    sharded: bool

    @classmethod
    def open(cls, path: str | Path) -> CheckpointFolder:
        """Check the folder's index and every header; no tensor is read.

        Raises:
            CheckpointError: a file is missing, truncated, outside of the folder, or in a format that
                could run code.
        """
        folder = Path(path)
        if not folder.is_dir():
            hint = ""
            if len(folder.parts) == 2 and not folder.parent.exists():  # looks like a name on the model hub
                hint = f" Fetch a model of the hub first: hf download {folder} --local-dir {folder.name}"
            raise CheckpointError(f"{folder} is no folder.{hint}")
        if not (folder / "config.json").exists():
            raise CheckpointError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder.")
        config = read_json(_inside(folder, "config.json"))
        index = folder / INDEX_NAME
        if index.exists():
            weight_map = _weight_map(_inside(folder, INDEX_NAME))
            names = sorted(set(weight_map.values()))
        elif (folder / SINGLE_NAME).exists() or (folder / SINGLE_NAME).is_symlink():
            weight_map, names = {}, [SINGLE_NAME]
        else:
            raise _no_weights(folder)
        files = {}
        for name in names:
            file = _inside(folder, name)
            if not file.is_file():
                raise CheckpointError(
                    f"{folder} has no {name}, which its index names as one of {len(names)} files."
                )
            files[name] = SafetensorsFile(file)
        return cls(folder, config, files, _locate(folder, files, weight_map), index.exists())

    def tensor(self, name: str) -> StoredTensor:
        """Dtype, shape and place of a tensor."""
        return self.files[self.location[name]].tensors[name]

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        return self.files[self.location[name]].read(name)

    def main_dtype(self) -> str:
        """The floating-point dtype of most weights, as safetensors calls it; BF16 where there are none."""
        counts: Counter[str] = Counter()
        for name in self.location:
            stored = self.tensor(name)
            if stored.is_float:
                counts[stored.dtype] += stored.numel
        return counts.most_common(1)[0][0] if counts else "BF16"

    def side_files(self) -> list[Path]:
        """Tokenizer, generation config and the like: regular files of the folder that hold no weights."""
        skipped = (*_PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".py", ".index.json")
        found = []
        for file in sorted(self.path.iterdir()):
            if file.name == "config.json" or file.name.startswith(".") or file.name.endswith(skipped):
                continue
            if file.is_file():
                found.append(_inside(self.path, file.name))
        return found


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names.")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} places {tensor} in {file!r}; expected the name of a .safetensors file."
            )
    return weight_map


def _locate(folder: Path, files: dict[str, SafetensorsFile], weight_map: dict[str, str]) -> dict[str, str]:
    missing = [(t, f) for t, f in weight_map.items() if t not in files[f].tensors]
    if missing:
        tensor, file = missing[0]
        raise CheckpointError(
            f"{folder / file} lacks {tensor}, one of {len(missing)} tensors that the index places "
            "where they are not."
        )
    location = dict(weight_map)
    for name, checked in files.items():
        for tensor in checked.tensors:
            location.setdefault(tensor, name)
    return location


def _inside(folder: Path, name: str) -> Path:
    """``folder / name``, if that is a plain name and no link leads out of the folder.

    The Hugging Face cache is the exception: its snapshots are links into ``../../blobs``.
    """
    if "\x00" in name or "\\" in name or PurePosixPath(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(f"{folder} names the file {name!r}, which is outside of the folder.")
    try:
        root = folder.resolve(strict=True)
        target = (folder / name).resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder / name} cannot be resolved: {error}.") from None
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(a) for a in allowed):
        raise CheckpointError(f"{folder / name} is a link to {target}, which is outside of the folder.")
    return folder / name


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(f.name for f in folder.iterdir() if f.name.endswith(_PICKLES))
    if pickles:
        return CheckpointError(
            f"{folder} holds {len(pickles)} pickled weight files ({pickles[0]}), which can run code "
            "and are never loaded; convert a model that you trust with: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""
        )
    return CheckpointError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}.")
