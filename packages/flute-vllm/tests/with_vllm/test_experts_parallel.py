"""What each process has of a mixture of experts: vLLM's layer and loader, one rank after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import (
    MoEActivation,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

from flute_kernels import FormatError, QuantizationConfig, QuantizedLinear, QuantSpec, UnsupportedError
from flute_quant import quantize_tensor
from flute_vllm.config import FluteConfig

from .models import dequantized

HIDDEN, INNER, EXPERTS, TOP_K = 128, 256, 5, 2
MATRICES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
SPEC = QuantSpec(bits=4, group_size=32)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="vLLM's builds for GPUs have no activations for tensors on a CPU."
)


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        yield


def make(
    config: FluteConfig,
    rank: int = 0,
    size: int = 1,
    expert_parallel: bool = False,
    activation: MoEActivation = MoEActivation.SILU,
    **options: object,
) -> RoutedExperts:
    """A layer as process ``rank`` of ``size`` makes it."""
    tp, ep = ((1, 0), (size, rank)) if expert_parallel else ((size, rank), (1, 0))
    parallel = FusedMoEParallelConfig(
        tp_size=tp[0],
        tp_rank=tp[1],
        ep_size=ep[0],
        ep_rank=ep[1],
        pcp_size=1,
        pcp_rank=0,
        dp_size=1,
        dp_rank=0,
        sp_size=1,
        use_ep=expert_parallel,
        all2all_backend="allgather_reducescatter",
        enable_eplb=False,
    )
    experts = ExpertMapManager(8, TOP_K, EXPERTS, 0, None, parallel, "linear", False)
    moe = FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=TOP_K,
        hidden_dim=HIDDEN,
        intermediate_size=INNER,
        num_local_experts=experts.local_num_experts,
        num_logical_experts=EXPERTS,
        activation=activation,
        device="cpu",
        routing_method=RoutingMethodType.Default,
        moe_parallel_config=parallel,
        in_dtype=torch.float32,
    )
    return RoutedExperts("m.experts", torch.float32, moe, config, expert_map_manager=experts, **options)


def stored_config(spec: QuantSpec = SPEC, **overrides: QuantSpec) -> FluteConfig:
    """Of a checkpoint; ``overrides`` by the names of matrices."""
    names = {f"m.experts.{e}.{name}": own for name, own in overrides.items() for e in range(EXPERTS)}
    return FluteConfig(QuantizationConfig(spec, overrides=names))


@functools.cache
def random_experts(
    quantize: Callable[[str, Tensor], QuantizedLinear],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors as a checkpoint has them, and the matrices that they stand for, by ``0.gate_proj``."""
    tensors, dense = {}, {}
    for expert in range(EXPERTS):
        for name, shape in MATRICES.items():
            linear = quantize(name, torch.randn(shape) / shape[1] ** 0.5)
            dense[f"{expert}.{name}"] = dequantized(linear)
            tensors.update({f"{expert}.{name}.{key}": t for key, t in linear.to_tensors().items()})
    return tensors, dense


@functools.cache
def learned(spec: QuantSpec, **overrides: QuantSpec) -> Callable[[str, Tensor], QuantizedLinear]:
    """Tables of each matrix's own."""
    return lambda name, weight: quantize_tensor(weight, overrides.get(name, spec), method="learned")[0]


def run(layer: RoutedExperts, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    layer.quant_method.process_weights_after_loading(layer)
    out: Tensor = layer.forward_modular(x, weights, ids)
    return out


def choice(tokens: int) -> tuple[Tensor, Tensor]:
    """A router's: weights and experts of each token."""
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).to(torch.int32)
    return torch.rand(tokens, TOP_K), ids


def expected(
    dense: dict[str, Tensor],
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    act: Callable[[Tensor], Tensor] = functional.silu,
) -> Tensor:
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up, down = (dense[f"{expert}.{name}"] for name in MATRICES)
            out[token] += weight * (down @ (act(gate @ x[token]) * (up @ x[token])))
    return out


def assert_ranks_add_up(
    config: FluteConfig,
    tensors: dict[str, Tensor],
    dense: dict[str, Tensor],
    size: int,
    expert_parallel: bool = False,
    tokens: int = 7,
) -> None:
    x, (weights, ids) = torch.randn(tokens, HIDDEN), choice(tokens)
    total = torch.zeros_like(x)
    for rank in range(size):
        layer = make(config, rank, size, expert_parallel)
        list(layer.load_weights(tensors.items()))
        total += run(layer, x, weights, ids)
    torch.testing.assert_close(total, expected(dense, x, weights, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        QuantSpec(bits=3, group_size=64),
        QuantSpec(bits=2, group_size=-1),
        QuantSpec(bits=4, group_size=64, hadamard=64, hadamard_seed=3),
    ],
    ids=["4 bits", "3 bits", "a scale a row", "rotated"],
)
@pytest.mark.parametrize("expert_parallel", [False, True], ids=["shared experts", "experts elsewhere"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_add_up(size: int, expert_parallel: bool, spec: QuantSpec) -> None:
    tensors, dense = random_experts(learned(spec))
    assert_ranks_add_up(stored_config(spec), tensors, dense, size, expert_parallel)


@pytest.mark.parametrize("size", [1, 2])
def test_down_projections_of_another_format(size: int) -> None:
    down = QuantSpec(bits=3, group_size=128, hadamard=32)
    tensors, dense = random_experts(learned(SPEC, down_proj=down))
    assert_ranks_add_up(stored_config(SPEC, down_proj=down), tensors, dense, size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_several_tables_of_one_matrix(size: int) -> None:
    def quantize(name: str, weight: Tensor) -> QuantizedLinear:
        halves = [learned(SPEC)(name, half) for half in weight.chunk(2)]
        joined = (torch.cat([getattr(h, key) for h in halves]) for key in ("qweight", "scales", "codebook"))
        return QuantizedLinear(SPEC, *joined)

    assert_ranks_add_up(stored_config(), *random_experts(quantize), size)


def test_all_experts_with_one_table() -> None:
    quantize = lambda _, weight: quantize_tensor(weight, SPEC, method="nf")[0]  # noqa: E731
    tensors, dense = random_experts(quantize)
    layer = make(stored_config())
    list(layer.load_weights(tensors.items()))
    layer.quant_method.process_weights_after_loading(layer)
    assert len(layer.flute.gate_up.packed.tables) == 1
    assert_ranks_add_up(stored_config(), tensors, dense, 2)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (MoEActivation.GELU, functional.gelu),
        (MoEActivation.GELU_TANH, lambda x: functional.gelu(x, approximate="tanh")),
    ],
)
def test_other_activations(activation: MoEActivation, function: Callable[[Tensor], Tensor]) -> None:
    tensors, dense = random_experts(learned(SPEC))
    layer = make(stored_config(), activation=activation)
    list(layer.load_weights(tensors.items()))
    x, (weights, ids) = torch.randn(4, HIDDEN), choice(4)
    out = run(layer, x, weights, ids)
    torch.testing.assert_close(out, expected(dense, x, weights, ids, function), rtol=1e-4, atol=1e-4)


def test_the_layer_takes_what_each_expert_s_loader_is_given_alone() -> None:
    """Models that read their checkpoint themselves ask the parameters, with tables of three dimensions."""
    tensors, dense = random_experts(learned(SPEC))
    layer, parameters = make(stored_config()), {}
    for to, name, expert, shard in layer.get_expert_mapping():
        for key in ("qweight", "scales", "codebook"):
            parameter = parameters[f"{to}{key}"] = getattr(layer, f"{to}{key}".removeprefix("experts."))
            tensor = tensors[f"{name}{key}".removeprefix("experts.")]
            assert parameter.weight_loader(parameter, tensor, key, shard, expert, return_success=True)
    x, (weights, ids) = torch.randn(4, HIDDEN), choice(4)
    out = run(layer, x, weights, ids)
    torch.testing.assert_close(out, expected(dense, x, weights, ids), rtol=1e-4, atol=1e-4)


# --- 16-bit checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["apart on disk", "fused on disk"])
@pytest.mark.parametrize("expert_parallel", [False, True], ids=["shared experts", "experts elsewhere"])
@pytest.mark.parametrize("size", [1, 2])
def test_quantized_while_they_load(size: int, expert_parallel: bool, fused: bool) -> None:
    """4 bits are within some percent of the checkpoint; another rank's part would be nowhere near."""
    shapes = {f"{e}.{name}": shape for e in range(EXPERTS) for name, shape in MATRICES.items()}
    dense = {name: torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
    tensors = {f"{name}.weight": weight for name, weight in dense.items()}
    if fused:
        every = {name: torch.stack([dense[f"{e}.{name}"] for e in range(EXPERTS)]) for name in MATRICES}
        gate_up = torch.cat([every["gate_proj"], every["up_proj"]], dim=1)
        tensors = {"gate_up_proj": gate_up, "down_proj": every["down_proj"]}
    config = FluteConfig()
    assert config.online is not None
    config.online = config.online.updated({"group_size": 32, "hadamard": 64})
    x, (weights, ids) = torch.randn(7, HIDDEN), choice(7)
    total = torch.zeros_like(x)
    for rank in range(size):
        layer = make(config, rank, size, expert_parallel)
        list(layer.load_weights(tensors.items()))
        total += run(layer, x, weights, ids)
    ref = expected(dense, x, weights, ids)
    assert (total - ref).norm() < 0.2 * ref.norm()
    assert [name for name, _ in layer.named_parameters()] == []


@pytest.mark.parametrize(
    "shapes",
    [
        {"gate_up_proj": [EXPERTS, 2 * INNER, HIDDEN], "down_proj": [EXPERTS, HIDDEN, INNER]},
        {f"{e}.{name}.weight": list(shape) for e in range(EXPERTS) for name, shape in MATRICES.items()},
    ],
    ids=["fused on disk", "apart on disk"],
)
def test_16_bit_experts_of_a_quantized_checkpoint(
    shapes: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config does not name them, since they are no linear layers; its files do."""
    headers = {f"m.experts.{name}": {"dtype": "BF16", "shape": shape} for name, shape in shapes.items()}
    monkeypatch.setattr("flute_vllm.config.get_safetensors_params_metadata", lambda *_, **__: headers)
    config = stored_config()
    config.maybe_update_config("a folder")
    assert type(make(config).quant_method) is UnquantizedFusedMoEMethod


# --- refusals ---------------------------------------------------------------------------------------


def refused(config: FluteConfig, tensors: dict[str, Tensor], *parts: str) -> None:
    layer = make(config)

    def load() -> None:
        list(layer.load_weights(tensors.items()))
        layer.quant_method.process_weights_after_loading(layer)

    with pytest.raises(FormatError) as info:
        load()
    assert [part for part in parts if part not in str(info.value)] == [], str(info.value)


def test_columns_that_groups_do_not_divide() -> None:
    wide = QuantSpec(bits=4, group_size=128)
    with pytest.raises(
        FormatError, match=r"m\.experts\.\*\.down_proj: K = 256 over tp = 4 .* 64 each.* g = 128"
    ):
        make(stored_config(wide), 0, 4)


def test_missing_tensor_of_one_expert() -> None:
    tensors, _ = random_experts(learned(SPEC))
    for key in ("qweight", "scales", "codebook"):
        rest = {name: t for name, t in tensors.items() if name != f"3.up_proj.{key}"}
        refused(stored_config(), rest, f"m.experts.3.up_proj: {key} is missing")


def test_missing_matrix_of_a_16_bit_checkpoint() -> None:
    weights = {f"{e}.{n}.weight": torch.randn(s) for e in range(EXPERTS) for n, s in MATRICES.items()}
    del weights["2.down_proj.weight"]
    refused(FluteConfig(), weights, "m.experts.2.down_proj: weight is missing")


def test_wrong_shapes_and_dtypes() -> None:
    tensors, _ = random_experts(learned(SPEC))
    for name, wrong, parts in (
        ("1.gate_proj.scales", torch.ones(INNER, 3).half(), ("[256, 3]", "[256, 4]")),
        ("1.gate_proj.qweight", tensors["1.gate_proj.qweight"].long(), ("int64", "int32")),
        ("1.down_proj.codebook", torch.ones(1, 8, 1), ("[8, 1]", "[T, 16, 1]")),
        (
            "1.down_proj.scales",
            torch.full((HIDDEN, 8), float("inf")).half(),
            ("1.down_proj: scales", "1024 of 1024"),
        ),
    ):
        refused(stored_config(), {**tensors, name: wrong}, "m.experts", *parts)


def test_experts_that_differ() -> None:
    odd = FluteConfig(QuantizationConfig(SPEC, overrides={"m.experts.1.up_proj": QuantSpec(bits=3)}))
    with pytest.raises(FormatError, match=r"0\.gate_proj is .*bits=4.* m\.experts\.1\.up_proj is .*bits=3"):
        make(odd)
    half = FluteConfig(QuantizationConfig(SPEC, ("m.experts.1.up_proj",)))
    with pytest.raises(FormatError, match=r"m\.experts\.1\.up_proj is to stay in 16 bits"):
        make(half)
    tensors, _ = random_experts(learned(SPEC))
    scales = tensors["4.gate_proj.scales"].bfloat16()
    refused(stored_config(), {**tensors, "4.gate_proj.scales": scales}, "bfloat16 and float16")


def test_what_is_not_implemented() -> None:
    with pytest.raises(UnsupportedError, match=r"m\.experts .*activation swigluoai"):
        make(stored_config(), activation=MoEActivation.SWIGLUOAI)
    with pytest.raises(UnsupportedError, match=r"swiglu_limit = 7\.0"):
        make(stored_config(), swiglu_limit=7.0)
