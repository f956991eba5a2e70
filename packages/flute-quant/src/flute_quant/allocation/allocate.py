"""Choose a spec for every layer so that the model changes least, under an average of bits a weight.

The loss of a model is taken as the sum of its units' losses, and that of a unit as linear in its squared
error: both hold while errors are small (Malinovskii et al., "HIGGS", arXiv 2411.17525, theorem 1). A unit is
what engines run as one weight, q, k and v or gate and up, or a single layer. One pass for each unit,
quantized alone, measures how much the model's predictions change; errors of samples of rows say how much
more or less that would be under each choice; a dynamic program picks the choices.

At 3 bits and below errors are not small, and parts no longer add up to the whole: on SmolLM2-135M all layers
together lose 0.7 times the sum at 3 bits, and 1.15 times at 2 bits. Left as they are, such parts make
exchanges of bits look twice as good as they are, and the result is worse than the same bits for all layers.
So the whole is measured, too, and the parts under each number of bits are scaled to add up to it.

What is left of the rule's error can still be more than the gain. So the result is measured before it is
believed: its divergence on tokens that nothing was decided by, beside that of a more careful result and of
the same spec for all layers. The least of them is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flute_kernels import QuantSpec
from flute_kernels.format import GROUP_SIZES, PER_ROW
from flute_quant.allocation.errors import sampled_errors
from flute_quant.allocation.knapsack import least_loss
from flute_quant.allocation.sensitivity import held_out_tokens, measured_divergences
from flute_quant.devices import checked_device
from flute_quant.errors import QuantizationError
from flute_quant.importance import ChannelImportance, ImportanceOption, planned_importance
from flute_quant.methods import Method, data_free_method, resolve_method
from flute_quant.patterns import Override, matches
from flute_quant.plan import PlannedLinear, QuantizationPlan, plan_modules
from flute_quant.siblings import sibling_groups
from flute_quant.stored import dequantized
from flute_quant.tensor import fit_spec, quantize_tensor

__all__ = ["SENSITIVITIES", "Allocation", "allocate_checkpoint", "allocate_model", "default_choices"]

SENSITIVITIES = ("kl", "error")
"""``kl``: the change of the model's predictions on random tokens, measured for each unit, the model being in
memory. ``error``: each unit's error relative to its weights, which needs no pass and one weight at a time."""

# Measured on SmolLM2-135M: under 2 bits a layer alone loses 0.7 times what its error at 3 bits tells.
_LEAST_LINEAR_BITS = 3
# How much more than the average the same spec for all layers may take, as a fraction: its tables.
_UNIFORM_SLACK = 1e-3
# More than any choice takes; an infinite average is one, too.
_MOST_BITS = 64

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Allocation:
    """A spec for every module that is to be quantized.

    Args:
        base: the spec that overrides are relative to.
        specs: module name to its spec.
        bits_per_weight: of all of them, with scales and tables.
        losses: first name of each unit to its predicted loss under its choice, in nats a token for ``kl``.
        checked: what was measured on held-out tokens, in words, to its divergence in nats a token; the least
            was kept. Empty where nothing was: for ``error``, or where there was nothing to choose from.
    """

    base: QuantSpec
    specs: Mapping[str, QuantSpec]
    bits_per_weight: float
    losses: Mapping[str, float] = field(default_factory=dict)
    checked: Mapping[str, float] = field(default_factory=dict)

    @property
    def overrides(self) -> tuple[Override, ...]:
        """What :func:`~flute_quant.quantize_model` and :func:`~flute_quant.quantize_checkpoint` take."""
        base = asdict(self.base)
        changes = {
            name: {key: value for key, value in asdict(spec).items() if value != base[key]}
            for name, spec in self.specs.items()
        }
        return tuple(Override.of(name, **changed) for name, changed in changes.items() if changed)

    def summary(self) -> str:
        """``120 x 3 bits g64, 30 x 4 bits g128``: how many modules have which spec."""
        counts = Counter(_words(spec) for spec in self.specs.values())
        return ", ".join(f"{count} x {what}" for what, count in sorted(counts.items()))

    def verdict(self) -> str | None:
        """A sentence about what was checked, or None."""
        if not self.checked:
            return None
        kept = min(self.checked, key=lambda what: self.checked[what])
        found = ", ".join(f"{value:.4f} with {what}" for what, value in self.checked.items())
        return f"KL on held-out tokens: {found}; kept: {kept}."


def _words(spec: QuantSpec) -> str:
    group = "rows" if spec.group_size == PER_ROW else f"g{spec.group_size}"
    return f"{spec.bits} bits {group}" + (" pairs" if spec.vector_size == 2 else "")


def default_choices(spec: QuantSpec, method: Method) -> tuple[QuantSpec, ...]:
    """2, 3 and 4 bits, in groups as large as the spec's, half and twice as large, as far as the method goes.

    Where the spec asks for pairs, they are choices beside scalars.
    """
    groups = {g for g in GROUP_SIZES if g in (spec.group_size // 2, spec.group_size, spec.group_size * 2)}
    found = []
    for bits in (2, 3, 4):
        for group in sorted(groups or {spec.group_size}):
            for size in range(1, spec.vector_size + 1):
                choice = replace(spec, bits=bits, group_size=group, vector_size=size)
                try:
                    method.table_dtype(choice)
                except QuantizationError:
                    continue
                found.append(choice)
    return tuple(found)


def allocate_model(
    model: nn.Module,
    average_bits: float,
    spec: QuantSpec,
    *,
    method: str | Method = "default",
    choices: Sequence[QuantSpec] | None = None,
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    overrides: Sequence[Override] = (),
    scale_dtype: torch.dtype = torch.float16,
    importance: ImportanceOption = "auto",
    sensitivity: str = "kl",
    tokens: Tensor | None = None,
    held_out: Tensor | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """Bits by layer for a model in memory, which is not changed.

    Args:
        model: of Transformers for ``sensitivity="kl"``, else any module with its weights loaded.
        average_bits: of a quantized weight, with scales and tables, that the whole may take.
        spec: what the choices have in common: its rotation, and groups about as large as its own.
        method, scale_dtype, importance: as will be quantized with.
        choices: specs to choose among, by default :func:`default_choices`.
        ignore, include, overrides: see :func:`~flute_quant.plan.plan_modules`. A module that an override
            matches keeps what that says, and counts.
        sensitivity: one of :data:`SENSITIVITIES`.
        tokens: int64 ``[S, L]`` to measure it on; by default random ones.
        held_out: int64 ``[S, L]``, others of the same kind, by which the result is checked; by default random
            ones.
        progress: called with what is done, how much of it, and of how much.

    Raises:
        QuantizationError: fewer bits than the cheapest choices take; an unknown option; what
            :func:`~flute_quant.quantize_model` refuses.
    """
    from flute_quant.model import importance_in_memory

    chosen = resolve_method(method, spec)
    plan = plan_modules(model, spec, ignore=ignore, include=include, overrides=overrides)

    def read(name: str) -> Tensor:
        return model.get_submodule(name).get_parameter("weight").detach()

    task = _Task(plan, chosen, overrides, scale_dtype, read, progress or _silent)
    task.importance = importance_in_memory(model, plan, chosen, importance)
    return task.allocate(average_bits, choices, sensitivity, model, tokens, held_out)


def allocate_checkpoint(
    src: str | Path,
    average_bits: float,
    spec: QuantSpec,
    *,
    method: str | Method = "default",
    choices: Sequence[QuantSpec] | None = None,
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    overrides: Sequence[Override] = (),
    scale_dtype: torch.dtype = torch.float16,
    experts: bool = False,
    device: str | torch.device = "cpu",
    importance: ImportanceOption = "auto",
    sensitivity: str = "kl",
    tokens: Tensor | None = None,
    held_out: Tensor | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """Bits by layer for a checkpoint folder or a GGUF file.

    Arguments and errors are those of :func:`allocate_model` and :func:`~flute_quant.quantize_checkpoint`.
    With ``sensitivity="kl"`` the model is in memory on ``device``, with ``"error"`` one weight at a time.
    """
    from flute_quant.checkpoint.loading import load_model
    from flute_quant.checkpoint.measure import compute_dtype, measure_folder
    from flute_quant.checkpoint.quantize import plan_checkpoint

    place = checked_device(device)
    with plan_checkpoint(
        src,
        spec,
        method=method,
        ignore=ignore,
        include=include,
        overrides=overrides,
        scale_dtype=scale_dtype,
        experts=experts,
    ) as plan:
        tensors = {p.name: (s.file, t) for s in plan.shards for t, p in s.linears.items()}

        def read(name: str) -> Tensor:
            file, tensor = tensors[name]
            return plan.folder.files[file].read(tensor).to(place)

        task = _Task(plan.modules, plan.method, overrides, scale_dtype, read, progress or _silent)
        specs = {p.name: p.spec for p in plan.modules.linears}
        planned = planned_importance(importance, plan.method, specs)
        task.importance = planned or measure_folder(plan.folder, specs, device=place)
        model = None
        if sensitivity == "kl":
            model = load_model(plan.folder, compute_dtype(plan.folder, place)).to(place).eval()
        return task.allocate(average_bits, choices, sensitivity, model, tokens, held_out)


@dataclass
class _Task:
    plan: QuantizationPlan
    method: Method
    overrides: Sequence[Override]
    scale_dtype: torch.dtype
    read: Callable[[str], Tensor]
    progress: Progress
    importance: ChannelImportance = field(default_factory=ChannelImportance)

    def allocate(
        self,
        average_bits: float,
        choices: Sequence[QuantSpec] | None,
        sensitivity: str,
        model: Any,
        tokens: Tensor | None,
        held_out: Tensor | None,
    ) -> Allocation:
        if sensitivity not in SENSITIVITIES:
            raise QuantizationError(
                f"sensitivity is {sensitivity!r}; supported are {', '.join(SENSITIVITIES)}."
            )
        spec = self.plan.spec
        offered = tuple(choices) if choices is not None else default_choices(spec, self.method)
        linears = {p.name: p for p in self.plan.linears}
        units = [tuple(linears[name] for name in group) for group in sibling_groups(linears)]
        options = [self._options(unit, offered) for unit in units]
        weights = sum(p.weights for p in self.plan.linears)
        least = sum(min(self._cost(unit, s) for s in o) for unit, o in zip(units, options, strict=True))
        if not least <= average_bits * weights:
            raise QuantizationError(
                f"An average of {average_bits:g} bits a weight is asked for; with scales and tables the "
                f"cheapest of {len(offered)} choices take {least / weights:.4f}."
            )
        references = self._references(offered)
        errors = self._errors(units, options, references)
        scales = self._scales(units, options, errors, references, sensitivity, model, tokens)
        tables = [
            [(self._cost(unit, s), found[s] * scale[s[0].bits]) for s in option]
            for unit, option, found, scale in zip(units, options, errors, scales, strict=True)
        ]
        found = self._candidates(units, options, tables, offered, average_bits, weights)
        specs = [self._specs(units, options, picked) for picked in found.values()]
        checked: dict[str, float] = {}
        kept = 0
        if sensitivity == "kl" and len(found) > 1:
            losses = self._measured(specs, model, held_out)
            checked = dict(zip(found, losses, strict=True))
            kept = min(range(len(losses)), key=lambda i: losses[i])
        picked = list(found.values())[kept]
        entries = [table[i] for table, i in zip(tables, picked, strict=True)]
        return Allocation(
            spec,
            specs[kept],
            sum(cost for cost, _ in entries) / weights,
            {unit[0].name: loss for unit, (_, loss) in zip(units, entries, strict=True)},
            checked,
        )

    def _candidates(
        self,
        units: list[tuple[PlannedLinear, ...]],
        options: list[list[tuple[QuantSpec, ...]]],
        tables: list[list[tuple[int, float]]],
        offered: Sequence[QuantSpec],
        average_bits: float,
        weights: int,
    ) -> dict[str, list[int]]:
        """What is worth a look, in words, to the choice of every unit; no two are the same."""
        budget = int(min(average_bits, _MOST_BITS) * weights)
        found = {"what the losses say": least_loss(tables, budget)}
        # Taking bits away is where the rule errs most: without it what is left is smaller and surer.
        whole = int(min(average_bits, _MOST_BITS))
        kept = [
            [i for i, specs in enumerate(option) if len(option) == 1 or specs[0].bits >= whole]
            for option in options
        ]
        careful = [[table[i] for i in own] for table, own in zip(tables, kept, strict=True)]
        if all(careful) and sum(min(cost for cost, _ in own) for own in careful) <= budget:
            again = least_loss(careful, budget)
            found[f"no layer below {whole} bits"] = [own[i] for own, i in zip(kept, again, strict=True)]
        best: tuple[float, QuantSpec, list[int]] | None = None
        for choice in offered:
            same = [
                option.index(tuple(fit_spec(choice, p.in_features)[0] for p in unit))
                if len(option) > 1
                else 0
                for unit, option in zip(units, options, strict=True)
            ]
            cost, loss = (sum(t[i][part] for t, i in zip(tables, same, strict=True)) for part in (0, 1))
            if cost <= budget * (1 + _UNIFORM_SLACK) and (best is None or loss < best[0]):
                best = (loss, choice, same)
        if best is not None:
            found[f"{_words(best[1])} for all"] = best[2]
        return {what: p for at, (what, p) in enumerate(found.items()) if p not in [*found.values()][:at]}

    def _specs(
        self,
        units: list[tuple[PlannedLinear, ...]],
        options: list[list[tuple[QuantSpec, ...]]],
        picked: list[int],
    ) -> dict[str, QuantSpec]:
        return {
            p.name: spec
            for unit, option, i in zip(units, options, picked, strict=True)
            for p, spec in zip(unit, option[i], strict=True)
        }

    def _measured(
        self, candidates: Sequence[Mapping[str, QuantSpec]], model: Any, held_out: Tensor | None
    ) -> list[float]:
        """The divergence of the whole model under each."""
        if held_out is None:
            held_out = held_out_tokens(model)
        found: list[float] = []
        for specs in candidates:
            # An override's modules are quantized in every one of them.
            found += measured_divergences(model, [tuple(specs)], partial(self._as_specified, specs), held_out)
            self.progress("results on held-out tokens", len(found), len(candidates))
        return found

    def _options(
        self, unit: tuple[PlannedLinear, ...], offered: Sequence[QuantSpec]
    ) -> list[tuple[QuantSpec, ...]]:
        """Specs of the unit's modules, a choice each; what an override says is none."""
        if any(matches(p.name, o.pattern) for p in unit for o in self.overrides):
            return [tuple(p.spec for p in unit)]
        return list(dict.fromkeys(tuple(fit_spec(s, p.in_features)[0] for p in unit) for s in offered))

    def _cost(self, unit: tuple[PlannedLinear, ...], specs: tuple[QuantSpec, ...]) -> int:
        """Bits that are stored for the unit."""
        return sum(
            round(
                spec.bits_per_weight(
                    p.out_features, p.in_features, table_bits=8 * self.method.table_dtype(spec).itemsize
                )
                * p.weights
            )
            for p, spec in zip(unit, specs, strict=True)
        )

    def _references(self, offered: Sequence[QuantSpec]) -> dict[int, QuantSpec]:
        """Bits to the choice of so many bits that units are measured under, in groups as in the spec."""
        group = self.plan.spec.group_size
        return {
            bits: min(
                (spec for spec in offered if spec.bits == bits),
                key=lambda s: (abs(s.group_size - group), -s.vector_size),
            )
            for bits in sorted({spec.bits for spec in offered})
        }

    def _errors(
        self,
        units: list[tuple[PlannedLinear, ...]],
        options: list[list[tuple[QuantSpec, ...]]],
        references: dict[int, QuantSpec],
    ) -> list[dict[tuple[QuantSpec, ...] | int, float]]:
        """Of every unit, the sums of its modules' errors by option, and by the bits of each reference.

        Errors are in units of the modules' own energy, weighted with the importance of channels: siblings see
        one input, so that theirs add up to the error of what the unit computes.
        """
        result = []
        for done, (unit, option) in enumerate(zip(units, options, strict=True), 1):
            totals: dict[tuple[QuantSpec, ...] | int, float] = dict.fromkeys([*option, *references], 0.0)
            energy = 0.0
            for at, p in enumerate(unit):
                own = {bits: fit_spec(spec, p.in_features)[0] for bits, spec in references.items()}
                weight = self.read(p.name)
                found = sampled_errors(
                    weight,
                    dict.fromkeys([*own.values(), *(specs[at] for specs in option)]),
                    self.method,
                    self.importance.of(p.name, weight, p.spec),
                    name=f"{p.name}.weight",
                    scale_dtype=self.scale_dtype,
                )
                error, relative = next(iter(found.values()))
                energy += error / relative if relative else 0.0
                for bits, spec in own.items():
                    totals[bits] += found[spec][0]
                for specs in option:
                    totals[specs] += found[specs[at]][0]
            result.append({key: total / energy if energy else 0.0 for key, total in totals.items()})
            self.progress("errors of choices", done, len(units))
        return result

    def _scales(
        self,
        units: list[tuple[PlannedLinear, ...]],
        options: list[list[tuple[QuantSpec, ...]]],
        errors: list[dict[tuple[QuantSpec, ...] | int, float]],
        references: dict[int, QuantSpec],
        sensitivity: str,
        model: Any,
        tokens: Tensor | None,
    ) -> list[dict[int, float]]:
        """Loss for an error of 1, of each unit by the bits of its choice."""
        if sensitivity == "error":
            every = {spec.bits for option in options for specs in option for spec in specs}
            return [dict.fromkeys(every, float(len(unit))) for unit in units]
        # What an override decided is no choice: its loss is not asked for.
        free = [i for i, option in enumerate(options) if len(option) > 1]
        scales: list[dict[int, float]] = [
            {specs[0].bits: 0.0 for specs in option} | dict.fromkeys(references, 0.0) for option in options
        ]
        names = [tuple(p.name for p in units[i]) for i in free]
        known = dict(model.named_modules())
        missing = [name for unit in names for name in unit if name not in known]
        if missing:
            raise QuantizationError(
                f"{missing[0]} and {len(missing) - 1} more are matrices of experts that the model merges, so "
                "that their part in its predictions is not measured; sensitivity 'error' serves them, too."
            )
        if not free:
            return scales
        whole = tuple(name for unit in names for name in unit)
        # One by one under few bits only: from 3 bits on, a unit's losses are to each other as its errors.
        measured = [b for b in references if b <= _LEAST_LINEAR_BITS] or [min(references)]
        parts: dict[int, list[float]] = {}
        for bits, reference in references.items():
            found = measured_divergences(
                model,
                [*(names if bits in measured else []), whole],
                partial(self._with_errors, reference),
                tokens,
                progress=partial(self.progress, f"sensitivity of layers with {bits} bits"),
            )
            *alone, together = found
            if alone:
                parts[bits] = alone
            # Measured in ascending order: more bits have parts to go by.
            nearest = min(parts, key=lambda b: abs(b - bits))
            per_error = [
                part / errors[i][nearest] if errors[i][nearest] else 0.0
                for i, part in zip(free, parts[nearest], strict=True)
            ]
            total = sum(part * errors[i][bits] for i, part in zip(free, per_error, strict=True))
            for i, part in zip(free, per_error, strict=True):
                scales[i][bits] = part * (together / total if total else 1.0)
        return scales

    def _as_specified(self, specs: Mapping[str, QuantSpec], name: str) -> Tensor:
        return self._with_errors(specs[name], name)

    def _with_errors(self, wanted: QuantSpec, name: str) -> Tensor:
        """The weight of a module as it is after quantizing, in the basis of the model."""
        weight = self.read(name)
        spec, _ = fit_spec(wanted, weight.shape[1])
        linear, _ = quantize_tensor(
            weight,
            spec,
            method=data_free_method(resolve_method(self.method, spec), spec),
            name=f"{name}.weight",
            scale_dtype=self.scale_dtype,
            importance=self.importance.of(name, weight, spec),
        )
        return dequantized(linear)


def _silent(what: str, done: int, total: int) -> None:
    return None
