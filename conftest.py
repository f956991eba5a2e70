"""What the tests of every package have in common."""

from __future__ import annotations

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``gpu`` want one, and kernels for it."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    import flute_kernels

    if not flute_kernels.build_info().cuda_architectures:
        pytest.skip("this build of flute-kernels has no GPU kernels")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
