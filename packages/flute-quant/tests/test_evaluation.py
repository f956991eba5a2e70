"""Windows of a text, and distances between predictions, against what defines them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flute_quant import CheckpointError, QuantizationError
from flute_quant.evaluation import DistanceMeter, load_tokenizer, text_windows

TEXT = " ".join(f"w{i}" for i in range(100))


@pytest.fixture(scope="module")
def plain(checkpoints: Callable[[str], Path]) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that knows a BOS token and puts none before a text."""
    tokenizer = load_tokenizer(checkpoints("llama"))
    tokenizer.bos_token = "<s>"
    return tokenizer


class Beginning:
    """The same tokenizer, which puts its BOS token before every text unless told not to."""

    def __init__(self, plain: transformers.PreTrainedTokenizerFast) -> None:
        self._plain = plain
        self.bos_token_id, self.bos_token = plain.bos_token_id, plain.bos_token

    def __call__(self, text: str, add_special_tokens: bool = True, **options: object) -> dict[str, Any]:
        found = self._plain(text, **options)["input_ids"]
        if not add_special_tokens:
            return {"input_ids": found}
        first = [self.bos_token_id]
        if isinstance(found, list):
            return {"input_ids": first + found}
        return {"input_ids": torch.cat([torch.tensor([first]), found], 1)}


def test_windows_are_evenly_spaced_from_the_first_token_to_the_last(plain: object) -> None:
    found = text_windows(plain, TEXT, count=3, length=10)
    assert found.bos == "none"
    assert found.tokens[:, 0].tolist() == [4, 49, 94]  # w0 has id 4
    assert found.tokens[2].tolist() == list(range(94, 104))
    assert text_windows(plain, TEXT, count=1, length=100).tokens.tolist() == [list(range(4, 104))]


def test_a_bos_token_is_one_of_the_windows_tokens(plain: object) -> None:
    found = text_windows(plain, TEXT, count=2, length=10, bos="each")
    assert found.bos == "<s>"
    assert found.tokens.tolist() == [[1, *range(4, 13)], [1, *range(95, 104)]]


@pytest.mark.parametrize(("bos", "expected"), [("auto", "<s>"), ("each", "<s>"), ("none", "none")])
def test_auto_does_what_the_tokenizer_does(
    plain: transformers.PreTrainedTokenizerFast, bos: str, expected: str
) -> None:
    found = text_windows(Beginning(plain), TEXT, count=2, length=10, bos=bos)
    assert found.bos == expected
    assert bool((found.tokens[:, 0] == 1).all()) is (expected != "none")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 0}, "windows is 0"),
        ({"length": 1}, "length 1"),
        ({"length": 101}, "The text has 100 tokens; one window needs 101"),
        ({"bos": "first"}, "bos is 'first'; supported are auto, each, none"),
    ],
)
def test_windows_that_cannot_be_are_refused(plain: object, options: dict[str, int], said: str) -> None:
    with pytest.raises(QuantizationError, match=said):
        text_windows(plain, TEXT, **{"length": 10, **options})


def test_a_tokenizer_without_bos_cannot_begin_with_it(checkpoints: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(checkpoints("llama"))
    with pytest.raises(QuantizationError, match="no beginning-of-text token"):
        text_windows(tokenizer, TEXT, length=10, bos="each")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer that Transformers can load"):
        load_tokenizer(tmp_path)


def test_the_distance_is_what_its_definition_says() -> None:
    generator = torch.Generator().manual_seed(0)
    source, quantized = torch.randn(2, 150, 20, generator=generator).double()
    tokens = torch.randint(0, 20, (151,), generator=generator)
    meter = DistanceMeter()
    # In two windows; of the first, the row that predicts nothing known is given, too.
    meter.add(source[:101].float(), quantized[:101].float(), tokens[:101])
    meter.add(source[100:].float(), quantized[100:].float(), tokens[100:])
    found = meter.result()
    p, q = source.softmax(1), quantized.softmax(1)
    each = (p * (p / q).log()).sum(1)
    rows, target = torch.arange(150), tokens[1:]
    assert found.tokens == 150
    assert found.kl == pytest.approx(float(each.mean()), rel=1e-5)
    assert found.kl_median == pytest.approx(float(each.sort().values[75]), rel=1e-5)
    assert found.kl_p99 == pytest.approx(float(each.sort().values[148]), rel=1e-5)
    assert found.top1 == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert found.source_perplexity == pytest.approx(math.exp(-float(p[rows, target].log().mean())), rel=1e-5)
    assert found.quantized_perplexity == pytest.approx(
        math.exp(-float(q[rows, target].log().mean())), rel=1e-5
    )


def test_a_model_is_at_no_distance_from_itself() -> None:
    logits, tokens = torch.randn(9, 50), torch.randint(0, 50, (9,))
    meter = DistanceMeter()
    meter.add(logits, logits, tokens)
    found = meter.result()
    assert (found.kl, found.kl_p99, found.top1, found.tokens) == (0, 0, 1, 8)
    assert found.source_perplexity == found.quantized_perplexity
