"""Tasks of lm-eval on a checkpoint, for those who have the package and its data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flute_quant.checkpoint.compare import load_dequantized
from flute_quant.checkpoint.loading import load_model
from flute_quant.checkpoint.source import CheckpointFolder
from flute_quant.checkpoint.structure import quiet_transformers
from flute_quant.devices import checked_device
from flute_quant.errors import QuantizationError, one_line
from flute_quant.evaluation import load_tokenizer

__all__ = ["evaluate_checkpoint"]


def evaluate_checkpoint(
    path: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 1,
    include: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> dict[str, dict[str, float]]:
    """Scores of a quantized checkpoint, or of a 16-bit one, in tasks of lm-eval.

    The weights are dequantized, so that no kernel has a part in the scores.

    Args:
        path: a folder that :func:`~flute_quant.quantize_checkpoint` wrote, or one that it reads.
        tasks: names of tasks or groups of them.
        limit: examples of each task; all by default.
        shots: examples in the prompt; the task's own number by default.
        batch_size: examples at once.
        include: folder with task files of your own.
        dtype, device: of the model.

    Returns:
        Task to metric to value, such as ``{"hellaswag": {"acc_norm": 0.43, "acc_norm_stderr": 0.005}}``.

    Raises:
        QuantizationError: lm-eval is not installed, or fails, whose message is in this one's.
        CheckpointError, FormatError: the folder cannot be read.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise QuantizationError(
            f"lm-eval cannot be imported ({one_line(error)}); pip install 'flute-quant[eval]' installs it."
        ) from None
    device = checked_device(device)
    folder = CheckpointFolder.open(path)
    with quiet_transformers():
        tokenizer = load_tokenizer(folder.path)
    quantized = "quantization_config" in folder.config
    model = load_dequantized(path, dtype=dtype) if quantized else load_model(folder, dtype)
    model = model.to(device).eval()
    # A third party's code, with data sets from wherever the task says.
    try:
        found: Any = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=TaskManager(include_path=None if include is None else str(include)),
            log_samples=False,
        )
    except Exception as error:
        raise QuantizationError(f"lm-eval cannot run {', '.join(tasks)}: {one_line(error)}") from None
    return {task: _numbers(scores) for task, scores in found["results"].items()}


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` becomes ``acc``: the filter is said where it is one."""
    result = {}
    for name, value in scores.items():
        metric, _, filtered = name.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and filtered:
            result[metric if filtered == "none" else name] = float(value)
    return result
