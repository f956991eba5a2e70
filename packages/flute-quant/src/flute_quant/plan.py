"""Which modules of a model are quantized, how, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from flute_kernels import FormatError, QuantizationConfig, QuantSpec
from flute_quant.errors import QuantizationError
from flute_quant.patterns import Override, check_patterns, has_part, matches, spec_for
from flute_quant.siblings import sibling_groups
from flute_quant.tensor import fit_spec

__all__ = ["DEFAULT_IGNORE", "PlannedLinear", "QuantizationPlan", "plan_modules"]

DEFAULT_IGNORE = (
    "lm_head",
    "embed_out",
    "output_projection",
    "score",
    "classifier",
    "gate",  # an MoE router; an MLP's gate is called gate_proj
    "router",
    "router.*",
    "shared_expert_gate",
)
"""Patterns of linear modules that stay in 16 bits unless ``include`` names them: heads and routers."""


@dataclass(frozen=True)
class PlannedLinear:
    """One linear module, or one matrix of one expert, that will be quantized.

    Args:
        name: as in the model; of an expert's matrix, as in the checkpoint.
        out_features, in_features: shape of its weight ``[N, K]``.
        spec: what its shape allows of what was asked for.
        note: what was changed, in words, or None.
    """

    name: str
    out_features: int
    in_features: int
    spec: QuantSpec
    note: str | None = None

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class QuantizationPlan:
    """What happens to the linear modules of a model.

    Args:
        spec: how a module is quantized unless its own entry differs.
        linears: modules to quantize, in the model's order.
        kept: modules left in 16 bits, to the reason.
    """

    spec: QuantSpec
    linears: tuple[PlannedLinear, ...]
    kept: dict[str, str]

    def config(self, method: str) -> QuantizationConfig:
        """The ``quantization_config`` of a checkpoint made by this plan."""
        overrides = {p.name: p.spec for p in self.linears if p.spec != self.spec}
        return QuantizationConfig(self.spec, tuple(self.kept), overrides, method)


def plan_modules(
    model: nn.Module,
    spec: QuantSpec,
    *,
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    overrides: Sequence[Override] = (),
    experts: Mapping[str, tuple[int, int]] | None = None,
) -> QuantizationPlan:
    """Decide for every ``nn.Linear`` of a model; works on the meta device.

    Args:
        model: any module; with ``get_output_embeddings`` its head is found by that, too.
        spec: the default.
        ignore: patterns of modules to leave in 16 bits, see :func:`~flute_quant.patterns.matches`.
        include: patterns that win over :data:`DEFAULT_IGNORE` and over what the model wants to keep in 32
            bits (not over ``ignore``).
        overrides: other specs for some modules; the last that matches wins.
        experts: matrices that the model holds in larger tensors, so that they are no modules of it: name to
            ``(N, K)``. They are quantized, too, and patterns may name them.

    Raises:
        QuantizationError: a pattern that matches nothing, an override that the format lacks, a tied
            weight named by ``include``, different rotations of one input, or nothing left to quantize.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        # Attention reads this subclass's weight itself instead of calling the module.
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    }
    names = [*linears, *(experts or ())]
    for option, patterns in (("ignore", ignore), ("include", include)):
        check_patterns(patterns, names, option)
    check_patterns([o.pattern for o in overrides], names, "override")
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = _output_heads(model)
    tied_names = _tied_names(model)
    sensitive = _sensitive_parts(model)
    planned, kept = [], {}

    def take(name: str, n: int, k: int) -> None:
        try:
            wanted = spec_for(name, spec, overrides)
        except FormatError as error:
            raise QuantizationError(f"The override for {name}: {error}") from None
        try:
            fitting, note = fit_spec(wanted, k)
        except QuantizationError as error:
            kept[name] = str(error).rstrip(".")
            return
        planned.append(PlannedLinear(name, n, k, fitting, note))

    for name, module in linears.items():
        included = any(matches(name, p) for p in include)
        tied = id(module.weight) in embeddings or f"{name}.weight" in tied_names
        if any(matches(name, p) for p in ignore):
            kept[name] = "ignored as asked"
        elif tied and included:
            raise QuantizationError(
                f"include names {name}, whose {module.weight.numel()} weights are tied to the embedding, "
                "which stays in 16 bits."
            )
        elif tied:
            kept[name] = "tied to the embedding"
        elif not included and (module in heads or any(matches(name, p) for p in DEFAULT_IGNORE)):
            kept[name] = "a head or a router"
        elif not included and has_part(f"{name}.weight", sensitive):
            kept[name] = "too sensitive, as its model says"
        else:
            take(name, *module.weight.shape)
    for name, (n, k) in (experts or {}).items():
        if any(matches(name, p) for p in ignore):
            kept[name] = "ignored as asked"
        else:
            take(name, n, k)
    if not planned:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(kept.items())[:3])
        raise QuantizationError(
            f"{type(model).__name__} has {len(linears)} linear modules and none of them is to be quantized"
            + (f" ({reasons})." if reasons else "; other layer types, such as Conv1D, are not supported.")
        )
    _check_rotations(planned)
    return QuantizationPlan(spec, tuple(planned), kept)


def _check_rotations(planned: Sequence[PlannedLinear]) -> None:
    """Siblings see one input, which is rotated once for all of them."""
    by_name = {p.name: p for p in planned}
    for group in sibling_groups(list(by_name)):
        # Those of cross-attention see another input where it has another width.
        rotations: dict[int, dict[tuple[int, int], str]] = {}
        for name in group:
            p = by_name[name]
            of_input = rotations.setdefault(p.in_features, {})
            of_input.setdefault((p.spec.hadamard, p.spec.hadamard_seed), name)
        for of_input in rotations.values():
            if len(of_input) > 1:
                (first, one), (second, other) = list(of_input.items())[:2]
                raise QuantizationError(
                    f"{one} would be rotated with (block, seed) {first} and {other} with {second}; they see "
                    "the same input, so these must be the same."
                )


def _output_heads(model: nn.Module) -> list[nn.Module]:
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # Transformers classes without a head
        head = None
    return [head] if isinstance(head, nn.Module) else []


def _sensitive_parts(model: nn.Module) -> set[str]:
    """Parts of names of modules that a Transformers class loads in 32 bits, such as ``wo`` in T5."""
    found: set[str] = set()
    for key in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        parts = getattr(model, key, None)
        found |= set(parts) if isinstance(parts, list | tuple | set) else set()
    return found


def _tied_names(model: nn.Module) -> set[str]:
    """Weights that Transformers will tie on loading: on the meta device they are still separate."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not getattr(text, "tie_word_embeddings", getattr(config, "tie_word_embeddings", False)):
        return set()
    keys = getattr(model, "_tied_weights_keys", None) or {}
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if name in set(keys)}
