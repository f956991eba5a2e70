"""A quantized linear layer as a torch module: stored tensors while it loads, kernel layout while it runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from flute_kernels import FormatError, LutWeight, QuantizedLinear, QuantSpec, UnsupportedError
from flute_kernels.format import TENSOR_NAMES

__all__ = ["FluteLinear", "SharedInput"]

_STORED = TENSOR_NAMES[:3]


class SharedInput(Protocol):
    """Who rotates the input of a layer together with that of others: see ``flute_hf.rotation``."""

    def rotated(self, x: Tensor, layer: nn.Module, weight: LutWeight) -> Tensor:
        """``weight.rotate(x)``, perhaps as another layer got it already."""


class FluteLinear(nn.Module):
    """``x @ W_hat.T + bias`` for a quantized weight ``W_hat`` ``[N, K]``.

    The weight is held once, in one of two forms. *Stored*: the buffers ``qweight``, ``scales`` and
    ``codebook``, as in a checkpoint. *Prepared*: a :class:`~flute_kernels.LutWeight` in the layout of
    the device's kernels, and no buffers. :meth:`prepare` goes from the first to the second (the first
    forward does it, too) and :meth:`restore` back, bit for bit. ``state_dict()`` and the attributes
    ``qweight``, ``scales``, ``codebook`` are the stored tensors in both forms; in the second they are
    made on demand.

    Moving the module to another device moves the weight. A dtype conversion changes ``bias`` only:
    scales and tables keep the dtype in which they were chosen.

    Args:
        spec: bits, groups, tables and rotation.
        in_features, out_features: K and N.
        bias: whether there is a ``bias`` ``[N]``, a parameter as in ``nn.Linear``.
        dtype: of the bias, and what :attr:`dtype` starts as.
        device: of everything; the tensors are left uninitialised, to be loaded.

    Attributes:
        dtype: what the weight would have if it were not quantized, as the model around it has. It follows
            conversions, and is what :meth:`dequantize` gives; computing is done in the dtype of the input.
        shared_input: rotates the input where other layers see it, too; None where the layer does it alone.

    Raises:
        FormatError: the format has no place for such a K.
    """

    def __init__(
        self,
        spec: QuantSpec,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.in_features, self.out_features = spec, in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        shapes = spec.shapes(out_features, in_features)
        dtypes = {"qweight": torch.int32, "scales": torch.float16, "codebook": torch.float16}
        for name in _STORED:
            self.register_buffer(name, torch.empty(shapes[name], dtype=dtypes[name], device=device))
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )
        self._weight: LutWeight | None = None
        self.shared_input: SharedInput | None = None

    @classmethod
    def from_quantized(cls, linear: QuantizedLinear, dtype: torch.dtype | None = None) -> FluteLinear:
        """Take stored tensors, and their bias, as they are."""
        module = cls(linear.spec, linear.in_features, linear.out_features, dtype=dtype, device="meta")
        module.set_quantized(linear)
        module.bias = None if linear.bias is None else nn.Parameter(linear.bias)
        return module

    @classmethod
    def in_place_of(cls, linear: nn.Linear, quantized: QuantizedLinear) -> FluteLinear:
        """Take stored tensors, and the bias parameter and dtype of the layer that they were made from."""
        module = cls.from_quantized(dataclasses.replace(quantized, bias=None), linear.weight.dtype)
        module.bias = cast("nn.Parameter | None", linear.bias)
        return module

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return (
            self._weight.device if self._weight is not None else cast(Tensor, self._buffers["qweight"]).device
        )

    @property
    def is_prepared(self) -> bool:
        """Whether the weight is in the kernels' layout."""
        return self._weight is not None

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes, in the form that it is in; bias left out."""
        return self._weight.nbytes if self._weight is not None else self.quantized().nbytes

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` in float32, float16 or bfloat16 to ``[..., N]`` in the same dtype.

        Raises:
            FormatError: x has another K or device; the weight is not as the format says.
            UnsupportedError: this build has no kernel for the device or dtype.
        """
        # 210 calls a token in a model of 135 M parameters: attributes that __dict__ has, nothing else.
        weight = self._weight
        if weight is None:
            weight = self.prepare()
        shared = self.shared_input
        if shared is not None:
            return weight.linear_rotated(shared.rotated(x, self, weight), self._parameters["bias"])
        return weight.linear(x, self._parameters["bias"])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def prepare(self) -> LutWeight:
        """Check the weight and lay it out for the kernels of its device.

        Raises:
            FormatError: a stored tensor is not as the format says.
            UnsupportedError: this build has no kernels for the device.
        """
        if self._weight is None:
            # The first forward may be inside inference_mode, whose tensors no later training could use.
            with torch.inference_mode(False), torch.no_grad():
                self._weight = LutWeight.from_linear(self.quantized())
            for name in _STORED:
                del self._buffers[name]
        return self._weight

    def restore(self) -> None:
        """Back to the stored tensors."""
        if self._weight is not None:
            self.set_quantized(self._weight.to_linear())

    def quantized(self) -> QuantizedLinear:
        """The stored tensors, with the bias."""
        bias = None if self.bias is None else self.bias.detach()
        if self._weight is not None:
            return self._weight.to_linear(bias)
        return QuantizedLinear(self.spec, *self._stored(), bias)

    def set_quantized(self, linear: QuantizedLinear) -> None:
        """Replace the weight by stored tensors of the same spec and shape; the bias stays."""
        self._weight = None
        for name in _STORED:
            tensor = getattr(linear, name)
            # Quantizers hand out one table for all layers; saving would take layers that share it for tied.
            # And they work in inference_mode, whose tensors autograd refuses.
            if name == "codebook" or tensor.is_inference():
                with torch.inference_mode(False), torch.no_grad():
                    tensor = tensor.clone()
            self.register_buffer(name, tensor)

    def _stored(self) -> tuple[Tensor, Tensor, Tensor]:
        qweight, scales, codebook = (cast(Tensor, self._buffers[name]) for name in _STORED)
        return qweight, scales, codebook

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ``nn.Linear`` with the weight that this layer multiplies with, any rotation undone.

        Args:
            dtype: of its weight, which is rounded once; by default :attr:`dtype`. The bias keeps its own.
        """
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.prepare().dequantize(dtype or self.dtype))
        linear.bias = cast(nn.Parameter, self._parameters["bias"])
        return linear.train(self.training)

    def extra_repr(self) -> str:
        spec = self.spec
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}"]
        parts += [
            f"bias={self._parameters['bias'] is not None}",
            f"bits={spec.bits}",
            f"group_size={spec.group_size}",
        ]
        parts += [f"vector_size={spec.vector_size}"] if spec.vector_size != 1 else []
        parts += [f"hadamard={spec.hadamard}"] if spec.hadamard else []
        return ", ".join(parts)

    # --- what torch does to modules ---------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in _STORED and self.__dict__.get("_weight") is not None:
            return getattr(self._weight.to_linear(), name)  # type: ignore[union-attr]
        if name == "weight":
            raise AttributeError(
                f"FluteLinear has no attribute 'weight': its {self.out_features} x {self.in_features} "
                f"weights are codes of {self.spec.bits} bits. dequantize().weight makes a 16- or 32-bit copy."
            )
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FluteLinear:
        # fn converts, moves or empties; where it goes is all that the weight may follow.
        before = self.device
        probe = fn(torch.empty(0, dtype=self.dtype, device=before))
        stored = dict(self._buffers)
        self._buffers.clear()
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(stored)
        self.dtype = probe.dtype
        if probe.device != before:
            self._move(probe.device)
        return self

    def _move(self, device: torch.device) -> None:
        was_prepared = self.is_prepared
        self.restore()
        for name in _STORED:
            tensor = cast(Tensor, self._buffers[name])
            moved = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
            self._buffers[name] = moved
        if was_prepared and device.type != "meta":
            # Where no kernel serves the device, the first forward says so; until then it is a place to be.
            with contextlib.suppress(UnsupportedError):
                self.prepare()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_prepared:
            linear = self.quantized()
            destination.update({prefix + name: getattr(linear, name) for name in _STORED})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # torch would copy into the tensors that are here, casting scales and refusing other tables.
        names = [prefix + name for name in _STORED]
        was_prepared = self.is_prepared
        if any(name in state_dict for name in names):
            try:
                linear = QuantizedLinear.from_tensors(
                    state_dict,
                    self.spec,
                    prefix=prefix,
                    out_features=self.out_features,
                    in_features=self.in_features,
                )
            except FormatError as error:
                error_msgs.append(str(error))
            else:
                self._take(linear, assign=bool(local_metadata.get("assign_to_params_buffers")))
        elif strict:
            missing_keys.extend(names)
        stored = dict(self._buffers)
        self._buffers.clear()
        try:
            unexpected: list[str] = []
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected,
                error_msgs,
            )
            unexpected_keys.extend(key for key in unexpected if key not in names)
        finally:
            self._buffers.update(stored)
        if was_prepared:
            self.prepare()

    def _take(self, linear: QuantizedLinear, *, assign: bool) -> None:
        if not assign:
            device = self.device
            copies = {name: getattr(linear, name).to(device, copy=True) for name in _STORED}
            linear = dataclasses.replace(linear, **copies)
        self.set_quantized(linear)

    def __getstate__(self) -> dict[str, Any]:
        # The kernels' layout belongs to this process and machine; a copy makes its own.
        state = self.__dict__.copy()
        if self.is_prepared:
            linear = self.quantized()
            state["_buffers"] = {**self._buffers, **{name: getattr(linear, name) for name in _STORED}}
            state["_weight"] = None
        state["_was_prepared"] = self.is_prepared
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        was_prepared = state.pop("_was_prepared", False)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if was_prepared and self.device.type != "meta":
            with contextlib.suppress(UnsupportedError):
                self.prepare()
