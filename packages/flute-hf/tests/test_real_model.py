"""The small real language model, as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from .helpers import flute_layers, load, logits, quantized, twin

pytestmark = pytest.mark.model

_TEXT = (
    "The Moon is the only natural satellite of the Earth. It orbits at an average distance of 384,400 "
    "kilometres, and always shows the same side to us."
)


def test_four_bits_say_nearly_what_the_original_says(real_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    ids = tokenizer(_TEXT, return_tensors="pt").input_ids
    model = quantized(real_model, group_size=64)
    assert len(flute_layers(model)) == 210
    found = logits(model, ids)
    torch.testing.assert_close(found, logits(twin(model, real_model), ids), rtol=1e-3, atol=1e-2)

    original = load(real_model)
    assert model.num_parameters() == original.num_parameters()
    labels = ids[0, 1:]
    loss, reference = (
        float(torch.nn.functional.cross_entropy(out[0, :-1], labels))
        for out in (found, logits(original, ids))
    )
    assert loss < reference + 0.6

    model.save_pretrained(tmp_path / "q")
    again = load(tmp_path / "q")
    assert torch.equal(logits(again, ids), found)
    tokens = again.generate(ids, max_new_tokens=16, do_sample=False)
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=16, do_sample=False))
