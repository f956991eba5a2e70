"""Run a checkpoint's model while its weights stay on disk: each is read when its module is called."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flute_quant.checkpoint.names import MergeRules, parameter_names
from flute_quant.checkpoint.safetensors_reader import DTYPES
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.importance.tokens import NoPassError
from flute_quant.patterns import has_part

__all__ = ["StreamedModel"]

# Buffers are tables of positions and frequencies. They are computed, not stored, so no file vouches for
# their size.
_MAX_COMPUTED = 256 << 20
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class StreamedModel:
    """A model whose modules have their weights only while they compute.

    Linear modules, embeddings and fused experts are read for each of their own calls. Everything
    else is small and may be used by the module around it (the scale of a norm, the weight of a
    convolution), so it is read for the calls of that one. Between calls a parameter is a NaN of its
    shape: code that uses it nevertheless gives NaN, not a plausible number.

    Args:
        folder: where the weights are.
        model: its structure on the meta device, in the dtype to compute in. It is taken over.
        device: where to compute.
        whole_layers: read everything inside of a layer for the layer's call, for models whose layers
            use the weights of linear modules without calling these.

    Raises:
        NoPassError: buffers that cannot be computed, or too large.
    """

    def __init__(
        self, folder: CheckpointFolder, model: nn.Module, device: torch.device, *, whole_layers: bool = False
    ) -> None:
        self._folder = folder
        self._model = model
        self._device = device
        self._sources = _sources(folder, model)
        self._parameter_of = {t: name for name, tensors in self._sources.items() for t in tensors}
        self._computed = _compute_buffers(model, set(self._sources), device)
        owners = [(n, m) for n, m in model.named_modules() if self._stored(m)]
        self._units = _units(model, owners, whole_layers)
        float32 = _float32_names(model)
        for name, owner in owners:
            for key, waiting in self._stored(owner):
                dtype = waiting.dtype
                if dtype.is_floating_point and has_part(f"{name}.{key}", float32):
                    dtype = torch.float32
                _put(owner, key, _absent(waiting.shape, dtype, device))
        # The same ones between all calls: small new tensors between large old ones would keep the
        # memory of these from being returned.
        self._absent = {owner: self._stored(owner) for _, owner in owners}

    @property
    def model(self) -> nn.Module:
        """The structure, whose modules have weights inside of the contexts alone."""
        return self._model

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    def running(self) -> AbstractContextManager[None]:
        """Another name of :meth:`attached`, see :class:`~flute_quant.calibration.store.LayerStore`."""
        return self.attached()

    @contextmanager
    def loaded(self, module: nn.Module) -> Iterator[None]:
        """Inside of the context a module and all inside of it have their weights.

        They may be replaced there; afterwards they are forgotten. Not to be mixed with :meth:`attached`.
        """
        inside = {id(m) for m in module.modules()}
        owners = [(n, m) for n, m in self._model.named_modules() if id(m) in inside and m in self._absent]
        try:
            self._reader(owners)(module, ())
            yield
        finally:
            self._dropper(owners)(module, (), None)

    def slice_of(self, name: str) -> tuple[str, int] | None:
        """See :class:`~flute_quant.calibration.store.LayerStore`; by the numbers in the tensor's name."""
        tensor = f"{name}.weight"
        parameter = self._parameter_of.get(tensor)
        if parameter is None or parameter == tensor:
            return None
        numbers = _NUMBER.findall(tensor)
        shared = _NUMBER.findall(parameter)
        # Layer 3's expert 5: the parameter has the 3, the tensor a 5 more.
        if numbers[: len(shared)] != shared or len(numbers) != len(shared) + 1:
            return None
        return parameter, int(numbers[-1])

    def matrix(self, name: str) -> Tensor:
        """See :class:`~flute_quant.calibration.store.LayerStore`."""
        return self._tensor(f"{name}.weight")

    def put_matrices(self, values: Mapping[str, Tensor]) -> None:
        """See :class:`~flute_quant.calibration.store.LayerStore`."""
        changed = {}
        for name, value in values.items():
            # Like its siblings from the file, with which it is merged.
            stored = self._folder.tensor(f"{name}.weight")
            changed[f"{name}.weight"] = value.to("cpu", DTYPES[stored.dtype])
        for parameter in {self._parameter_of[tensor] for tensor in changed}:
            owner_name, _, key = parameter.rpartition(".")
            owner = self._model.get_submodule(owner_name)
            absent = dict(self._absent[owner])[key]
            _put(owner, key, self._read(parameter, absent, changed))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside of the context the model can be called."""
        hooks = []
        try:
            for unit, owners in self._units.items():
                hooks.append(unit.register_forward_pre_hook(self._reader(owners)))
                hooks.append(unit.register_forward_hook(self._dropper(owners), always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _reader(self, owners: list[tuple[str, nn.Module]]) -> Callable[..., None]:
        def read(module: nn.Module, args: object) -> None:
            for name, owner in owners:
                for key, absent in self._absent[owner]:
                    _put(owner, key, self._read(f"{name}.{key}" if name else key, absent))

        return read

    def _dropper(self, owners: list[tuple[str, nn.Module]]) -> Callable[..., None]:
        def drop(module: nn.Module, args: object, output: object) -> None:
            for _, owner in owners:
                for key, absent in self._absent[owner]:
                    _put(owner, key, absent)

        return drop

    def _read(self, name: str, absent: Tensor, changed: Mapping[str, Tensor] | None = None) -> Tensor:
        """The values of a parameter or buffer, like the one in its place; ``changed`` replaces tensors."""
        tensors = self._sources.get(name)
        if tensors is None:
            raise NoPassError(f"{name} is not in the checkpoint")
        given = changed or {}
        read = {t: given[t] if t in given else self._tensor(t) for t in tensors}
        (value, *more) = read.values()
        # Values of another shape, or several tensors: Transformers merges or turns them, if it knows how.
        if more or value.shape != absent.shape:
            rules = MergeRules(self._model)
            if all(rules.is_merged(tensor) for tensor in tensors):
                value = rules.merge(read)
        if value.shape != absent.shape:
            raise NoPassError(f"{name} is {list(value.shape)} in the checkpoint, not {list(absent.shape)}")
        return value.to(absent.device, absent.dtype)

    def _stored(self, owner: nn.Module) -> list[tuple[str, Tensor]]:
        """What a module holds itself and is read: parameters, and buffers that were not computed."""
        buffers = [(k, b) for k, b in owner._buffers.items() if (owner, k) not in self._computed]
        return [(k, v) for k, v in [*owner._parameters.items(), *buffers] if v is not None]

    def _tensor(self, name: str) -> Tensor:
        return self._folder.files[self._folder.location[name]].read(name)


def _absent(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one element's memory: NaN where the dtype has it, else zero."""
    fill = torch.nan if dtype.is_floating_point else 0
    return torch.full((), fill, dtype=dtype, device=device).expand(shape)


def _put(owner: nn.Module, key: str, value: Tensor) -> None:
    if key in owner._parameters:
        frozen = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        owner._parameters[key] = frozen
    else:
        owner._buffers[key] = value


def _sources(folder: CheckpointFolder, model: nn.Module) -> dict[str, list[str]]:
    """Parameter or buffer, by every name it has, to the tensors that it is made of."""
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()
    sources: dict[str, list[str]] = defaultdict(list)
    for tensor, name in parameter_names(model, folder.location).items():
        if name is not None:
            sources[name].append(tensor)
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for tied in names.values():
        found = next((name for name in tied if name in sources), None)
        if found is not None:
            sources |= dict.fromkeys(tied, sources[found])
    return dict(sources)


def _float32_names(model: nn.Module) -> set[str]:
    """Parts of names whose parameters Transformers loads in float32 whatever the model's dtype."""
    parts = getattr(model, "_keep_in_fp32_modules_strict", None)
    return set(parts) if isinstance(parts, list | tuple | set) else set()


def _units(
    model: nn.Module, owners: list[tuple[str, nn.Module]], whole_layers: bool
) -> dict[nn.Module, list[tuple[str, nn.Module]]]:
    """Modules before whose calls something is read, to the ones among ``owners`` that hold it."""
    parents: dict[nn.Module, nn.Module] = {}
    for parent in model.modules():
        for child in parent.children():
            parents.setdefault(child, parent)
    units: dict[nn.Module, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, owner in owners:
        if whole_layers:
            unit = _layer(owner, parents)
        elif _is_large(owner):
            unit = owner
        else:
            unit = _called(parents.get(owner, owner), parents)
        units[unit].append((name, owner))
    return units


def _called(module: nn.Module, parents: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module itself or, where that is a container that is never called, the nearest that is."""
    while isinstance(module, nn.ModuleList | nn.ModuleDict) and module in parents:
        module = parents[module]
    return module


def _layer(owner: nn.Module, parents: dict[nn.Module, nn.Module]) -> nn.Module:
    """The outermost member of a list of modules that ``owner`` is in, or the module around it."""
    layer, module = None, owner
    while module in parents:
        if isinstance(parents[module], nn.ModuleList):
            layer = module
        module = parents[module]
    if layer is None:
        layer = owner if _is_large(owner) else parents.get(owner, owner)
    return _called(layer, parents)


def _is_large(owner: nn.Module) -> bool:
    """Whether a module holds matrices, and is certain to be called for them."""
    # Subclasses of nn.Linear exist whose weight is read by the attention around them.
    experts = any(p is not None and p.ndim == 3 for p in owner._parameters.values())
    return type(owner) is nn.Linear or isinstance(owner, nn.Embedding) or experts


def _compute_buffers(model: nn.Module, stored: set[str], device: torch.device) -> set[tuple[nn.Module, str]]:
    """Give every buffer that no file holds its values, as Transformers' own loading does.

    Transformers builds on the meta device, too, and has every class compute such buffers in its
    ``_init_weights``. What that leaves untouched is found by computing twice over different memory.

    Returns:
        The buffers that were computed: their module and their name in it.

    Raises:
        NoPassError: together they are too large, or one is not computed there.
    """
    waiting = []
    for name, owner in model.named_modules():
        for key, buffer in owner._buffers.items():
            full = f"{name}.{key}" if name else key
            computed = key in owner._non_persistent_buffers_set or full not in stored
            if buffer is not None and buffer.is_meta and computed:
                waiting.append((full, owner, key, buffer))
    size = sum(buffer.nbytes for _, _, _, buffer in waiting)
    if size > _MAX_COMPUTED:
        raise NoPassError(f"its computed buffers take {size:,} bytes, more than {_MAX_COMPUTED:,}")
    owners = {id(owner): owner for _, owner, _, _ in waiting}
    initialisers = _initialisers(model)
    rounds: list[list[Tensor]] = []
    for fill in (0, 1):
        for _, owner, key, buffer in waiting:
            owner._buffers[key] = torch.full_like(buffer, fill, device=device)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for owner in owners.values():
                initialisers[id(owner)](owner)
        rounds.append([_buffer(owner, key) for _, owner, key, _ in waiting])
    for (name, _, _, _), first, second in zip(waiting, *rounds, strict=True):
        if not torch.equal(first, second):
            raise NoPassError(f"its buffer {name} is not in the checkpoint and not computed on loading")
    return {(owner, key) for _, owner, key, _ in waiting}


def _buffer(owner: nn.Module, key: str) -> Tensor:
    buffer = owner._buffers[key]
    assert buffer is not None
    return buffer


def _initialisers(model: nn.Module) -> dict[int, Callable[[nn.Module], Any]]:
    """Module to the ``_init_weights`` of the Transformers model that it is a part of, the innermost."""
    result: dict[int, Callable[[nn.Module], Any]] = {}

    def visit(module: nn.Module, current: Callable[[nn.Module], Any]) -> None:
        own = getattr(module, "_init_weights", None)
        current = own if callable(own) else current
        result[id(module)] = current
        for child in module.children():
            visit(child, current)

    visit(model, lambda module: None)
    return result
