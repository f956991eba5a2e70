"""The importance of a model in memory, measured where it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from flute_kernels import QuantSpec
from flute_quant.checkpoint.structure import quiet_transformers
from flute_quant.errors import one_line
from flute_quant.importance.channels import ChannelImportance
from flute_quant.importance.meter import ChannelMeter
from flute_quant.importance.tokens import NoPassError, input_embedding, run_random_tokens

__all__ = ["measured_importance", "random_token_importance"]


def random_token_importance(
    model: nn.Module,
    linears: Mapping[str, QuantSpec],
    *,
    seen: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Mean squares of the inputs of linear modules, from one pass of 3,072 random tokens.

    The model runs where it is, in its own dtype and in evaluation mode; it is not changed.

    Args:
        model: a Transformers model with its weights loaded.
        linears: module name to its spec; where that rotates, the rotated inputs are measured.
        seen: called at each module's first input with the number of modules seen so far.

    Returns:
        Module name to float32 ``[K]`` on the CPU, of mean 1.001. Modules that no token reached (an
        expert, an encoder of images) are missing, as are those with inputs that are not finite.

    Raises:
        NoPassError: the model takes no tokens.
        Exception: whatever the model raises.
    """
    meter = ChannelMeter(linears, seen)
    embedding = input_embedding(model)
    if embedding is None:
        raise NoPassError(f"{type(model).__name__} is no Transformers model with a token embedding")
    with quiet_transformers(), meter.attached(model):
        run_random_tokens(model, embedding.weight.device)
    return meter.importance()


def measured_importance(
    measure: Callable[[], dict[str, Tensor]], linears: Mapping[str, QuantSpec]
) -> ChannelImportance:
    """What ``measure`` finds; a failure of it is no failure of the quantization but a note.

    Args:
        measure: gives importance by module name, or raises.
        linears: the modules that are to be quantized.
    """
    # A third party's model code, on a config that nobody vouches for: whatever it raises is a reason.
    try:
        values = measure()
    except Exception as error:
        reason = str(error) if isinstance(error, NoPassError) else one_line(error).rstrip(".")
        return ChannelImportance(
            "columns",
            columns=True,
            note="The importance of input channels was guessed from the weights' columns, because random "
            f"tokens could not be run through the model: {reason}.",
        )
    missed = [name for name in linears if name not in values]
    note = None
    if missed:
        note = (
            f"The importance of input channels was guessed from the weights' columns for {len(missed)} of "
            f"{len(linears)} linears, such as {missed[0]}, of which random tokens showed no inputs."
        )
    return ChannelImportance("random tokens" if values else "columns", values, columns=True, note=note)
