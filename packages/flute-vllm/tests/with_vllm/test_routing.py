"""Sorting tokens by expert, and adding up what the experts say."""

from __future__ import annotations

import pytest
import torch

from flute_vllm.routing import route


@pytest.mark.parametrize(
    ("tokens", "k", "experts"), [(1, 1, 1), (1, 2, 4), (7, 2, 4), (50, 8, 64), (0, 2, 4)]
)
def test_pairs_are_sorted_by_expert_and_keep_their_order(tokens: int, k: int, experts: int) -> None:
    ids = torch.rand(tokens, experts).argsort(1)[:, :k].to(torch.int32)
    found = route(ids, experts)
    assert found.counts.dtype == torch.int32
    assert found.counts.tolist() == [int((ids == e).sum()) for e in range(experts)]
    assert found.token.tolist() == [t for e in range(experts) for t in range(tokens) if (ids[t] == e).any()]
    expert_of_row = torch.arange(experts).repeat_interleave(found.counts)
    assert torch.equal(expert_of_row[found.place], ids.long())


def test_experts_elsewhere_and_no_experts_come_last() -> None:
    expert_map = torch.tensor([-1, 0, -1, 1])
    ids = torch.tensor([[3, 0], [1, 3], [-1, 2]])
    found = route(ids, 2, expert_map)
    assert found.counts.tolist() == [1, 2]
    assert found.token[:3].tolist() == [1, 0, 1]
    assert sorted(found.token.tolist()) == [0, 0, 1, 1, 2, 2]


def test_sums_are_made_in_float32() -> None:
    """In bfloat16, 256 + 1 is 256."""
    ids = torch.arange(256).view(1, 256)
    rows = torch.ones(256, 3, dtype=torch.bfloat16)
    rows[0] = 256
    summed = route(ids, 256).combine(rows, torch.ones(1, 256))
    assert summed.dtype == torch.bfloat16
    assert torch.equal(summed, torch.full((1, 3), 512, dtype=torch.bfloat16))


def test_each_token_gets_its_own_experts_weighted() -> None:
    tokens, k, experts = 9, 3, 5
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    weights, says = torch.rand(tokens, k), torch.randn(tokens, experts, 4)
    found = route(ids, experts)
    expert_of_row = torch.arange(experts).repeat_interleave(found.counts)
    out = found.combine(says[found.token, expert_of_row], weights)
    expected = torch.stack([(weights[t, :, None] * says[t, ids[t]]).sum(0) for t in range(tokens)])
    torch.testing.assert_close(out, expected)


def test_one_graph_serves_every_batch() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(route, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (2, 5, 17):
        ids = torch.randint(0, 4, (tokens, 2))
        for mine, theirs in zip(compiled(ids, 4), route(ids, 4), strict=True):
            assert torch.equal(mine, theirs)
