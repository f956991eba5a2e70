"""Checkpoints that others quantized come out with the values that they had, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from flute_kernels import LutWeight, QuantizationConfig
from flute_quant import (
    CheckpointError,
    QuantizationError,
    import_checkpoint,
    importer_names,
    inspect_checkpoint,
)
from flute_quant.checkpoint.quantized import QuantizedFolder
from flute_quant.cli import main
from flute_quant.importers.tiles import unpack_tiles

from . import foreign

Copy = Callable[[str], Path]


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer whose linears have 256 outputs or more: upstream packs no smaller ones."""
    folder = tmp_path_factory.mktemp("wide") / "source"
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=128,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def imported(folder: Path) -> dict[str, torch.Tensor]:
    """Dequantized weights of a FLUTE folder, by the format's definition."""
    quantized = QuantizedFolder.open(folder)
    return {name: quantized.linear(name).dequantize() for name in quantized.modules}


def assert_same(folder: Path, values: foreign.Values) -> None:
    found = imported(folder)
    assert set(found) == set(values)
    for name, value in values.items():
        assert torch.equal(found[name], value), name


# --- every source ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [64, 128, 256, 512, 1024, 2048, 4096])
def test_bitsandbytes_is_exact_at_every_block_size(
    checkpoints: Copy, tmp_path: Path, kind: str, block: int
) -> None:
    # Rows of 64 and of 96 weights: blocks hold many rows, and begin in the middle of one.
    values = foreign.write_bitsandbytes(checkpoints("llama"), tmp_path / "source", kind=kind, block=block)
    report = import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert report.importer == "bitsandbytes"
    assert report.exact
    assert report.notes == {}
    assert_same(tmp_path / "out", values)


def test_double_quantized_scales_are_rounded_to_float16_and_nothing_else_is(
    checkpoints: Copy, tmp_path: Path
) -> None:
    source = load_file(checkpoints("llama") / "model.safetensors")
    values = foreign.write_bitsandbytes(checkpoints("llama"), tmp_path / "source", nested=True)
    report = import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert not report.exact
    for name, found in imported(tmp_path / "out").items():
        _, value, scale = foreign.bitsandbytes_tensors(source[f"{name}.weight"], nested=True)
        assert torch.equal(value, values[name])
        exact = torch.from_numpy(scale)
        # The looked-up value, times the scale after one rounding to float16.
        looked_up = (value.double() / exact.double()).float()
        table = torch.tensor(foreign.NF4)
        looked_up = table[(looked_up[..., None] - table).abs().argmin(-1)]
        assert torch.equal(looked_up * exact, value)
        assert torch.equal(found, looked_up * exact.half().float())
        error = float((found - value).double().square().sum() / value.double().square().sum())
        assert report.errors[name] == pytest.approx(error, rel=1e-4)
        assert 0 < report.errors[name] < 2**-22  # half a step of float16 at most, squared
    assert set(report.notes.values()) == {"double-quantized scales rounded to float16"}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_is_exact_in_both_versions_of_its_format(
    checkpoints: Copy, tmp_path: Path, bits: int, version: int
) -> None:
    values = foreign.write_gptq(checkpoints("llama"), tmp_path / "source", bits=bits, version=version)
    report = import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert report.exact
    assert {layer.bits for layer in inspect_checkpoint(tmp_path / "out").layers} == {bits}
    assert_same(tmp_path / "out", values)


def test_gptq_codes_are_the_same_bit_stream(checkpoints: Copy, tmp_path: Path) -> None:
    foreign.write_gptq(checkpoints("llama"), tmp_path / "source", bits=3)
    import_checkpoint(tmp_path / "source", tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.qweight"
    before = load_file(tmp_path / "source/model.safetensors")[name]
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[name], before.t())


@pytest.mark.parametrize(("bits", "wider"), [(2, 3), (3, 4)])
def test_zero_points_that_differ_take_a_larger_table(
    wide: Path, tmp_path: Path, bits: int, wider: int
) -> None:
    zeros = torch.randint(1, 1 << bits, (2, 256), generator=torch.Generator().manual_seed(0))
    g_idx = torch.tensor([1, 0]).repeat_interleave(128)
    values = foreign.write_gptq(wide, tmp_path / "source", bits=bits, group=128, zeros=zeros, g_idx=g_idx)
    report = import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert report.exact
    assert f"{wider} bits for {bits}-bit codes with zero points from 1 to {2**bits - 1}" in set(
        report.notes.values()
    )
    assert {layer.bits for layer in inspect_checkpoint(tmp_path / "out").layers} == {wider}
    assert_same(tmp_path / "out", values)


def test_groups_in_another_order_are_exact(wide: Path, tmp_path: Path) -> None:
    g_idx = torch.tensor([3, 0, 2, 1]).repeat_interleave(64)  # as static groups with act-order give
    values = foreign.write_gptq(wide, tmp_path / "source", group=64, g_idx=g_idx)
    import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert {layer.group_size for layer in inspect_checkpoint(tmp_path / "out").layers} == {64}
    assert_same(tmp_path / "out", values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gptq_scales_of_another_dtype(checkpoints: Copy, tmp_path: Path, dtype: torch.dtype) -> None:
    values = foreign.write_gptq(checkpoints("llama"), tmp_path / "source", scale_dtype=dtype)
    report = import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert report.exact == (dtype == torch.bfloat16)
    if report.exact:
        assert_same(tmp_path / "out", values)
    for name, found in imported(tmp_path / "out").items():
        assert torch.allclose(found, values[name], rtol=2**-11, atol=0)
        error = float((found - values[name]).double().square().sum() / values[name].double().square().sum())
        assert report.errors[name] == pytest.approx(error, rel=1e-3)


def test_an_old_gptq_folder_without_g_idx_and_with_a_file_of_its_own(
    checkpoints: Copy, tmp_path: Path
) -> None:
    def encode(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tensors, values = foreign.gptq_tensors(weight)
        # AutoGPTQ stores biases of zeros for layers that have none.
        bias = torch.zeros(len(weight), dtype=torch.float16)
        return {**{k: v for k, v in tensors.items() if k != ".g_idx"}, ".bias": bias}, values

    values = foreign.write(checkpoints("llama"), tmp_path / "source", encode, None)
    (tmp_path / "source/quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    report = import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert report.importer == "gptq"
    assert_same(tmp_path / "out", values)
    assert not any(name.endswith("bias") for name in load_file(tmp_path / "out/model.safetensors"))
    assert not (tmp_path / "out/quantize_config.json").exists()


def test_awq_is_exact(checkpoints: Copy, tmp_path: Path) -> None:
    values = foreign.write_awq(checkpoints("llama"), tmp_path / "source")
    assert import_checkpoint(tmp_path / "source", tmp_path / "out").importer == "awq"
    assert_same(tmp_path / "out", values)


@pytest.mark.parametrize(("bits", "tile"), [(4, 32), (4, 64), (2, 32)])
def test_upstream_is_exact(wide: Path, tmp_path: Path, bits: int, tile: int) -> None:
    values = foreign.write_upstream(wide, tmp_path / "source", bits=bits, tile=tile)
    config = tmp_path / "source/flute_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tile_p": tile}))
    report = import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert report.importer == "flute-kernel"
    assert_same(tmp_path / "out", values)
    assert not (tmp_path / "out/flute_config.json").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "p", "template"), [(4, 2, 20), (4, 2, 50), (2, 2, 4), (4, 1, 16), (2, 1, 30)]
)
def test_higgs_is_exact(
    wide: Path, tmp_path: Path, bits: int, p: int, template: int, dtype: torch.dtype
) -> None:
    values = foreign.write_higgs(
        wide, tmp_path / "source", bits=bits, p=p, template=template, size=128, dtype=dtype
    )
    assert import_checkpoint(tmp_path / "source", tmp_path / "out").importer == "higgs"
    assert_same(tmp_path / "out", values)
    # As layers multiply: x is rotated by an orthogonal Hadamard matrix in blocks of 128, without signs.
    matrix = torch.ones(1, 1)
    while len(matrix) < 128:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    name, stored = next(iter(values.items()))
    expected = (stored.double().view(len(stored), -1, 128) @ (matrix.double() / 128**0.5)).view(stored.shape)
    weight = LutWeight.from_linear(QuantizedFolder.open(tmp_path / "out").linear(name))
    assert torch.allclose(weight.dequantize().double(), expected, rtol=0, atol=2e-6 * expected.abs().max())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_that_upstream_packed_itself(bits: int) -> None:
    packed = load_file(Path(__file__).parent / "data/upstream-packed.safetensors")
    codes = unpack_tiles(packed[f"w{bits}.weight"], bits, 32, "weight")
    assert torch.equal(codes, packed[f"w{bits}.codes"])


# --- the folder -----------------------------------------------------------------------------------


def test_everything_else_of_the_folder_stays(checkpoints: Copy, tmp_path: Path) -> None:
    foreign.write_bitsandbytes(checkpoints("qwen2"), tmp_path / "source")
    report = import_checkpoint(tmp_path / "source", tmp_path / "out")
    before = load_file(checkpoints("qwen2") / "model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    kept = {name for name in before if not name.endswith("_proj.weight")}
    assert any(name.endswith("q_proj.bias") for name in kept)
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])
    rest = {name.rpartition(".")[2] for name in set(after) - kept}
    assert rest == {"qweight", "scales", "codebook"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoints("qwen2") / name).read_bytes()
    config = json.loads((tmp_path / "out/config.json").read_text())
    stored = QuantizationConfig.from_dict(config.pop("quantization_config"))
    assert stored.method == "import bitsandbytes"
    assert stored.modules_to_not_convert == ("lm_head",)
    assert report.left == {"lm_head": "not quantized in the source"}
    assert config == json.loads((checkpoints("qwen2") / "config.json").read_text())


def test_the_result_can_be_inspected(checkpoints: Copy, tmp_path: Path) -> None:
    foreign.write_gptq(checkpoints("llama"), tmp_path / "source", bits=3)
    report = import_checkpoint(tmp_path / "source", tmp_path / "out")
    found = inspect_checkpoint(tmp_path / "out")
    assert found.method == "import gptq"
    assert len(found.layers) == 14
    assert all(layer.error == 0 for layer in found.layers)
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)


def test_layers_with_other_bits_become_overrides(checkpoints: Copy, tmp_path: Path) -> None:
    def encode(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return foreign.gptq_tensors(weight, bits=2 if "down_proj" in name else 4)

    config = {"quant_method": "gptq", "bits": 4, "dynamic": {".*down.*": {"bits": 2}}}
    values = foreign.write(checkpoints("llama"), tmp_path / "source", encode, config)
    import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert_same(tmp_path / "out", values)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["overrides"]["model.layers.1.mlp.down_proj"] == {"bits": 2}


def test_files_in_many_shards_keep_their_names(checkpoints: Copy, tmp_path: Path) -> None:
    values = foreign.write_bitsandbytes(checkpoints("llama-sharded"), tmp_path / "source", block=256)
    index = json.loads((tmp_path / "source/model.safetensors.index.json").read_text())
    for file in (tmp_path / "source").glob("*.safetensors"):
        index["weight_map"].update(dict.fromkeys(load_file(file), file.name))
    index["weight_map"] = {
        t: f for t, f in index["weight_map"].items() if t in load_file(tmp_path / "source" / f)
    }
    (tmp_path / "source/model.safetensors.index.json").write_text(json.dumps(index))
    import_checkpoint(tmp_path / "source", tmp_path / "out")
    # 32-bit weights have 32-bit maxima.
    for name, found in imported(tmp_path / "out").items():
        assert torch.allclose(found, values[name], rtol=2**-11, atol=0)
    names = {file.name for file in (tmp_path / "source").glob("*.safetensors")}
    assert {file.name for file in (tmp_path / "out").glob("*.safetensors")} == names
    written = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(written["weight_map"].values()) == names


def test_an_interrupted_import_resumes_to_the_same_bytes(checkpoints: Copy, tmp_path: Path) -> None:
    foreign.write_gptq(checkpoints("llama-sharded"), tmp_path / "source")
    index = {"weight_map": {}}
    for file in sorted((tmp_path / "source").glob("*.safetensors")):
        index["weight_map"].update(dict.fromkeys(load_file(file), file.name))
    (tmp_path / "source/model.safetensors.index.json").write_text(json.dumps(index))
    import_checkpoint(tmp_path / "source", tmp_path / "whole")

    class Stop(BaseException):
        pass

    seen = []

    def stop(event: Any) -> None:
        seen.append(event.name)
        if len(seen) == 6:
            raise Stop

    with pytest.raises(Stop):
        import_checkpoint(tmp_path / "source", tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    said: list[str] = []
    report = import_checkpoint(tmp_path / "source", tmp_path / "out", say=said.append)
    assert report.resumed > 0
    assert "Resuming" in said[0]
    whole = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == whole


def test_single_experts_are_imported_by_their_own_names(checkpoints: Copy, tmp_path: Path) -> None:
    def encode(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return foreign.gptq_tensors(weight)

    values = foreign.write(checkpoints("qwen3-moe"), tmp_path / "source", encode, {"quant_method": "gptq"})
    assert any(".experts.3." in name for name in values)
    import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert_same(tmp_path / "out", values)


# --- refusals -------------------------------------------------------------------------------------


def refused(folder: Path, match: str, leaves_nothing: Callable[[], None], **options: Any) -> None:
    with pytest.raises((CheckpointError, QuantizationError), match=match):
        import_checkpoint(folder, folder.parent / "out", **options)
    leaves_nothing()


def test_act_order_is_refused(wide: Path, tmp_path: Path, leaves_nothing: Callable[[], None]) -> None:
    g_idx = torch.arange(256) % 2
    foreign.write_gptq(wide, tmp_path / "source", group=128, g_idx=g_idx)
    refused(
        tmp_path / "source",
        r"_proj\.g_idx gives the 32 inputs from 0 on 2 different scales \(act-order\), as it does in 8 of 8",
        leaves_nothing,
    )


def test_asymmetric_gptq_of_4_bits_is_refused(
    wide: Path, tmp_path: Path, leaves_nothing: Callable[[], None]
) -> None:
    zeros = torch.randint(5, 12, (2, 256), generator=torch.Generator().manual_seed(0))
    foreign.write_gptq(wide, tmp_path / "source", group=128, zeros=zeros)
    refused(tmp_path / "source", r"qzeros has zero points from 5 to 11 .*stand for 22 values", leaves_nothing)


def test_asymmetric_awq_is_refused(
    checkpoints: Copy, tmp_path: Path, leaves_nothing: Callable[[], None]
) -> None:
    def encode(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        zeros = torch.arange(len(weight)) % 3 + 7
        return foreign.awq_tensors(weight, zero=zeros)

    foreign.write(checkpoints("llama"), tmp_path / "source", encode, {"quant_method": "awq"})
    refused(tmp_path / "source", r"qzeros has zero points from 7 to 9 \(asymmetric", leaves_nothing)


def test_a_zero_point_that_readers_disagree_on_is_refused(
    wide: Path, tmp_path: Path, leaves_nothing: Callable[[], None]
) -> None:
    zeros = torch.full((2, 256), 2)
    zeros[0, 5] = 4  # stored as 3, which readers of the first version take for 4 or for 0
    foreign.write_gptq(wide, tmp_path / "source", bits=2, group=128, zeros=zeros)
    refused(
        tmp_path / "source", r"zero point 3 in the format 'gptq', which readers take for 4 or", leaves_nothing
    )


def test_bits_that_the_format_lacks_are_refused(
    checkpoints: Copy, tmp_path: Path, leaves_nothing: Callable[[], None]
) -> None:
    def encode(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tensors, values = foreign.gptq_tensors(weight)
        return {**tensors, ".qweight": tensors[".qweight"].repeat(2, 1)}, values

    foreign.write(checkpoints("llama"), tmp_path / "source", encode, {"quant_method": "gptq", "bits": 8})
    refused(tmp_path / "source", r"qweight has \d+ words along its inputs, 8.0 bits a weight", leaves_nothing)


def test_groups_that_the_format_lacks_are_refused(
    checkpoints: Copy, tmp_path: Path, leaves_nothing: Callable[[], None]
) -> None:
    foreign.write_awq(checkpoints("llama"), tmp_path / "source", group=16)
    refused(tmp_path / "source", r"scales has groups of 16 in rows of \d+; supported are", leaves_nothing)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit weights; supported are its 4-bit"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "GPTQ in the format 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ in the layout 'gemv' with 4 bits"),
        ({"quant_method": "higgs", "bits": 5}, "HIGGS with bits 5 and p 2; supported are 2, 3 and 4 bits"),
        ({"quant_method": "hqq"}, "is quantized by 'hqq'; importers exist for bitsandbytes, gptq"),
        ({"quant_method": "flute", "format_version": 1}, "is a FLUTE checkpoint already"),
        ({"quant_method": "bitsandbytes"}, "none of the tensors that its quantization_config announces"),
        (None, "does not say how it is quantized"),
    ],
)
def test_what_no_importer_takes_is_refused(
    checkpoints: Copy,
    tmp_path: Path,
    config: dict[str, Any] | None,
    match: str,
    leaves_nothing: Callable[[], None],
) -> None:
    foreign.write(checkpoints("llama"), tmp_path / "source", lambda n, w: ({".weight": w}, w), config)
    refused(tmp_path / "source", match, leaves_nothing)


def test_a_packing_that_nothing_tells_is_asked_for(
    wide: Path, tmp_path: Path, leaves_nothing: Callable[[], None]
) -> None:
    foreign.write_upstream(wide, tmp_path / "source", sms=False)
    refused(
        tmp_path / "source",
        r'256 outputs of 4 bits, is packed in tiles of 32 or 64.*"tile_p"',
        leaves_nothing,
    )


@pytest.mark.parametrize(
    ("suffix", "change", "match"),
    [
        (".qzeros", lambda t: t[:, :-1], r"qzeros is \[2, \d+\]; expected \[2, \d+\] for 2 groups of"),
        (".scales", lambda t: t[:, :-1], r"scales is \[2, \d+\]; expected \[K / g, \d+\]"),
        (".scales", lambda t: t * torch.inf, r"scales has \d+ of \d+ scales that are NaN or infinite"),
        (".scales", lambda t: None, r"lacks .*scales, of dtype F16 or BF16 or F32"),
        (".qweight", lambda t: t.to(torch.int64), r"qweight is I64 .*; expected I32"),
        (".g_idx", lambda t: t[:0], r"g_idx names the groups of 0 inputs; there are 64"),
        (".g_idx", lambda t: t[None], r"g_idx is torch.int32 \[1, 64\]; expected int32 \[K\]"),
        (".qweight", lambda t: t[:0], r"qweight is \[0, 64\]; expected two dimensions"),
        (".g_idx", lambda t: t + 1, r"g_idx names the groups 1 to \d+; its scales have 0 to"),
        (
            ".bias",
            lambda t: torch.ones(64, dtype=torch.float16),
            r"bias has 64 of 64 values that are not zero",
        ),
    ],
)
def test_damaged_tensors_are_refused(
    checkpoints: Copy,
    tmp_path: Path,
    suffix: str,
    change: Callable[[Any], Any],
    match: str,
    leaves_nothing: Callable[[], None],
) -> None:
    def encode(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tensors, values = foreign.gptq_tensors(weight)
        if name.endswith("0.self_attn.q_proj"):
            tensors[suffix] = change(tensors.get(suffix))
        return {k: v for k, v in tensors.items() if v is not None}, values

    config = {"quant_method": "gptq", "bits": 4}
    foreign.write(checkpoints("llama"), tmp_path / "source", encode, config)
    refused(tmp_path / "source", match, leaves_nothing)


@pytest.mark.parametrize(
    ("suffix", "change", "match"),
    [
        (".weight", lambda t: t[:-1], r"weight has 2047 bytes; 64 x 64 codes of 4 bits take 2048"),
        (".weight.absmax", lambda t: t[:-1], r"absmax has 63 values; expected 64 for 64 x 64 weights"),
        (".weight.quant_map", lambda t: t[:8], r"quant_map has 8 values; expected 16"),
        (".weight.quant_state.bitsandbytes__nf4", lambda t: t[:9], r"is not the state of a 4-bit weight"),
        (".weight.absmax", lambda t: t.to(torch.uint8), r"absmax is U8 \[64\]; expected F32"),
        (
            ".weight.nested_absmax",
            lambda t: t.repeat(2),
            r"2 nested ones and a table of 256; expected uint8, 1",
        ),
        (".weight.nested_quant_map", lambda t: t[:9], r"a table of 9; expected uint8, 1 and 256"),
    ],
)
def test_damaged_bitsandbytes_tensors_are_refused(
    checkpoints: Copy,
    tmp_path: Path,
    suffix: str,
    change: Callable[[Any], Any],
    match: str,
    leaves_nothing: Callable[[], None],
) -> None:
    def encode(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tensors, values, _ = foreign.bitsandbytes_tensors(weight, nested="nested" in suffix)
        if name.endswith("0.self_attn.q_proj"):
            tensors[suffix] = change(tensors[suffix])
        return tensors, values

    foreign.write(checkpoints("llama"), tmp_path / "source", encode, {"quant_method": "bitsandbytes"})
    refused(tmp_path / "source", match, leaves_nothing)


def test_options_are_checked(checkpoints: Copy, tmp_path: Path, leaves_nothing: Callable[[], None]) -> None:
    foreign.write_gptq(checkpoints("llama"), tmp_path / "source")
    refused(tmp_path / "source", "no importer 'gtpq'; known are bitsandbytes", leaves_nothing, source="gtpq")
    refused(tmp_path / "source", "dtype is torch.int8", leaves_nothing, dtype=torch.int8)
    refused(tmp_path / "source-gone", "does not exist", leaves_nothing)
    assert importer_names() == ("bitsandbytes", "gptq", "awq", "gguf", "flute-kernel", "higgs")


# --- the command ----------------------------------------------------------------------------------


def test_the_command_says_what_it_did(
    checkpoints: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.write_bitsandbytes(checkpoints("llama"), tmp_path / "source", block=128)
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "1 linear left in 16 bits, not quantized in the source (such as lm_head)." in out
    assert "14 linears from bitsandbytes, in" in out
    assert "All of them have exactly the values that they had." in out
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "method import bitsandbytes" in capsys.readouterr().out


def test_the_command_says_what_was_rounded(
    checkpoints: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.write_bitsandbytes(checkpoints("llama"), tmp_path / "source", nested=True)
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "14 linears with double-quantized scales rounded to float16 (such as model.layers.0" in out
    assert "changed their values by a relative squared error of" in out


def test_the_command_refuses_with_a_sentence(
    checkpoints: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str], leaves_nothing: Callable[[], None]
) -> None:
    foreign.write_gptq(checkpoints("llama"), tmp_path / "source")
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "out"), "--from", "awq"]) == 2
    assert "qzeros" in capsys.readouterr().err
    leaves_nothing()
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    help_text = capsys.readouterr().out
    assert all(name in help_text for name in importer_names())


def test_the_command_replaces_only_when_told(
    checkpoints: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.write_gptq(checkpoints("llama"), tmp_path / "source")
    arguments = ["import", str(tmp_path / "source"), str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
