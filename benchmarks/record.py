"""Where and with what a figure was measured, and the file that keeps it."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flute_kernels import build_info

__all__ = ["add_argument", "cpu_model", "gpu_model", "save"]

RESULTS = Path(__file__).parent / "results"


def cpu_model() -> str:
    """The processor's name, with what tells generations apart where the name alone does not."""
    try:
        fields = dict(
            re.findall(r"^([^\t\n]+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
        )
    except OSError:
        fields = {}
    name = fields.get("model name") or platform.processor() or platform.machine()
    family = f", family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    return f"{name}{family}, {torch.get_num_threads()} threads"


def gpu_model() -> str | None:
    """The GPU's name, its number of multiprocessors and its driver; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return f"{properties.name}, {properties.multi_processor_count} multiprocessors, driver {driver}"


def _versions() -> dict[str, str]:
    """Of what may matter and is installed."""
    versions = {"flute-kernels": build_info().version, "torch": torch.__version__}
    for package in ("transformers", "triton", "vllm", "humming-kernels", "bitsandbytes"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Options: whether to call :func:`save`, and with which tag."""
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results/")
    parser.add_argument("--tag", default="", help="for the name of that file, such as h100")


def save(name: str, figures: Any, tag: str = "") -> None:
    """Write ``figures``, machine, versions and date to ``benchmarks/results/<name>[-<tag>]-<date>.json``."""
    date = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    record = {
        "date": date,
        "cpu": cpu_model(),
        "cpu_isa": build_info().cpu_isa,
        "gpu": gpu_model(),
        "python": platform.python_version(),
        "versions": _versions(),
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{'-'.join(filter(None, (name, tag, date)))}.json"
    text = json.dumps(record, indent=1)
    lines = re.sub(r"\{[^{}]*\}", lambda inner: " ".join(inner[0].split()), text)  # a figure, a line
    path.write_text(lines + "\n", encoding="utf-8")
    print(f"saved {path}")
