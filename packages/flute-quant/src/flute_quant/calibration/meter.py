"""Second moments of the inputs that linear modules see, by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flute_kernels import QuantSpec
from flute_quant.calibration.experts import ExpertWatch
from flute_quant.errors import QuantizationError
from flute_quant.methods import InputMoments
from flute_quant.rotation import rotate

__all__ = ["MomentMeter"]


@dataclass
class _Sums:
    """Of one input, which several modules may share."""

    hessian: Tensor
    drift: Tensor | None = None
    tokens: int = 0


class MomentMeter:
    """Adds up ``x x^T`` of all inputs of some modules, in float32 and in the basis of their codes.

    Modules that are given the same tensor one after another (q, k, v; gate, up) share one sum.

    Args:
        modules: name to module and spec, whose rotation is applied to the inputs.
        matrices: name of an expert's matrix to the parameter that holds it, its index there, and its spec.
        parameters: by name, those that ``matrices`` names.
    """

    def __init__(
        self,
        modules: Mapping[str, tuple[nn.Module, QuantSpec]],
        matrices: Mapping[str, tuple[str, int, QuantSpec]] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._modules = dict(modules)
        self._specs = {name: spec for name, (_, spec) in modules.items()}
        self._parameters = dict(parameters or {})
        self._slices: dict[tuple[str, int], list[str]] = {}
        for name, (parameter, index, spec) in (matrices or {}).items():
            self._specs[name] = spec
            self._slices.setdefault((parameter, index), []).append(name)
        self._leader: dict[str, str] = {}
        self._sums: dict[str, _Sums] = {}
        # The last input, and the module that it was added for.
        self._last: tuple[Tensor, int, tuple[int, int], str] | None = None
        self._unpaired: set[str] = set()
        self._kept: dict[str, list[Tensor]] | None = None

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Add all that runs inside of the context; after :meth:`remembering`, the drift as well."""
        with self._attached(self._measure), ExpertWatch(self._parameters, self._measure_slice):
            yield
        self._kept = None

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Keep the inputs of what runs inside of the context, as the 16-bit model's, for the next one."""
        self._kept = {}
        with self._attached(self._remember):
            yield

    def moments(self) -> dict[str, InputMoments]:
        """By module; those that no token reached are missing.

        Raises:
            QuantizationError: the inputs of a module were NaN or infinite; it is named.
        """
        result = {}
        checked: dict[str, InputMoments] = {}
        for name, leader in self._leader.items():
            if leader not in checked:
                sums = self._sums[leader]
                if not bool(torch.isfinite(sums.hessian).all()):
                    raise QuantizationError(
                        f"The calibration inputs of {name} have values that are NaN, infinite or too large "
                        f"to be squared, in {sums.tokens} tokens; expected none."
                    )
                paired = sums.drift is not None and leader not in self._unpaired
                drift = sums.drift / sums.tokens if paired and sums.drift is not None else None
                checked[leader] = InputMoments(sums.hessian / sums.tokens, drift, sums.tokens)
            result[name] = checked[leader]
        return result

    @contextmanager
    def _attached(self, action: Callable[[str, Tensor], None]) -> Iterator[None]:
        def hook(name: str) -> Callable[..., None]:
            def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else kwargs["input"]
                if x.numel():
                    action(name, x.detach())

            return run

        hooks = []
        try:
            for name, (module, _) in self._modules.items():
                hooks.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
            yield
        finally:
            for handle in hooks:
                handle.remove()
            self._last = None

    def _remember(self, name: str, x: Tensor) -> None:
        assert self._kept is not None
        self._kept.setdefault(name, []).append(x)

    def _measure_slice(self, parameter: str, index: int, x: Tensor) -> None:
        for name in self._slices.get((parameter, index), ()):
            self._measure(name, x)

    def _measure(self, name: str, x: Tensor) -> None:
        spec = self._specs[name]
        rotation = (spec.hadamard, spec.hadamard_seed)
        last = self._last
        shared = last is not None and _same(last[0], x) and last[1:3] == (x._version, rotation)
        leader = last[3] if last is not None and shared else name
        known = self._leader.setdefault(name, leader)
        if known != leader and (known == name) != (leader == name):
            raise QuantizationError(
                f"{name} shares its input with {known if known != name else leader} in some calls and not in "
                "others; calibration has no sums for that."
            )
        if leader != name:
            return
        self._last = (x, x._version, rotation, name)
        values = self._flat(x, rotation)
        sums = self._sums.get(name)
        if sums is None:
            k = values.shape[1]
            sums = self._sums[name] = _Sums(torch.zeros(k, k, device=x.device))
        sums.hessian.addmm_(values.T, values)
        sums.tokens += len(values)
        if self._kept is not None:
            kept = self._kept.get(name)
            before = self._flat(kept.pop(0), rotation) if kept else values[:0]
            if before.shape != values.shape:
                self._unpaired.add(name)  # tokens of a mixture that were routed elsewhere
                return
            if sums.drift is None:
                sums.drift = torch.zeros_like(sums.hessian)
            sums.drift.addmm_(values.T, before - values)

    def _flat(self, x: Tensor, rotation: tuple[int, int]) -> Tensor:
        values = x.reshape(-1, x.shape[-1]).to(torch.float32)
        return rotate(values, *rotation) if rotation[0] else values


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory, as detached ones of one tensor are."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
