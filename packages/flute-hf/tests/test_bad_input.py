"""What cannot be loaded or quantized is refused in one sentence with names and numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from flute_hf import FluteConfig
from flute_kernels import FluteError, FormatError, UnsupportedError
from flute_quant import QuantizationError, quantize_checkpoint

from .helpers import flute_layers, load, quantized, rewrite, tensors_of

Q = "model.layers.0.self_attn.q_proj."
Tensors = dict[str, Tensor]


def missing(part: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(Q + part)


def made(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({Q + part: change(tensors[Q + part])})


def with_first(part: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[Q + part].view(-1)[:1].fill_(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing("qweight"), "qweight is missing from the checkpoint"),
        (missing("scales"), "scales is missing; a quantized linear has qweight, scales, codebook."),
        (missing("codebook"), "codebook is missing"),
        (missing("bias"), "bias is missing; expected [128]."),
        (made("qweight", lambda t: t[:64]), "qweight is int32 [64, 16]; expected int32 [128, 16]."),
        (made("qweight", lambda t: t.long()), "qweight is int64 [128, 16]; expected int32"),
        (made("scales", lambda t: t.float()), "scales is float32 [128, 2]; expected float16 or bfloat16"),
        (made("scales", lambda t: t[:, :1]), "expected float16 or bfloat16 [128, 2]."),
        (made("scales", lambda t: t.to(torch.float8_e4m3fn)), "expected float16 or bfloat16 [128, 2]."),
        (made("codebook", lambda t: t[:, :8]), "codebook is float16 [1, 8, 1]; expected float16 or float32"),
        (made("bias", lambda t: t[:7]), "bias is float32 [7]; expected"),
        (
            with_first("scales", torch.nan),
            "scales has 1 of 256 values that are NaN or infinite; expected none.",
        ),
        (
            with_first("scales", torch.inf),
            "scales has 1 of 256 values that are NaN or infinite; expected none.",
        ),
        (with_first("codebook", torch.nan), "codebook has 1 of 16 values that are NaN or infinite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors(change: Callable[[Tensors], object], message: str, qwen2_4bit: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen2_4bit, tmp_path / "q")
    rewrite(folder, change)
    with pytest.raises(FormatError) as caught:
        load(folder)
    assert str(caught.value).startswith(Q)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is 2; this release reads 1."),
        ({"bits": 5}, "bits is 5; supported are 2, 3 and 4."),
        ({"group_size": 48}, "group_size is 48"),
        ({"bits": 3}, "qweight"),
        ({"group_size": 32}, "scales is float16 [128, 2]; expected float16 or bfloat16 [128, 4]"),
        ({"vector_size": 2}, "codebook is float16 [1, 16, 1]; expected float16 or float32 [1, 256, 2]"),
        ({"modules_to_not_convert": []}, None),
        (
            {"modules_to_not_convert": ["lm_head", Q.rstrip(".")]},
            f"{Q}qweight is in the checkpoint, but modules_to_not_convert has {Q.rstrip('.')}",
        ),
    ],
    ids=["version", "bits5", "group48", "bits3", "group32", "pairs", "head", "kept"],
)
def test_configs(change: dict[str, Any], message: str | None, llama4bit: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama4bit, tmp_path / "q")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(change)
    path.write_text(json.dumps(config))
    if message is None:  # a head stored in 16 bits is one, whatever the list says
        assert "lm_head" not in flute_layers(load(folder))
        return
    with pytest.raises(FormatError) as caught:
        load(folder)
    assert message in str(caught.value)


def test_a_truncated_file(llama4bit: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama4bit, tmp_path / "q")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"model\.safetensors cannot be read as safetensors"):
        load(folder)


def test_a_pickle_is_not_opened(llama4bit: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama4bit, tmp_path / "q")
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"pytorch_model\.bin is no \.safetensors file"):
        load(folder)


def test_a_state_dict_in_place_of_files(llama4bit: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(llama4bit)
    with pytest.raises(FormatError, match=r"is loaded from \.safetensors files"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors_of(llama4bit))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(value: float, llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "broken")
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda t: t[name].view(-1)[:2].fill_(value))
    with pytest.raises(QuantizationError) as caught:
        quantized(folder)
    assert str(caught.value) == f"{name} has 2 of 24576 weights that are NaN or infinite; expected none."


@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_sources_that_lack_a_tensor(tensor: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(source("qwen2"), tmp_path / "broken")
    rewrite(folder, lambda t: t.pop(Q + tensor))
    with pytest.raises(FormatError, match=rf"{Q}{tensor} is missing from the checkpoint"):
        quantized(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"modules_to_not_convert": ["out_proj"]},
            "ignore 'out_proj' matches none of the model's 15 linear modules",
        ),
        ({"overrides": {"lm": {"bits": 3}}}, "override 'lm' matches none"),
        ({"method": "magic"}, "The method 'magic' is unknown; there are"),
        ({"modules_to_not_convert": ["model.*"]}, "LlamaForCausalLM has 15 linear modules and none of them"),
    ],
    ids=["ignore", "override", "method", "nothing"],
)
def test_options_that_fit_no_module(options: dict[str, Any], message: str, llama: Path) -> None:
    with pytest.raises(QuantizationError) as caught:
        quantized(llama, **options)
    assert message in str(caught.value)


def test_a_model_without_linear_modules(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(tmp_path)
    with pytest.raises(QuantizationError, match="GPT2LMHeadModel has 1 linear modules and none of them"):
        quantized(tmp_path)


@pytest.mark.parametrize("quantize", [False, True])
def test_a_dtype_that_no_kernel_computes_in(quantize: bool, llama: Path, llama4bit: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"dtype is torch\.float64; FLUTE computes in float32, float16"
    ):
        quantized(llama, torch.float64) if quantize else load(llama4bit, torch.float64)


def test_a_device_without_kernels(llama4bit: Path) -> None:
    """Stands for a GPU that this build has no kernels for."""
    with pytest.raises(FluteError, match=r"qweight was left on disk|device is meta"):
        load(llama4bit, device_map={"": "meta"})


def test_another_methods_config_for_a_quantized_folder(llama4bit: Path) -> None:
    from transformers import QuantoConfig

    with pytest.raises(ValueError, match="quantized with FluteConfig but you are passing a QuantoConfig"):
        AutoModelForCausalLM.from_pretrained(llama4bit, quantization_config=QuantoConfig())


def test_nothing_is_kept_of_a_failed_load(llama: Path, tmp_path: Path) -> None:
    config = FluteConfig()
    folder = shutil.copytree(llama, tmp_path / "broken")
    rewrite(folder, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(torch.nan))
    with pytest.raises(QuantizationError):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert len(flute_layers(AutoModelForCausalLM.from_pretrained(llama, quantization_config=config))) == 14


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_in_codes(source: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Transformers would look for 16-bit experts, find none, and leave theirs uninitialised."""
    quantize_checkpoint(source(family), tmp_path / "q", experts=True)
    with pytest.raises(FormatError, match=r"experts\.3\.\w+\.qweight is of one expert") as caught:
        load(tmp_path / "q")
    assert "merges with others into model.layers.0.mlp.experts." in str(caught.value)


def test_a_method_that_needs_a_text(llama: Path) -> None:
    config = FluteConfig(bits=4, group_size=32, method="gptq")
    with pytest.raises(QuantizationError, match="'gptq' needs a calibration text"):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=config)
