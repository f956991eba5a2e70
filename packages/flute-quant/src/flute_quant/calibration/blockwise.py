"""Block-wise training: the codes and scales of one layer are trained for what the whole layer puts out.

Sources: Chen et al., "EfficientQAT", arXiv 2407.11062 (a block at a time, rounding and scales through the
straight-through estimator); Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent" (AutoRound),
arXiv 2309.05516 (steps of one size along the gradient's sign, falling to zero).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flute_kernels import QuantizedLinear
from flute_kernels.format import unpack_codes
from flute_quant.calibration.replaced import replaced, without_gradients
from flute_quant.calibration.rounding import RoundedLinear

__all__ = ["BlockTraining", "TrainedBlock", "train_block"]

_SEED = 0
# Of a token's energy, below which it counts as if it had that.
_LEAST_ENERGY = 1e-12


@dataclass(frozen=True)
class BlockTraining:
    """How long, and how far.

    Args:
        epochs: passes over the calibration tokens.
        reach: how far a weight can move over the whole training if its gradient never changes sign, in mean
            distances of neighbouring table entries; with 0 codes stay.
        scale_reach: the same for a scale, relative to itself. One of both is more than 0.
    """

    epochs: int
    reach: float
    scale_reach: float


@dataclass(frozen=True)
class TrainedBlock:
    """What training made of a layer's modules.

    Args:
        linears: module name to stored tensors; the start's where training did not better them.
        before, after: mean over tokens of the output's squared error relative to the token's energy.
        moved: fraction of the codes that changed.
    """

    linears: dict[str, QuantizedLinear]
    before: float
    after: float
    moved: float


def train_block(
    layer: nn.Module,
    call: Callable[[Tensor], Tensor],
    linears: Mapping[str, QuantizedLinear],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    training: BlockTraining,
    *,
    device: torch.device,
) -> TrainedBlock:
    """Train the codes and scales of a layer's linear modules; tables stay, and so does the layer.

    A step is one batch, in another order in every epoch, the same in every run. Every weight's position among
    the table's entries and every scale moves one step along the sign of its gradient; steps fall linearly to
    zero. The loss is the squared error of the layer's output, a token's relative to its own energy: layers
    that give one token a thousand times the energy of the others would else be trained for that one alone.

    Beside the layer are held, for each weight: two float32 numbers, its quantized value in float32 and in the
    layer's dtype, one byte of code; and the activations of one batch inside of the layer.

    Args:
        layer: with its 16-bit weights, on ``device``.
        call: runs it on hidden states ``[B, L, D]``, whatever its modules are.
        linears: name inside of ``layer`` to the stored tensors that training starts from.
        inputs: hidden states ``[B, L, D]`` of each batch, anywhere.
        targets: what the layer should put out for each of them.
        training: how long, and how far.
        device: where to train.
    """
    with torch.inference_mode(False), without_gradients(layer), torch.enable_grad():
        modules = {
            name: RoundedLinear(_linear(layer, name), quantized) for name, quantized in linears.items()
        }
        for module in modules.values():
            module.positions.requires_grad_(training.reach > 0)
            module.stretch.requires_grad_(training.scale_reach > 0)
        moving = [
            (parameter, reach)
            for m in modules.values()
            for parameter, reach in (
                (m.positions, training.reach * m.spacing),
                (m.stretch, training.scale_reach),
            )
            if reach > 0
        ]
        parameters, reaches = [p for p, _ in moving], [r for _, r in moving]
        with replaced(layer, modules):
            before = _mean_error(call, inputs, targets, device)
            steps = training.epochs * len(inputs)
            generator = torch.Generator().manual_seed(_SEED)
            step = 0
            for _ in range(training.epochs):
                for i in torch.randperm(len(inputs), generator=generator).tolist():
                    loss = _error(call(inputs[i].to(device)), targets[i].to(device))
                    if not loss.requires_grad:
                        break  # no token reaches any of the modules
                    # A module that no token reaches has no gradient.
                    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                    # Sizes fall from 2 / steps to 0, so that all together are 1.
                    size = 2 * (steps - step) / (steps * (steps + 1))
                    with torch.no_grad():
                        for parameter, reach, gradient in zip(parameters, reaches, gradients, strict=True):
                            if gradient is not None:
                                parameter.add_(gradient.sign_(), alpha=-reach * size)
                    step += 1
            after = _mean_error(call, inputs, targets, device)
    if not after < before:  # nor where it is NaN
        return TrainedBlock(dict(linears), before, after, 0.0)
    trained = {name: module.quantized() for name, module in modules.items()}
    return TrainedBlock(trained, before, after, _moved(linears, trained))


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the squared error relative to the token's energy."""
    wanted = target.to(torch.float32)
    energy = wanted.square().sum(2).clamp_min(_LEAST_ENERGY)
    return ((output.to(torch.float32) - wanted).square().sum(2) / energy).mean()


@torch.no_grad()
def _mean_error(
    call: Callable[[Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    device: torch.device,
) -> float:
    errors = [_error(call(x.to(device)), y.to(device)) for x, y in zip(inputs, targets, strict=True)]
    return float(torch.stack(errors).mean())


def _moved(before: Mapping[str, QuantizedLinear], after: Mapping[str, QuantizedLinear]) -> float:
    changed = total = 0
    for name, linear in after.items():
        old = before[name].qweight.to(linear.qweight.device)
        spec = linear.spec
        codes = [unpack_codes(q, spec.bits, spec.vector_size) for q in (old, linear.qweight)]
        changed += int((codes[0] != codes[1]).sum())
        total += codes[0].numel()
    return changed / total
