"""How much each way of quantizing changes what a model says, beside peers on the same model and text.

    python packages/flute-quant/benchmarks/quality/run.py MODEL TEXT --output quality.json

The fair protocol: the model's channels are put into another order for every seed (see ``permute.py``;
the logits are checked to stay the same), its linears are quantized and dequantized, and it runs in
bfloat16 on evenly spaced windows of the text, as does the model before. ``shipped`` in place of a seed
is the model as it is. The rows are those of ``grid.json``; what the output has already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import json
import platform
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from permute import permute_channels
from rows import Row, Workshop, load_rows
from torch import Tensor

from flute_quant.evaluation import DistanceMeter, text_windows
from flute_quant.version import package_version

# Another order of additions moves logits by some 1e-6 of their size in float32; a wrong order of
# channels, by all of it.
_SAME = 1e-4
_SHIPPED = "shipped"


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8")
    chosen = text_windows(tokenizer, text, count=options.windows, length=options.length, bos=options.bos)
    windows = chosen.tokens.to(device)
    protocol = {
        "model": options.model.name,
        "text": options.text.name,
        "windows": options.windows,
        "length": options.length,
        "bos": chosen.bos,
        "calibration": options.calibration.name if options.calibration else None,
    }
    record = _record(options.output, protocol)
    original = _load(options.model, device)
    calibration = None
    if options.calibration:
        words = options.calibration.read_text(encoding="utf-8")
        shape = {"count": options.calibration_windows, "length": options.calibration_length}
        calibration = text_windows(tokenizer, words, bos=options.bos, **shape).tokens
    workshop = Workshop(device, options.calibration, calibration, dict(options.peer))
    rows = load_rows(options.rows)
    for seed in options.seeds:
        done = {run["key"] for run in record["runs"] if run["seed"] == seed}
        wanted = [row for row in rows if row.key not in done]
        for row in [row for row in wanted if workshop.missing(row)]:
            print(f"{row.key} is left out: {workshop.missing(row)}.", flush=True)
            wanted.remove(row)
        if not wanted:
            continue
        model = copy.deepcopy(original)
        if seed != _SHIPPED:
            permute_channels(model, int(seed))
            _check_same(original, model, windows[:1])
        with tempfile.TemporaryDirectory(prefix="flute-quality-") as folder:
            if any(row.peer for row in wanted):
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            runner = copy.deepcopy(model).to(torch.bfloat16)
            reference = [_logits(runner, window) for window in windows]
            for row in wanted:
                run = _run(row, seed, workshop, model, Path(folder), runner, reference, windows)
                record["runs"].append(run)
                print(json.dumps(run), flush=True)
                options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _run(
    row: Row,
    seed: str,
    workshop: Workshop,
    model: Any,
    folder: Path,
    runner: Any,
    reference: list[Tensor],
    windows: Tensor,
) -> dict[str, Any]:
    made = workshop.make(row, model, folder)
    runner.load_state_dict(model.state_dict())  # what the last row changed and this one does not
    for name, weight in made.weights:
        runner.get_submodule(name).weight.data.copy_(weight)
    meter = DistanceMeter()
    started = time.monotonic()
    for before, window in zip(reference, windows, strict=True):
        meter.add(before, _logits(runner, window), window)
    found = asdict(meter.result())
    found["evaluation_seconds"] = time.monotonic() - started
    return {
        "key": row.key,
        "row": row.name,
        "label": row.label,
        "bits": row.bits,
        "group_size": row.group_size,
        "seed": seed,
        "bits_per_weight": round(made.bits_per_weight, 4),
        "seconds": round(made.seconds, 1),
        **{key: float(f"{value:.6g}") for key, value in found.items()},
        "machine": _machine(workshop.device),
        "versions": _versions(),
        "date": dt.date.today().isoformat(),
        **made.notes,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a 16- or 32-bit model of the Llama family")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, after every run")
    parser.add_argument("--rows", nargs="+", default=[], metavar="PATTERN", help="names or keys; default all")
    parser.add_argument("--seeds", nargs="+", default=[_SHIPPED, "0", "1", "2"])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bos", default="auto")
    parser.add_argument(
        "--calibration", type=Path, metavar="TEXT", help="another text, for rows that read one"
    )
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--peer",
        type=_peer,
        action="append",
        default=[],
        metavar="SCRIPT=PYTHON",
        help="the interpreter that has the package of a script in peers/; may be repeated",
    )
    return parser.parse_args()


def _peer(text: str) -> tuple[str, Path]:
    script, _, python = text.partition("=")
    return script, Path(python)


def _record(output: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """What was measured before under the same protocol, to go on with."""
    if not output.exists():
        return {**protocol, "runs": []}
    record: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    other = {key: record.get(key) for key, value in protocol.items() if record.get(key) != value}
    if other:
        raise SystemExit(f"{output} was measured under {other}, not under {protocol}.")
    return record


def _load(folder: Path, device: torch.device) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False).to(device)


def _logits(model: Any, window: Tensor) -> Tensor:
    """``[length - 1, vocabulary]`` in the model's dtype: the last position predicts nothing that is known."""
    with torch.inference_mode():
        logits: Tensor = model(window[None]).logits[0, :-1]
    return logits


def _check_same(original: Any, permuted: Any, windows: Tensor) -> None:
    for window in windows:
        before, after = _logits(original, window), _logits(permuted, window)
        change = float((after - before).norm() / before.norm())
        if not change < _SAME:
            raise SystemExit(
                f"Permuting the channels changed the logits by {change:.2g}; expected {_SAME:.0e}."
            )


def _versions() -> dict[str, str]:
    return {
        "flute-quant": package_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
