"""What a calibrated method does after its data-free start, as values that a file can hold."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flute_quant.errors import QuantizationError

__all__ = ["LEARNED", "REFITS", "Recipe", "load_recipe"]

REFITS = ("scales", "table", "codes")
"""What a round of alternating least squares can solve for, in this order."""

LEARNED = ("none", "kl", "nll")
"""What scales are learned for at last, on the whole model: nothing, its divergence from the 16-bit model, or
the likelihood of the text."""

_TABLES = ("start", "kmeans")
# A recipe is a dozen lines.
_MAX_FILE = 1 << 16


@dataclass(frozen=True)
class Recipe:
    """The steps of a calibrated method.

    Args:
        start: the data-free method that gives the table and the first scales, weighted by the inputs' mean
            squares; also the fallback where there are no inputs. ``"default"`` is ``signed``, and
            ``lloyd-pairs`` for vectors of 2.
        table: ``"start"``, the table of that method, or ``"kmeans"``, one fitted to each weight under these
            weights before anything else.
        feedback: whether errors are fed back from column to column.
        act_order: whether the columns of the largest inputs are rounded first.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
        shrink: how far the Hessian is drawn to its own diagonal (before a rotation), from 0 to 1. The text is
            not the one that the model will see: what it says of pairs of channels is believed less than what
            it says of each.
        rounds: rounds of alternating least squares.
        refit: what each of them solves for, among :data:`REFITS`.
        propagate: whether a layer's inputs are those of the quantized model instead of the 16-bit one.
        correction: how far, from 0 to 1, weights are moved to give the 16-bit outputs on the inputs of the
            quantized model, before they are rounded. Needs ``propagate`` and another pass.
        epochs: passes over the tokens in which a layer's codes and scales are trained for the layer's 16-bit
            output, after all of the above.
        reach: how far a weight can move in them, in mean distances of neighbouring table entries; with 0
            codes stay.
        scale_reach: how far a scale can move in them, relative to itself.
        learn: what the scales of the whole model are learned for after that, one of :data:`LEARNED`. Codes
            stay, but where nothing but the start chose them: there each weight keeps to its nearest entry.
        learn_epochs: passes over the tokens for it.
        learning_rate: of Adam.

    Raises:
        QuantizationError: a value outside of its range.
    """

    start: str = "default"
    table: str = "start"
    feedback: bool = True
    act_order: bool = True
    damping: float = 0.01
    shrink: float = 0.0
    rounds: int = 0
    refit: tuple[str, ...] = REFITS
    propagate: bool = True
    correction: float = 0.0
    epochs: int = 0
    reach: float = 0.1
    scale_reach: float = 0.02
    learn: str = "none"
    learn_epochs: int = 1
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        # A file's values may be of any type, whatever the annotations say.
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        self._require("start", isinstance(values["start"], str), "the name of a data-free method")
        self._require("table", values["table"] in _TABLES, " or ".join(map(repr, _TABLES)))
        for name in ("feedback", "act_order", "propagate"):
            self._require(name, isinstance(values[name], bool), "true or false")
        self._require("damping", _is_number(self.damping, 1e-8, 10), "a number from 1e-8 to 10")
        self._require("shrink", _is_number(self.shrink, 0, 1), "a number from 0 to 1")
        self._require("correction", _is_number(self.correction, 0, 1), "a number from 0 to 1")
        for name, low, high in (("rounds", 0, 100), ("epochs", 0, 1000), ("learn_epochs", 1, 1000)):
            good = type(values[name]) is int and low <= values[name] <= high
            self._require(name, good, f"a whole number from {low} to {high}")
        self._require("reach", _is_number(self.reach, 0, 10), "a number from 0 to 10")
        self._require("scale_reach", _is_number(self.scale_reach, 0, 0.5), "a number from 0 to 0.5")
        moves = self.reach > 0 or self.scale_reach > 0 or not self.epochs
        self._require("reach", moves, "more than 0 where scale_reach is 0")
        self._require("learn", values["learn"] in LEARNED, "one of " + ", ".join(map(repr, LEARNED)))
        self._require("learning_rate", _is_number(self.learning_rate, 1e-8, 1), "a number from 1e-8 to 1")
        known = isinstance(values["refit"], tuple) and set(self.refit) <= set(REFITS)
        self._require("refit", known, f"a list of some of {', '.join(REFITS)}")
        self._require("correction", self.propagate or not self.correction, "0 where propagate is false")

    @property
    def keeps_codes(self) -> bool:
        """Whether codes are others than each weight's nearest entry under its start's scales."""
        return self.feedback or self.rounds > 0 or self.epochs > 0

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise QuantizationError(f"The recipe has {name} = {getattr(self, name)!r}; expected {expected}.")

    @classmethod
    def from_dict(cls, values: Any) -> Recipe:
        """From JSON's or YAML's values; those that are missing have their defaults.

        Raises:
            QuantizationError: not an object, an unknown key, or a value outside of its range.
        """
        if not isinstance(values, dict):
            raise QuantizationError(f"The recipe is a {type(values).__name__}; expected keys and values.")
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise QuantizationError(f"The recipe has a key {unknown[0]!r}; there are {', '.join(known)}.")
        refit = values.get("refit", REFITS)
        if isinstance(refit, list) and all(isinstance(part, str) for part in refit):
            values = {**values, "refit": tuple(refit)}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` reads."""
        return {**asdict(self), "refit": list(self.refit)}


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe: ``.json``, or ``.yaml`` where PyYAML is installed.

    Raises:
        QuantizationError: the file cannot be read, or holds no recipe.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > _MAX_FILE:
            raise QuantizationError(f"{path} has {size} bytes; a recipe has at most {_MAX_FILE}.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise QuantizationError(f"The recipe {path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise QuantizationError(f"The recipe {path} is not UTF-8 at byte {error.start}.") from None
    if path.suffix == ".json":
        try:
            return Recipe.from_dict(json.loads(text))
        except (ValueError, RecursionError) as error:
            if isinstance(error, QuantizationError):
                raise
            raise QuantizationError(f"The recipe {path} is not JSON: {error}.") from None
    if path.suffix not in (".yaml", ".yml"):
        raise QuantizationError(f"The recipe {path} is neither a .json nor a .yaml file.")
    try:
        import yaml
    except ModuleNotFoundError:
        raise QuantizationError(
            f"{path} is YAML, which needs PyYAML (pip install flute-quant[yaml]); a .json file needs nothing."
        ) from None
    try:
        return Recipe.from_dict(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise QuantizationError(f"The recipe {path} is not YAML: {' '.join(str(error).split())}.") from None


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
