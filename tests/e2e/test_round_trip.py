"""From the command line to generated text and back to disk, through all packages that have a part in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import flute_hf
from flute_quant import load_dequantized
from flute_quant.cli import main

FORMATS = {
    "4 bits": ["--bits", "4"],
    "3 bits in pairs": ["--bits", "3", "--vector-size", "2", "--method", "lloyd-pairs"],
    "2 bits, rotated": ["--bits", "2", "--group-size", "32", "--hadamard", "32"],
    "mixed": ["--bits", "3", "--override", "down_proj=bits:4,group_size:32", "--ignore", "o_proj"],
}


@pytest.fixture(scope="module", params=FORMATS)
def quantized(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model in each of the formats, written by the program that a user runs."""
    target = tmp_path_factory.mktemp("quantized") / "out"
    command = [
        sys.executable,
        "-m",
        "flute_quant",
        "quantize",
        str(tiny_model),
        str(target),
        "--dtype",
        "keep",
    ]
    done = subprocess.run([*command, *FORMATS[request.param]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Wrote {target}" in done.stdout
    return target


@pytest.fixture(scope="module")
def model(quantized: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32)


def test_it_generates_what_the_dequantized_weights_generate(
    quantized: Path, model: Any, tiny_model: Path, words: str
) -> None:
    # The source with an ordinary weight in every linear, decoded from the files by the format's definition.
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    dequantized = load_dequantized(quantized, dtype=torch.float32)
    names = [n for n, m in model.named_modules() if isinstance(m, flute_hf.FluteLinear)]
    assert len(names) == (12 if "o_proj" in json.dumps(model.config.to_dict()) else 14)
    for name in names:
        linear = reference.get_submodule(name)
        assert not torch.equal(linear.weight, dequantized.get_submodule(name).weight)
        linear.weight = dequantized.get_submodule(name).weight

    prompt = AutoTokenizer.from_pretrained(quantized)(" ".join(words.split()[:20]), return_tensors="pt")
    how = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    more = {"output_logits": True, "return_dict_in_generate": True}
    found, expected = (m.generate(**prompt, **how, **more) for m in (model, reference))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-3)


def test_saving_it_again_writes_the_same(quantized: Path, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (quantized, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    configs = [json.loads((f / "config.json").read_text("utf-8")) for f in (quantized, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_the_other_commands_read_it(
    quantized: Path,
    model: Any,
    tiny_model: Path,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", str(quantized), "--json"]) == 0
    layers = {layer["name"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, flute_hf.FluteLinear)}
    assert layers.keys() == linears.keys()
    assert all(layers[name]["bits"] == linear.spec.bits for name, linear in linears.items())

    (tmp_path / "text").write_text(words, encoding="utf-8")
    text = ["--text", str(tmp_path / "text"), "--windows", "2", "--length", "64", "--dtype", "float32"]
    assert main(["compare", str(tiny_model), str(quantized), *text, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 2 * 63
    assert 0 < found["kl"] < 20
    assert 0 < found["top1"] <= 1
