"""The importance of a checkpoint's input channels, measured while its weights stay on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flute_kernels import QuantSpec
from flute_quant.checkpoint.safetensors_reader import DTYPES
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.checkpoint.streaming import StreamedModel
from flute_quant.checkpoint.structure import build_structure, quiet_transformers
from flute_quant.checkpoint.workfolder import write_synced
from flute_quant.importance.channels import ChannelImportance
from flute_quant.importance.meter import ChannelMeter
from flute_quant.importance.model import measured_importance
from flute_quant.importance.tokens import run_random_tokens

__all__ = ["compute_dtype", "measure_channels", "measure_folder", "read_measurement", "write_measurement"]

_NAME = "importance.safetensors"


def measure_folder(
    folder: CheckpointFolder,
    linears: Mapping[str, QuantSpec],
    *,
    device: torch.device | str = "cpu",
    seen: Callable[[int], None] | None = None,
) -> ChannelImportance:
    """As :func:`measure_channels`; a model that cannot be run is no error: columns take its place."""
    return measured_importance(lambda: measure_channels(folder, linears, device=device, seen=seen), linears)


def measure_channels(
    folder: CheckpointFolder,
    linears: Mapping[str, QuantSpec],
    *,
    device: torch.device | str = "cpu",
    seen: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """As :func:`~flute_quant.random_token_importance`, with one module's weights in memory at a time.

    Args:
        folder: the 16- or 32-bit checkpoint.
        linears: module name to its spec; names may have the base model's prefix or lack it.
        device: where to compute.
        seen: called at each module's first input with the number of modules seen so far.

    Raises:
        NoPassError: the model takes no tokens, or a weight is missing.
        Exception: whatever Transformers or the model raises.
    """
    place = torch.device(device)
    meter = _attempt(folder, linears, place, seen, whole_layers=False)
    if not meter.is_finite:
        # NaN is what a weight gives that is used without a call of its module.
        meter = _attempt(folder, linears, place, seen, whole_layers=True)
    return meter.importance()


def _attempt(
    folder: CheckpointFolder,
    linears: Mapping[str, QuantSpec],
    device: torch.device,
    seen: Callable[[int], None] | None,
    *,
    whole_layers: bool,
) -> ChannelMeter:
    # The caller may be Transformers in the middle of loading, which makes new tensors on the meta device.
    with quiet_transformers(), torch.device("cpu"):
        dtype = compute_dtype(folder, device)
        model = build_structure(folder.path, folder.config, len(folder.location), dtype)
        meter = ChannelMeter(linears, seen, places=_places(model, linears))
        streamed = StreamedModel(folder, model, device, whole_layers=whole_layers)
        with streamed.attached(), meter.attached(model):
            run_random_tokens(model, device)
    return meter


def _places(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The names of modules in this model, which may be the base of theirs or theirs of its."""
    known = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "") or ""
    places = {}
    for name in names:
        aliases = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        found = next((alias for alias in aliases if isinstance(known.get(alias), nn.Linear)), None)
        if found is not None:
            places[name] = found
    return places


def compute_dtype(folder: CheckpointFolder, device: torch.device) -> torch.dtype:
    """The dtype of most weights, or float32 where the device would be slow in it or the range is short."""
    dtype = DTYPES[folder.main_dtype()]
    fast = device.type != "cpu" or _has_fast_bfloat16()
    return torch.bfloat16 if dtype == torch.bfloat16 and fast else torch.float32


def _has_fast_bfloat16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build of torch without oneDNN
        return False


def write_measurement(folder: Path, measured: ChannelImportance) -> None:
    """Keep a measurement in a work folder, so that a resumed run goes on with the same numbers."""
    metadata = {"flute": json.dumps({"source": measured.source, "note": measured.note})}
    write_synced(folder / _NAME, safetensors.torch.save(dict(measured.values), metadata))


def read_measurement(folder: Path) -> ChannelImportance | None:
    """What :func:`write_measurement` kept, or None where there is nothing whole."""
    try:
        with safe_open(folder / _NAME, framework="pt") as file:
            noted = json.loads(file.metadata()["flute"])
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    return ChannelImportance(noted["source"], values, columns=True, note=noted["note"])
