"""Other orders of a Llama-like model's channels: the same function, other neighbours in every group.

Weights that were quantized before (a checkpoint made from a 4-bit file) lie on that format's grid, and
methods with the same groups look better on them than they are. Another order of the input channels
mixes the groups, after which they are like those of weights that were never quantized.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["permute_channels"]


@torch.no_grad()
def permute_channels(model: Any, seed: int) -> None:
    """Reorder the channels of a Transformers model in place; what it computes stays the same.

    One order holds for the residual stream, one for each layer's intermediate channels, and one for
    the value channels of each key-value head, which all query heads of its group share.

    Args:
        model: of the Llama family (Llama, Mistral, Qwen2 and the like), no experts.
        seed: of the orders.
    """
    generator = torch.Generator().manual_seed(seed)
    config, body = model.config, model.model
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    residual = torch.randperm(config.hidden_size, generator=generator)
    _columns(body.embed_tokens, residual)
    if model.lm_head.weight is not body.embed_tokens.weight:
        _columns(model.lm_head, residual)
    body.norm.weight.copy_(body.norm.weight[residual])
    for layer in body.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.copy_(norm.weight[residual])
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            _columns(reader, residual)
        for writer in (attention.o_proj, mlp.down_proj):
            _rows(writer, residual)
        inner = torch.randperm(config.intermediate_size, generator=generator)
        _rows(mlp.gate_proj, inner)
        _rows(mlp.up_proj, inner)
        _columns(mlp.down_proj, inner)
        orders = [torch.randperm(size, generator=generator) for _ in range(groups)]
        _rows(attention.v_proj, torch.cat([g * size + order for g, order in enumerate(orders)]))
        shared = [h * size + orders[h * groups // heads] for h in range(heads)]
        _columns(attention.o_proj, torch.cat(shared))


def _columns(module: nn.Module, order: Tensor) -> None:
    weight = module.get_parameter("weight")
    weight.copy_(weight[:, order])


def _rows(module: nn.Module, order: Tensor) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.copy_(parameter[order])
