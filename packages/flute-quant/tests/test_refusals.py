"""Bad input: one sentence with the numbers, and nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flute_kernels import FluteError, FormatError, QuantSpec
from flute_quant import CheckpointError, QuantizationError, inspect_checkpoint, quantize_checkpoint
from flute_quant.checkpoint.source import INDEX_NAME, CheckpointFolder

Copy = Callable[[str], Path]
Nothing = Callable[[], None]
NAME = "model.layers.1.mlp.up_proj.weight"


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(
    folder: Path, out: Path, said: str, kind: type[FluteError] = CheckpointError, **options: Any
) -> None:
    with pytest.raises(kind, match=said) as caught:
        quantize_checkpoint(folder, out, **options)
    assert "\n" not in str(caught.value)


def test_a_truncated_shard(copy_of: Copy, tmp_path: Path, leaves_nothing: Nothing) -> None:
    source = copy_of("llama-sharded")
    shard = sorted(source.glob("*.safetensors"))[2]
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 10)
    refused(source, tmp_path / "out", f"{shard.name} has {size - 10} bytes and its header describes {size}")
    leaves_nothing()


def test_a_missing_shard(copy_of: Copy, tmp_path: Path, leaves_nothing: Nothing) -> None:
    source = copy_of("llama-sharded")
    shards = sorted(source.glob("*.safetensors"))
    shards[1].unlink()
    refused(source, tmp_path / "out", f"has no {shards[1].name}.* one of {len(shards)} files")
    leaves_nothing()


def test_a_tensor_that_the_index_promises_and_no_file_has(copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of("llama-sharded")
    first = sorted(source.glob("*.safetensors"))[0].name
    edit_json(source / INDEX_NAME, lambda index: index["weight_map"].update({"a.weight": first}))
    refused(source, tmp_path / "out", "lacks a.weight, one of 1 tensors")


def test_a_linear_without_a_tensor(copy_of: Copy, tmp_path: Path, leaves_nothing: Nothing) -> None:
    source = copy_of("llama")
    edit_tensors(source, lambda tensors: tensors.pop(NAME))
    refused(source, tmp_path / "out", f"no tensor for 1 of the model's 14 linear modules; .* {NAME}")
    leaves_nothing()


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(96, 32), r"F32 \[96, 32\]; expected .* \[96, 64\]"),
        (torch.zeros(96, 64, dtype=torch.int8), r"I8 \[96, 64\]; expected F64, F32, F16 or BF16"),
        (torch.zeros(96, 64).to(torch.float8_e4m3fn), r"F8_E4M3 \[96, 64\]"),
    ],
)
def test_a_tensor_of_wrong_shape_or_dtype(
    copy_of: Copy, tmp_path: Path, leaves_nothing: Nothing, tensor: torch.Tensor, said: str
) -> None:
    source = copy_of("llama")
    edit_tensors(source, lambda tensors: tensors.update({NAME: tensor}))
    refused(source, tmp_path / "out", f"{NAME} is {said}")
    leaves_nothing()


@pytest.mark.parametrize("name", [NAME, "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_named(
    copy_of: Copy, tmp_path: Path, leaves_nothing: Nothing, name: str, value: float
) -> None:
    source = copy_of("llama")
    edit_tensors(source, lambda tensors: tensors[name].view(-1)[:3].fill_(value))
    refused(source, tmp_path / "out", rf"{name} has 3 of \d+ .* NaN or infinite", QuantizationError)
    leaves_nothing()


def test_a_cast_that_overflows_is_named(copy_of: Copy, tmp_path: Path, leaves_nothing: Nothing) -> None:
    source = copy_of("llama")
    edit_tensors(source, lambda tensors: tensors["model.norm.weight"].view(-1)[:2].fill_(1e6))
    refused(
        source,
        tmp_path / "out",
        "model.norm.weight has 2 of 64 .* as F16;",
        QuantizationError,
        dtype="float16",
    )
    leaves_nothing()


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "x\x00.safetensors"]
)
def test_an_index_that_names_a_file_outside_of_its_folder(copy_of: Copy, tmp_path: Path, name: str) -> None:
    source = copy_of("llama-sharded")
    other = tmp_path / "source-other"
    other.mkdir()
    shutil.copy(sorted(source.glob("*.safetensors"))[0], other / "model.safetensors")
    edit_json(source / INDEX_NAME, lambda index: index["weight_map"].update({"a.weight": name}))
    refused(source, tmp_path / "out", "outside of the folder")


@pytest.mark.parametrize("file", ["shard", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder(copy_of: Copy, tmp_path: Path, leaves_nothing: Nothing, file: str) -> None:
    source = copy_of("llama-sharded")
    name = sorted(source.glob("*.safetensors"))[0].name if file == "shard" else file
    (source / name).rename(tmp_path / "source-elsewhere")
    (source / name).symlink_to(tmp_path / "source-elsewhere")
    refused(source, tmp_path / "out", "is a link to .*source-elsewhere, which is outside of the folder")
    leaves_nothing()


def test_the_hugging_face_cache_is_made_of_links_and_is_read(copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of("llama")
    snapshot = tmp_path / "models--x/snapshots/0123"
    blobs = tmp_path / "models--x/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    quantize_checkpoint(snapshot, tmp_path / "out")
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


def test_pickled_weights_are_never_loaded(copy_of: Copy, tmp_path: Path, leaves_nothing: Nothing) -> None:
    source = copy_of("llama")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, tmp_path / "out", "1 pickled weight files .* never loaded; convert .*save_pretrained")
    leaves_nothing()


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    empty = tmp_path / "source-empty"
    refused(empty, tmp_path / "out", "is no folder")
    refused(Path("someone/model"), tmp_path / "out", "hf download someone/model --local-dir model")
    empty.mkdir()
    refused(empty, tmp_path / "out", "no config.json")
    (empty / "config.json").write_text("{}")
    refused(empty, tmp_path / "out", "neither model.safetensors nor")


def test_a_model_without_a_linear(tmp_path: Path, leaves_nothing: Nothing) -> None:
    source = tmp_path / "source-gpt2"
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(source)
    refused(source, tmp_path / "out", "has 1 linear modules and none", QuantizationError)
    leaves_nothing()


def test_an_unknown_architecture(copy_of: Copy, tmp_path: Path, leaves_nothing: Nothing) -> None:
    source = copy_of("llama")
    edit_json(source / "config.json", lambda c: c.update(model_type="my_model", architectures=["MyModel"]))
    refused(source, tmp_path / "out", r"Transformers [\d.]+ cannot build the model .*my_model")
    leaves_nothing()


def test_code_in_a_checkpoint_is_never_run(copy_of: Copy, tmp_path: Path) -> None:
    source, trace = copy_of("llama"), tmp_path / "source-trace"
    (source / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    edit_json(
        source / "config.json",
        lambda c: c.update(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
    )
    quantize_checkpoint(source, tmp_path / "out")
    assert not trace.exists()
    assert not (tmp_path / "out/evil.py").exists()


def test_an_attention_of_the_hub_is_never_fetched(
    copy_of: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers takes the name of a kernel repository for an implementation of attention."""
    source = copy_of("llama")
    for key in ("attn_implementation", "_attn_implementation"):
        edit_json(source / "config.json", lambda c, key=key: c.update({key: "somebody/kernel"}))
    seen: list[object] = []
    monkeypatch.setattr(
        transformers.PreTrainedModel, "_check_and_adjust_attn_implementation",
        lambda self, implementation, *args, **kwargs: seen.append(implementation) or "sdpa",
    )  # fmt: skip
    quantize_checkpoint(source, tmp_path / "out")
    assert seen
    assert not [name for name in seen if name and "somebody" in str(name)]


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "vocab_size", "num_labels"])
def test_a_config_that_asks_for_more_than_the_checkpoint_holds(
    copy_of: Copy, tmp_path: Path, key: str
) -> None:
    source = copy_of("llama")
    edit_json(source / "config.json", lambda c: c.update({key: 10**13}))
    refused(source, tmp_path / "out", rf"has {key} = 10000000000000; a checkpoint of 21 tensors")


def test_a_checkpoint_that_is_already_quantized(copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of("llama")
    quantize_checkpoint(source, tmp_path / "out")
    refused(tmp_path / "out", tmp_path / "again", "already quantized by FLUTE")
    edit_json(source / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}))
    refused(source, tmp_path / "again", "already quantized by 'gptq'")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "magic"}, "'magic' is unknown"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "meta"}, "device is 'meta'"),
        ({"min_coverage": 2}, "min_coverage is 2"),
        ({"importance": "text"}, "importance is 'text'; supported are auto, random, columns, none"),
        ({"importance": {"lm_head": torch.ones(64)}}, "1 modules, such as lm_head, and none of the 14"),
        ({"importance": {NAME.removesuffix(".weight"): torch.ones(3)}}, r"has shape \[3\]"),
        ({"ignore": ["nothing"]}, "'nothing' matches none of the model's 15 linear modules"),
        ({"scale_dtype": torch.float32}, "scale_dtype"),
    ],
)
def test_options_that_do_not_exist(
    copy_of: Copy, tmp_path: Path, leaves_nothing: Nothing, options: dict[str, Any], said: str
) -> None:
    refused(copy_of("llama"), tmp_path / "out", said, QuantizationError, **options)
    leaves_nothing()


@pytest.mark.parametrize(("bits", "group", "said"), [(5, 64, "bits is 5"), (4, 48, "group_size is 48")])
def test_numbers_that_the_format_lacks(bits: int, group: int, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        QuantSpec(bits, group)


def test_outputs_that_overlap_with_the_source_or_have_no_parent(copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of("llama")
    for out in (source, source / "out", tmp_path):
        refused(source, out, "overlap")
    refused(source, tmp_path / "no/where", "is no folder")
    assert not (source / "out").exists()


def test_a_folder_where_nothing_can_be_written(copy_of: Copy) -> None:
    # /proc refuses new folders even to root, as a read-only disk does.
    refused(copy_of("llama"), Path("/proc/flute-out"), "/proc/flute-out cannot be written: .* bytes")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 kB, where the machine lets us mount one."""
    disk = tmp_path / "source-disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs rights that this machine does not give")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    copy_of: Copy, small_disk: Path
) -> None:
    refused(copy_of("llama"), small_disk / "out", r"needs [\d,]+ more bytes and [\d,]+ are free")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(
    copy_of: Copy, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "flute_quant.checkpoint.workfolder.WorkFolder.require_space", lambda self, needed: None
    )
    refused(
        copy_of("llama"),
        small_disk / "out",
        r"No space left on device; it needs [\d,]+ bytes and [\d,]+ are free",
    )
    assert list(small_disk.iterdir()) == []


def test_a_read_only_disk(copy_of: Copy, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused(copy_of("llama"), small_disk / "out", "Read-only file system")
    assert list(small_disk.iterdir()) == []


def test_a_limit_on_the_size_of_files(copy_of: Copy, tmp_path: Path, leaves_nothing: Nothing) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    source = copy_of("llama")
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        refused(source, tmp_path / "out", "File too large .a limit on the size of one file.; it needs")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    leaves_nothing()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q: q.update(format_version=99), "format_version is 99"),
        (lambda q: q.update(bits=5), "bits is 5"),
        (lambda q: q.update(group_size=48), "group_size is 48"),
        (lambda q: q.update(bits=3), r"down_proj.scales is float16 \[64, 3\]; expected .* \[64, 4\]"),
        (lambda q: q.update(group_size=32), r"gate_proj.scales is float16 \[96, 1\]; expected .* \[96, 2\]"),
        (lambda q: q.pop("bits"), "no 'bits'"),
        (lambda q: q.update(quant_method="gptq"), "quant_method is 'gptq'"),
    ],
)
def test_a_quantized_folder_whose_config_is_wrong(
    copy_of: Copy, tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    quantize_checkpoint(copy_of("llama"), tmp_path / "out")
    edit_json(tmp_path / "out/config.json", lambda config: change(config["quantization_config"]))
    with pytest.raises(FormatError, match=said):
        inspect_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, m: t.pop(m + "scales"), "scales is missing"),
        (lambda t, m: t[m + "scales"].view(-1)[:2].fill_(float("inf")), "scales has 2 of"),
        (lambda t, m: t.update({m + "codebook": torch.zeros(1, 15, 1)}), "codebook is float32"),
        (lambda t, m: t.update({m + "qweight": t[m + "qweight"].to(torch.int16)}), "qweight is int16"),
    ],
)
def test_a_quantized_folder_whose_tensors_are_wrong(
    copy_of: Copy, tmp_path: Path, change: Callable[[dict[str, torch.Tensor], str], Any], said: str
) -> None:
    quantize_checkpoint(copy_of("llama"), tmp_path / "out")
    module = "model.layers.0.self_attn.q_proj."
    edit_tensors(tmp_path / "out", lambda tensors: change(tensors, module))
    with pytest.raises(FormatError, match=f"{module}{said}"):
        inspect_checkpoint(tmp_path / "out")


def test_a_header_of_the_largest_length(copy_of: Copy, tmp_path: Path, leaves_nothing: Nothing) -> None:
    source = copy_of("llama")
    with (source / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 1 << 63))
    refused(source, tmp_path / "out", "announces a header of 9223372036854775808")
    leaves_nothing()


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("../x")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_config_with_any_value_is_quantized_or_refused(
    checkpoints: Copy, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("config")
    source = Path(shutil.copytree(checkpoints("llama"), folder / "source", copy_function=os.link))
    config = json.loads((source / "config.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(VALUES)
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(config))
    try:
        quantize_checkpoint(source, folder / "out")
        inspect_checkpoint(folder / "out")
    except FluteError:
        assert [p.name for p in folder.iterdir()] == ["source"]
    shutil.rmtree(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_index_with_any_content_is_read_or_refused(
    checkpoints: Copy, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("index")
    source = Path(shutil.copytree(checkpoints("llama-sharded"), folder / "source", copy_function=os.link))
    path = source / INDEX_NAME
    content = path.read_bytes()
    path.unlink()
    if data.draw(st.booleans()):
        index = json.loads(content)
        name = data.draw(st.sampled_from(sorted(index["weight_map"])))
        index["weight_map"][name] = data.draw(VALUES)
        path.write_text(json.dumps(index))
    else:
        mutated = bytearray(content)
        for _ in range(data.draw(st.integers(1, 4))):
            mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(mutated)
    try:
        found = CheckpointFolder.open(source)
        assert all(file.path.resolve().parent == source.resolve() for file in found.files.values())
    except FluteError:
        pass
    shutil.rmtree(folder)


def test_peak_memory_is_a_few_tensors_not_the_model(tmp_path: Path) -> None:
    """A model of 200 MB, quantized by a process that may grow by a quarter of that."""
    source = tmp_path / "source-large"
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, vocab_size=512,
        max_position_embeddings=64,  # of random tokens: activations are no part of the model
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.float32).save_pretrained(source, max_shard_size="5GB")
    size = (source / "model.safetensors").stat().st_size
    program = (
        "import resource, sys\n"
        "from flute_quant import plan_checkpoint, quantize_checkpoint, quantize_tensor\n"
        "from flute_kernels import QuantSpec\n"
        "import torch\n"
        "quantize_tensor(torch.randn(512, 512), QuantSpec())\n"
        "with plan_checkpoint(sys.argv[1], QuantSpec()): pass\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        "quantize_checkpoint(sys.argv[1], sys.argv[2])\n"
        "print(peak() - before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert size > 190_000_000
    assert int(result.stdout) < size / 4
