"""flute-quant eval: what lm-eval is asked, what is made of its answer, and a task of the real package."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flute_kernels import QuantSpec
from flute_quant import QuantizationError, evaluate_checkpoint, load_dequantized, quantize_checkpoint
from flute_quant.cli import main

Checkpoints = Callable[[str], Path]


class FakeHarness:
    """Stands in for lm_eval: keeps what it was called with, and answers in its shape."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.call: dict[str, Any] = {}
        self.failure: Exception | None = None
        top, models, tasks = (ModuleType(f"lm_eval{part}") for part in ("", ".models.huggingface", ".tasks"))
        top.simple_evaluate = self.evaluate  # type: ignore[attr-defined]
        models.HFLM = lambda **given: given  # type: ignore[attr-defined]
        tasks.TaskManager = lambda **given: given  # type: ignore[attr-defined]
        for name, module in {
            "lm_eval": top,
            "lm_eval.models": ModuleType("lm_eval.models"),
            "lm_eval.models.huggingface": models,
            "lm_eval.tasks": tasks,
        }.items():
            monkeypatch.setitem(sys.modules, name, module)

    def evaluate(self, **given: Any) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        self.call = given
        scores = {
            "alias": "colours",
            "acc,none": 0.25,
            "acc_stderr,none": 0.125,
            "em,strict": 1,
            "sample_len": 4,
        }
        return {"results": {"colours": scores}}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> FakeHarness:
    return FakeHarness(monkeypatch)


@pytest.fixture
def quantized(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    quantize_checkpoint(checkpoints("llama"), tmp_path / "out", QuantSpec(4, 32), method="lloyd")
    return tmp_path / "out"


def test_the_dequantized_model_is_what_is_evaluated(harness: FakeHarness, quantized: Path) -> None:
    found = evaluate_checkpoint(
        quantized, ["colours"], limit=3, shots=2, batch_size=4, include="tasks", dtype=torch.float32
    )
    assert found == {"colours": {"acc": 0.25, "acc_stderr": 0.125, "em,strict": 1.0}}
    call = harness.call
    assert (call["tasks"], call["limit"], call["num_fewshot"]) == (["colours"], 3, 2)
    assert call["task_manager"] == {"include_path": "tasks"}
    assert call["model"]["batch_size"] == 4
    assert call["model"]["tokenizer"]("w1 w2")["input_ids"] == [5, 6]
    expected = load_dequantized(quantized, dtype=torch.float32).state_dict()
    given = call["model"]["pretrained"].state_dict()
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in expected)


def test_a_16_bit_folder_is_evaluated_as_it_is(harness: FakeHarness, checkpoints: Checkpoints) -> None:
    evaluate_checkpoint(checkpoints("llama"), ["colours"])
    model = harness.call["model"]["pretrained"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_command_prints_scores(
    harness: FakeHarness, quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(quantized), "--tasks", "colours"]
    assert main(arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["colours", "acc", "0.2500", "±", "0.1250"], ["colours", "em,strict", "1.0000"]]
    assert main([*arguments, "--json", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["colours"]["acc"] == 0.25


def test_a_failure_of_the_package_is_a_sentence(harness: FakeHarness, quantized: Path) -> None:
    harness.failure = KeyError("no task\nof that name")
    with pytest.raises(QuantizationError, match=r"lm-eval cannot run a, b: 'no task.*of that name'"):
        evaluate_checkpoint(quantized, ["a", "b"])


def test_without_the_package_the_message_says_how_to_get_it(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(quantized), "--tasks", "x"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'flute-quant[eval]'" in said
    assert said.count("\n") == 1


@pytest.mark.filterwarnings("ignore")
def test_a_local_task_of_the_real_package(quantized: Path, tmp_path: Path) -> None:
    """Multiple choice whose answer is the likelier word under the dequantized model itself: all are right."""
    pytest.importorskip("lm_eval")
    file = quantized / "tokenizer_config.json"  # lm-eval wants a token that begins or ends texts
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": "</s>"}))
    model = load_dequantized(quantized, dtype=torch.float32).eval()
    prompts = [f"w{i} w{i + 1}" for i in range(10, 16)]
    choices = ["w50", "w90"]
    examples = []
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            logits = model(torch.tensor([[14 + i, 15 + i]])).logits[0, -1]
            examples.append({"prompt": prompt, "choices": choices, "best": int(logits[94] > logits[54])})
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "data.jsonl").write_text("\n".join(map(json.dumps, examples)))
    task = {
        "task": "likelier_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "best",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tasks / "likelier_word.yaml").write_text(json.dumps(task))  # JSON is YAML
    found = evaluate_checkpoint(quantized, ["likelier_word"], include=tasks, dtype=torch.float32)
    assert found["likelier_word"]["acc"] == 1.0
    wrong = [{**example, "best": 1 - example["best"]} for example in examples[:2]] + examples[2:]
    (tasks / "data.jsonl").write_text("\n".join(map(json.dumps, wrong)))
    found = evaluate_checkpoint(quantized, ["likelier_word"], include=tasks, dtype=torch.float32)
    assert found["likelier_word"]["acc"] == pytest.approx(4 / 6)
    some = evaluate_checkpoint(quantized, ["likelier_word"], include=tasks, limit=4, dtype=torch.float32)
    assert some["likelier_word"]["acc"] == 0.5
