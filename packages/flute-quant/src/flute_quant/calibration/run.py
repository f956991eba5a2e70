"""Quantize a model layer by layer, each for the inputs that calibration tokens give it.

One layer has its weights at a time. Its inputs are run through it to see what its linear modules are given;
these are quantized; then the inputs are run through it once more, for the next layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flute_kernels import QuantizedLinear
from flute_quant.calibration.blockwise import BlockTraining, train_block
from flute_quant.calibration.layers import LayerCall, trace_layers
from flute_quant.calibration.meter import MomentMeter
from flute_quant.calibration.store import LayerStore
from flute_quant.importance.channels import column_importance
from flute_quant.importance.tokens import evaluating
from flute_quant.methods import CalibratedMethod, InputMoments, Method, Recipe, data_free_method
from flute_quant.methods.parallel import ordinary_tensors
from flute_quant.plan import PlannedLinear
from flute_quant.stored import dequantized, stored_error
from flute_quant.tensor import ErrorStats, quantize_tensor

__all__ = ["LayerResult", "calibrate_layers"]

# Tokens that run through a layer at once: enough to fill a GPU, and activations of a gigabyte at most.
_BATCH_TOKENS = 8192
# And in a step of training, which has the layer's inside for the backward pass as well.
_STEP_TOKENS = 2048


@dataclass
class LayerResult:
    """The linear modules of one layer.

    Args:
        name: of the layer.
        linears: module name to its stored tensors.
        errors: module name to its error.
        notes: module name to a clause about what was done differently for it.
    """

    name: str
    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    errors: dict[str, ErrorStats] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def calibrate_layers(
    store: LayerStore,
    planned: Sequence[PlannedLinear],
    tokens: Tensor,
    method: Method,
    *,
    scale_dtype: torch.dtype = torch.float16,
    devices: Sequence[torch.device] = (),
    finished: Callable[[str], LayerResult | None] | None = None,
    progress: Callable[[PlannedLinear, ErrorStats], None] | None = None,
) -> Iterator[LayerResult]:
    """Quantize the linear modules of a model's layers, one layer after another.

    Args:
        store: the model.
        planned: what to quantize; modules outside of the layers are left out.
        tokens: int64 ``[S, L]``.
        method: of calibration, or any other, for which the inputs' mean squares become the importance.
        devices: where a layer's modules are quantized, each on the device that has the least to do; by
            default where the store runs the layer.
        finished: gives a layer's result if an earlier run had it, or None. Inputs then only run through it.
        progress: called after every module, from the thread that iterates.

    Raises:
        QuantizationError: the model is no sequence of layers; inputs or weights that are not finite; what
            :func:`~flute_quant.quantize_tensor` refuses.
    """
    recipe = method.recipe if isinstance(method, CalibratedMethod) else None
    propagate = recipe is None or recipe.propagate
    places = [p for p in planned if _is_linear(store.model, p.name)]
    slices = {p.name: place for p in planned if (place := store.slice_of(p.name)) is not None}
    training = _training(recipe)
    with store.running():
        batches = _batches(tokens, _BATCH_TOKENS if training is None else _STEP_TOKENS)
        calls, hidden = trace_layers(store.model, batches, [p.name for p in places], store.device)
    drifting = propagate and recipe is not None and recipe.correction > 0
    # The 16-bit model's hidden states, where they are wanted beside the quantized one's.
    plain = list(hidden) if propagate and (drifting or training is not None) else None
    where = list(devices) or [store.device]
    for call in calls:
        mine = [p for p in places if p.name.startswith(f"{call.name}.")]
        matrices = [p for p in planned if p.name in slices and slices[p.name][0].startswith(f"{call.name}.")]
        with store.loaded(call.module), evaluating(call.module), ordinary_tensors():
            result = known = finished(call.name) if finished is not None else None
            run = _Layer(call, store.device)
            if result is None:
                modules = {p.name: (store.model.get_submodule(p.name), p.spec) for p in mine}
                held = {p.name: (*slices[p.name], p.spec) for p in matrices}
                parameters = {key: store.model.get_parameter(key).detach() for key, _, _ in held.values()}
                meter = MomentMeter(modules, held, parameters)
                # What is behind the layer, where that is the 16-bit one's; training still wants the inputs.
                behind = hidden if training is None else list(hidden)
                for i, batch in enumerate(hidden):
                    if plain is not None:
                        with meter.remembering() if drifting else nullcontext():
                            plain[i] = run(plain[i])
                    with meter.measuring():
                        output = run(batch)
                    if not propagate:
                        behind[i] = output
                result = _quantize(
                    store,
                    call.name,
                    [*mine, *matrices],
                    meter.moments(),
                    method,
                    scale_dtype,
                    where,
                    progress if training is None else None,
                )
                del meter
                if training is not None:
                    targets = behind if plain is None else plain
                    _train(store, call, result, [*mine, *matrices], hidden, targets, training, progress)
                if not propagate:
                    hidden[:] = behind
            elif plain is not None:
                plain[:] = map(run, plain)
            if call is calls[-1]:
                pass  # nobody asks for what is behind it
            elif propagate:
                for p in mine:
                    _replace(store.model.get_submodule(p.name), result.linears[p.name])
                store.put_matrices({p.name: dequantized(result.linears[p.name]) for p in matrices})
                hidden[:] = map(run, hidden)
            elif known is not None:
                hidden[:] = map(run, hidden)
        yield result


class _Layer:
    """A layer, for hidden states that wait on the CPU.

    Args:
        call: the layer.
        device: where it is.
    """

    def __init__(self, call: LayerCall, device: torch.device) -> None:
        self._call = call
        self._device = device

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._call(hidden.to(self._device)).cpu()


def _is_linear(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), nn.Linear)
    except AttributeError:
        return False


def _weight(store: LayerStore, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a module, or an expert's matrix."""
    if not _is_linear(store.model, name):
        return store.matrix(name), None
    module = store.model.get_submodule(name)
    return module.get_parameter("weight").detach(), module._parameters.get("bias")


def _batches(tokens: Tensor, most_tokens: int) -> list[Tensor]:
    """All of one shape, so that what layers are given beside hidden states is the same for all."""
    sequences, length = tokens.shape
    most = max(1, most_tokens // length)
    size = next(n for n in range(min(most, sequences), 0, -1) if sequences % n == 0)
    return list(tokens.split(size))


def _replace(module: nn.Module, linear: QuantizedLinear) -> None:
    weight = module.get_parameter("weight")
    value = dequantized(linear).to(weight.device, weight.dtype)
    module._parameters["weight"] = nn.Parameter(value, requires_grad=False)


def _quantize(
    store: LayerStore,
    layer: str,
    planned: Sequence[PlannedLinear],
    moments: dict[str, InputMoments],
    method: Method,
    scale_dtype: torch.dtype,
    devices: Sequence[torch.device],
    progress: Callable[[PlannedLinear, ErrorStats], None] | None,
) -> LayerResult:
    result = LayerResult(layer)
    for p in planned:
        if p.name not in moments:
            result.notes[p.name] = "no calibration token reached it, so it was quantized without data"

    def work(
        device: torch.device, mine: list[PlannedLinear]
    ) -> Iterator[tuple[PlannedLinear, QuantizedLinear, ErrorStats]]:
        for p in mine:
            weight, bias = _weight(store, p.name)
            weight = weight.to(device)
            guessed = p.name not in moments and getattr(method, "wants_importance", False)
            linear, error = quantize_tensor(
                weight,
                p.spec,
                method=method if p.name in moments else data_free_method(method, p.spec),
                name=f"{p.name}.weight",
                bias=None if bias is None else bias.detach(),
                scale_dtype=scale_dtype,
                importance=column_importance(weight, p.spec) if guessed else None,
                inputs=moments.get(p.name),
                noted=lambda note, name=p.name: result.notes.__setitem__(name, note),  # type: ignore[misc]
            )
            yield p, linear, error

    def keep(p: PlannedLinear, linear: QuantizedLinear, error: ErrorStats) -> None:
        result.linears[p.name], result.errors[p.name] = linear, error
        if progress is not None:
            progress(p, error)

    shares = _shares(planned, devices)
    if len(shares) < 2:
        for device, mine in shares:
            for done in work(device, mine):
                keep(*done)
    else:
        with ThreadPoolExecutor(len(shares)) as pool:

            def all_of(
                share: tuple[torch.device, list[PlannedLinear]],
            ) -> list[tuple[PlannedLinear, QuantizedLinear, ErrorStats]]:
                with ordinary_tensors():
                    return list(work(*share))

            for found in pool.map(all_of, shares):
                for done in found:
                    keep(*done)
    order = [p.name for p in planned]
    result.linears = {name: result.linears[name] for name in order}
    result.errors = {name: result.errors[name] for name in order}
    return result


def _training(recipe: Recipe | None) -> BlockTraining | None:
    if recipe is None or not recipe.epochs:
        return None
    return BlockTraining(recipe.epochs, recipe.reach, recipe.scale_reach)


def _train(
    store: LayerStore,
    call: LayerCall,
    result: LayerResult,
    planned: Sequence[PlannedLinear],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    training: BlockTraining,
    progress: Callable[[PlannedLinear, ErrorStats], None] | None,
) -> None:
    """Train the modules of a layer's result, in place; experts that are no modules are as they were."""
    modules = {p.name: p for p in planned if _is_linear(store.model, p.name)}
    experts = [p.name for p in planned if p.name not in modules]
    store.put_matrices({name: dequantized(result.linears[name]) for name in experts})
    trained = train_block(
        call.module,
        call,
        {name.removeprefix(f"{call.name}."): result.linears[name] for name in modules},
        inputs,
        targets,
        training,
        device=store.device,
    )
    for name in experts:
        result.notes.setdefault(name, "experts are quantized before their layer is trained and stay so")
    for key, linear in trained.linears.items():
        name = f"{call.name}.{key}"
        weight, _ = _weight(store, name)
        result.linears[name] = linear
        result.errors[name] = stored_error(weight, linear)
        if not trained.after < trained.before:
            result.notes.setdefault(name, "training its layer gave nothing better than what it began with")
    if progress is not None:
        for p in planned:
            progress(p, result.errors[p.name])


def _shares(
    planned: Sequence[PlannedLinear], devices: Sequence[torch.device]
) -> list[tuple[torch.device, list[PlannedLinear]]]:
    """The largest module first, each to the device with the least to do; no empty shares."""
    loads: list[tuple[int, torch.device, list[PlannedLinear]]] = [(0, device, []) for device in devices]
    for p in sorted(planned, key=lambda p: -p.weights * p.in_features):
        i = min(range(len(loads)), key=lambda i: loads[i][0])
        load, device, mine = loads[i]
        mine.append(p)
        loads[i] = (load + p.weights * p.in_features, device, mine)
    return [(device, mine) for _, device, mine in loads if mine]
