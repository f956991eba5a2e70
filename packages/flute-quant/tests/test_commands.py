"""The command line, and the Python functions behind inspect and compare."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from flute_kernels import QuantSpec
from flute_quant import (
    CheckpointError,
    QuantizationError,
    compare_checkpoints,
    inspect_checkpoint,
    plan_modules,
    quantize_checkpoint,
    random_token_importance,
)
from flute_quant.cli import main
from flute_quant.cli.text import duration, size

Checkpoints = Callable[[str], Path]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_quantize_then_inspect(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(
        capsys, "quantize", checkpoints("llama"), tmp_path / "out", "--bits", 3, "--group-size", 64,
        "--method", "lloyd", "--override", "q_proj=bits:4",
    )  # fmt: skip
    assert code == 0
    assert "2 linears with group size 32 instead of 64, because K = 96" in out
    assert "1 linear left in 16 bits, a head or a router (such as lm_head)" in out
    assert "method lloyd" in out
    assert "100%" in err
    code, out, _ = run(capsys, "inspect", tmp_path / "out")
    assert code == 0
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("model.")}
    assert len(lines) == 14
    assert lines["model.layers.0.self_attn.q_proj"][1:6] == ["64", "x", "64", "4", "64"]
    assert lines["model.layers.0.mlp.down_proj"][1:6] == ["64", "x", "96", "3", "32"]
    code, out, _ = run(capsys, "inspect", tmp_path / "out", "--json")
    found = json.loads(out)
    assert len(found["layers"]) == 14
    assert all(0 < layer["error"] < 0.1 for layer in found["layers"])


def test_inspect_counts_the_bits_that_are_on_disk(checkpoints: Checkpoints, tmp_path: Path) -> None:
    report = quantize_checkpoint(checkpoints("llama"), tmp_path / "out", QuantSpec(2, 32))
    found = inspect_checkpoint(tmp_path / "out")
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert found.file_bytes == (tmp_path / "out/model.safetensors").stat().st_size
    assert {x.name: x.error for x in found.layers} == report.errors
    assert sum(x.weights for x in found.layers) + found.other_parameters == report.coverage.total
    (tmp_path / "out/flute_report.json").unlink()
    assert all(x.error is None for x in inspect_checkpoint(tmp_path / "out").layers)


def test_a_dry_run_writes_nothing(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "quantize", checkpoints("llama"), tmp_path / "out", "--dry-run")
    assert code == 0
    assert "Would write" in out
    assert "bits a quantized weight" in out
    assert list(tmp_path.iterdir()) == []


def test_a_table_from_a_file(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.json").write_text(json.dumps([-1, -0.3, 0.3, 1]))
    save_file({"t": torch.tensor([-1, -0.3, 0.3, 1])}, tmp_path / "table.safetensors")
    for name in ("json", "safetensors"):
        code, out, _ = run(
            capsys,
            "quantize",
            checkpoints("llama"),
            tmp_path / name,
            "--bits",
            2,
            "--table",
            tmp_path / f"table.{name}",
        )
        assert code == 0
        assert "method table" in out
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "json" / file).read_bytes() == (tmp_path / "safetensors" / file).read_bytes()
    code, _, err = run(
        capsys,
        "quantize",
        checkpoints("llama"),
        tmp_path / "x",
        "--bits",
        3,
        "--table",
        tmp_path / "table.json",
    )
    assert (code, err) == (2, "flute-quant: The table has shape [4]; 3 bits with vectors of 1 need [8].\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "5"], "bits is 5; supported are 2, 3 and 4."),
        (["--group-size", "48"], "group_size is 48"),
        (["--method", "magic"], "'magic' is unknown"),
        (["--override", "x"], "not of the form"),
        (["--ignore", "nothing"], "matches none"),
        (["--min-coverage", "7"], "min_coverage is 7"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--importance", "text"], "importance is 'text'"),
        (["--importance", "/nowhere.safetensors"], "importance cannot be read: /nowhere.safetensors"),
        (["--table", "/nowhere.json"], "No such file"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(
    checkpoints: Checkpoints,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    code, out, err = run(capsys, "quantize", checkpoints("llama"), tmp_path / "out", *arguments)
    assert code == 2
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", [["inspect", "{}/none"], ["compare", "{}/none", "{}/none", "--text", "{}/t"]]
)
def test_missing_files_are_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    code, _, err = run(capsys, *(part.format(tmp_path) for part in command))
    assert code == 2
    assert err.count("\n") == 1
    assert str(tmp_path) in err


def test_the_module_runs_as_a_program() -> None:
    code = (
        "import sys; sys.argv = ['flute-quant', '--version']; import runpy; runpy.run_module('flute_quant')"
    )
    path = [p for p in sys.path if p]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("flute-quant ")


def test_importance_on_the_command_line(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints("llama")
    code, out, err = run(capsys, "quantize", source, tmp_path / "auto")
    assert code == 0
    assert "method signed weighted by random tokens" in out
    assert "measuring input channels" in err
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    plan = plan_modules(model, QuantSpec())
    measured = random_token_importance(model, {p.name: p.spec for p in plan.linears})
    save_file(measured, tmp_path / "measured.safetensors")
    run(capsys, "quantize", source, tmp_path / "file", "--importance", tmp_path / "measured.safetensors")
    run(capsys, "quantize", source, tmp_path / "none", "--importance", "none")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("auto", "file", "none")]
    assert weights[0] == weights[1] != weights[2]
    sources = [
        json.loads((tmp_path / name / "flute_report.json").read_text())["importance"]
        for name in ("auto", "file", "none")
    ]
    assert sources == [{"source": s, "note": None} for s in ("random tokens", "given", "none")]


@pytest.fixture
def text(tmp_path: Path) -> str:
    words = torch.randint(0, 124, (300,), generator=torch.Generator().manual_seed(0))
    return " ".join(f"w{i}" for i in words.tolist())


def test_compare_measures_distance_and_finds_none_to_itself(
    checkpoints: Checkpoints, tmp_path: Path, text: str
) -> None:
    source = checkpoints("llama-fp32")
    results = []
    for bits in (4, 2):
        quantize_checkpoint(
            source, tmp_path / f"out{bits}", QuantSpec(bits, 32), dtype="keep", method="lloyd"
        )
        results.append(
            compare_checkpoints(
                source, tmp_path / f"out{bits}", text, windows=3, length=64, dtype=torch.float32
            )
        )
    fine, coarse = results
    assert 0 < fine.kl < coarse.kl
    assert fine.top1 > coarse.top1
    assert fine.source_perplexity == coarse.source_perplexity
    assert fine.tokens == 3 * 63
    # With every linear at full precision except one tiny layer the distance is almost none.
    quantize_checkpoint(
        source, tmp_path / "same", QuantSpec(4, 32), dtype="keep", min_coverage=0,
        ignore=["layers.0.*", "layers.1.self_attn.*", "up_proj", "gate_proj"],
    )  # fmt: skip
    same = compare_checkpoints(source, tmp_path / "same", text, windows=2, length=64, dtype=torch.float32)
    assert same.kl < fine.kl / 2


def test_compare_on_the_command_line(
    checkpoints: Checkpoints, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints("llama")
    quantize_checkpoint(source, tmp_path / "out")
    (tmp_path / "text.txt").write_text(text)
    arguments = [
        "compare",
        source,
        tmp_path / "out",
        "--text",
        tmp_path / "text.txt",
        "--windows",
        2,
        "--length",
        32,
    ]
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["perplexity", "KL", "same", "error", "size"]
    assert "62 predictions in 2 windows of 32 tokens, no BOS" in out
    assert f"{inspect_checkpoint(tmp_path / 'out').bits_per_weight:.3f} bits a quantized weight" in out
    code, out, _ = run(capsys, *arguments, "--json")
    assert json.loads(out)["windows"] == 2
    code, words, _ = run(capsys, *arguments, "--json", tmp_path / "compared.json")
    assert words.startswith("perplexity")
    assert json.loads((tmp_path / "compared.json").read_text()) == json.loads(out)
    with pytest.raises(QuantizationError, match="The text has 300 tokens; one window needs 512"):
        compare_checkpoints(source, tmp_path / "out", text)


@pytest.mark.parametrize(
    ("name", "spec"), [("llama", QuantSpec(3, 32)), ("llama-sharded", QuantSpec(4, 32, 2, hadamard=32))]
)
def test_the_errors_of_layers_are_those_that_quantizing_noted(
    checkpoints: Checkpoints, tmp_path: Path, text: str, name: str, spec: QuantSpec
) -> None:
    """A rotation is undone before weights are compared; it changes no error."""
    report = quantize_checkpoint(checkpoints(name), tmp_path / "out", spec, method="higgs")
    found = compare_checkpoints(checkpoints(name), tmp_path / "out", text, windows=1, length=16)
    assert found.layers == pytest.approx(report.errors, rel=1e-4)
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)


def test_folders_of_different_models_are_not_compared(
    checkpoints: Checkpoints, tmp_path: Path, text: str
) -> None:
    quantize_checkpoint(checkpoints("odd-k"), tmp_path / "out", QuantSpec(4, 32))
    other = transformers.LlamaConfig.from_pretrained(checkpoints("llama"), hidden_size=32, head_dim=8)
    transformers.LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    for file in checkpoints("llama").glob("tokenizer*"):
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"is \[96, 32\] in .* and stands for \[100, 64\]"):
        compare_checkpoints(tmp_path / "other", tmp_path / "out", text, length=16)


def test_a_text_that_is_not_utf8_is_refused(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_bytes(b"abc\xff")
    code, _, err = run(capsys, "compare", tmp_path, tmp_path, "--text", tmp_path / "text")
    assert (code, err) == (2, f"flute-quant: {tmp_path / 'text'} is not UTF-8 at byte 3.\n")


def test_higgs_is_rotated_unless_it_is_told_not_to_be(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(*options: str) -> list[tuple[int, int]]:
        out = tmp_path / "-".join(options).replace(",", "")
        assert run(capsys, "quantize", checkpoints("llama"), out, "--vector-size", "2", *options)[0] == 0
        layers = {x.name.rpartition(".")[2]: x for x in inspect_checkpoint(out).layers}
        return [(layers[n].hadamard, layers[n].vector_size) for n in ("q_proj", "down_proj")]

    assert made("--method", "higgs") == [(64, 2), (32, 2)]  # K = 64 and 96
    assert made("--method", "higgs", "--hadamard", "0") == [(0, 2), (0, 2)]
    assert made("--method", "lloyd-pairs") == [(0, 2), (0, 2)]
    assert made("--method", "lloyd-pairs", "--hadamard", "auto") == [(64, 2), (32, 2)]


def test_a_reader_that_has_seen_enough_gets_no_traceback(checkpoints: Checkpoints, tmp_path: Path) -> None:
    quantize_checkpoint(checkpoints("llama"), tmp_path / "out")
    path = [p for p in sys.path if p]
    program = (
        f"import select, sys; sys.path[:0] = {path!r}\n"
        "from flute_quant.cli import main\n"
        "gone = select.poll(); gone.register(1, 0); gone.poll()\n"  # until the reader has closed the pipe
        f"sys.exit(main(['inspect', {str(tmp_path / 'out')!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert (process.wait(), errors) == (1, "")


def test_a_reader_that_leaves_before_the_last_line_is_flushed_is_no_error_of_python_at_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(options: argparse.Namespace) -> int:
        print("a line that waits in the buffer")
        return 0

    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr("flute_quant.cli.inspect._run", run)
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["inspect", "anything"]) == 1


def test_numbers_are_printed_for_people() -> None:
    assert [size(n) for n in (999, 1000, 1.5e9)] == ["999 B", "1.0 kB", "1.5 GB"]
    assert [duration(s) for s in (0.2, 4.4, 125, 4200)] == ["under 1 s", "4 s", "2 min 05 s", "1 h 10 min"]
