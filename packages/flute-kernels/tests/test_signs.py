"""The signs of a Hadamard rotation: SplitMix64, the same everywhere for ever."""

from __future__ import annotations

import pytest
import torch

from flute_kernels import QuantSpec
from flute_kernels.format import NO_SIGNS, hadamard_signs

from .helpers import random_layer


class SplitMix64:
    """The generator as published: a state that grows, and a mixing of it."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = self.state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31


def test_the_generator_of_this_file_gives_the_published_numbers() -> None:
    """First outputs for seed 1234567, from the reference program's documentation."""
    generator = SplitMix64(1234567)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [generator.next() for _ in range(4)] == expected


@pytest.mark.parametrize("seed", [0, 1, 42, 1234567, 2**63, 2**64 - 1])
def test_a_sign_is_the_top_bit_of_an_output(seed: int) -> None:
    generator = SplitMix64(seed)
    expected = [-1.0 if generator.next() >> 63 else 1.0 for _ in range(300)]
    signs = hadamard_signs(300, seed)
    assert signs.dtype == torch.float32
    assert signs.tolist() == expected


def test_a_longer_row_begins_with_the_signs_of_a_shorter_one() -> None:
    assert torch.equal(hadamard_signs(64, 7), hadamard_signs(128, 7)[:64])


def test_signs_lie_on_the_cpu_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        assert hadamard_signs(32, 7).device.type == "cpu"


def test_a_stored_linear_knows_its_signs() -> None:
    assert random_layer(QuantSpec()).stored.signs() is None
    rotated = random_layer(QuantSpec(hadamard=64, hadamard_seed=9)).stored
    signs = rotated.signs()
    assert signs is not None
    assert torch.equal(signs, hadamard_signs(rotated.in_features, 9))


def test_minus_one_means_no_signs() -> None:
    assert torch.equal(hadamard_signs(64, NO_SIGNS), torch.ones(64))
