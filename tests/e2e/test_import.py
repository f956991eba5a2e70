"""A checkpoint that others quantized → ``flute-quant import`` → Transformers: the same model as its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import flute_hf
from flute_quant import inspect_checkpoint
from flute_quant.cli import main

# The writers of other people's layouts, which flute-quant's own tests are about.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "packages/flute-quant/tests"))
import foreign


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit Qwen2, which has biases, with linears that every one of the sources can hold."""
    folder = tmp_path_factory.mktemp("import") / "source"
    config = transformers.Qwen2Config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=128,
        initializer_range=0.1,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


WRITERS: dict[str, Callable[[Path, Path], foreign.Values]] = {
    "bitsandbytes-nf4": foreign.write_bitsandbytes,
    "bitsandbytes-fp4": lambda a, b: foreign.write_bitsandbytes(a, b, kind="fp4", block=1024),
    "gptq-4": foreign.write_gptq,
    "gptq-3": lambda a, b: foreign.write_gptq(a, b, bits=3, group=128, version=2),
    "gptq-2": lambda a, b: foreign.write_gptq(a, b, bits=2, group=64),
    "awq": foreign.write_awq,
    "flute-kernel": foreign.write_upstream,
}


@pytest.mark.parametrize("kind", list(WRITERS))
def test_logits_are_those_of_the_dequantized_source(source: Path, tmp_path: Path, kind: str) -> None:
    values = WRITERS[kind](source, tmp_path / kind)
    assert main(["import", str(tmp_path / kind), str(tmp_path / "out")]) == 0

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, flute_hf.FluteLinear)}
    assert set(layers) == set(values)
    twin: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, value in values.items():
        assert torch.equal(layers[name].dequantize().weight, value), name
        twin.get_submodule(name).weight.data = value
    ids = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = model(ids).logits, twin(ids).logits
    # The same weights; what differs is the order in which a kernel adds.
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert all(layer.error == 0 for layer in inspect_checkpoint(tmp_path / "out").layers)


def test_an_imported_model_is_saved_and_loaded_again(source: Path, tmp_path: Path) -> None:
    values = foreign.write_gptq(source, tmp_path / "gptq")
    assert main(["import", str(tmp_path / "gptq"), str(tmp_path / "out")]) == 0
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    for name, value in values.items():
        assert torch.equal(model.get_submodule(name).dequantize().weight, value)


def test_higgs_rotates_as_its_source_does(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 4, "p": 2, "template": 16, "size": 256, "dtype": torch.float16}
    values = foreign.write_higgs(source, tmp_path / "higgs", **options)
    assert main(["import", str(tmp_path / "higgs"), str(tmp_path / "out")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < 256:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    twin: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, value in values.items():
        rotated = (value.double().view(len(value), -1, 256) @ matrix / 16).view(value.shape)
        twin.get_submodule(name).weight.data = rotated.float()
    ids = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = model(ids).logits, twin(ids).logits
    assert (found - expected).norm() <= 1e-4 * expected.norm()
