"""Quantized checkpoints in other people's layouts, written plainly, and the values that they stand for.

Each writer takes a 16-bit folder, quantizes its linears, and returns what the source's own library would
dequantize them to. Packing and dequantizing are written from the formats' descriptions, weight by weight
where that is clearest, and share no code with the importers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
FP4 = (*_FP4, *(-v for v in _FP4))

Values = dict[str, Tensor]
"""Module name to the dequantized weight ``[N, K]``."""
Encoder = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def write(source: Path, target: Path, encode: Encoder, quantization: dict[str, Any] | None) -> Values:
    """Replace the linears of a folder (heads left out) by the tensors that ``encode`` makes of each."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (target / "config.json").write_text(json.dumps(config))
    values: Values = {}
    for file in source.glob("*.safetensors"):
        tensors = {}
        for name, tensor in load_file(file).items():
            module = name.removesuffix(".weight")
            if name.endswith("_proj.weight"):
                made, values[module] = encode(module, tensor)
                tensors |= {f"{module}{suffix}": value.contiguous() for suffix, value in made.items()}
            else:
                tensors[name] = tensor
        save_file(tensors, target / file.name, {"format": "pt"})
    return values


# --- bitsandbytes ---------------------------------------------------------------------------------


def bitsandbytes_tensors(
    weight: Tensor, kind: str = "nf4", block: int = 64, nested: bool = False
) -> tuple[dict[str, Tensor], Tensor, np.ndarray[Any, Any]]:
    """The tensors of one weight, its dequantized values, and the absolute maximum of each weight's block."""
    table = np.array(NF4 if kind == "nf4" else FP4, dtype=np.float32)
    flat = weight.float().numpy().reshape(-1)
    starts = range(0, len(flat), block)
    absmax = np.array([np.abs(flat[i : i + block]).max() for i in starts], dtype=np.float32)
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors: dict[str, Tensor] = {}
    if nested:
        offset = np.float32(absmax.mean())
        steps = np.linspace(-1, 1, 256, dtype=np.float32) ** 3  # finer around zero, as theirs is
        rest = absmax - offset
        largest = np.array([np.abs(rest[i : i + 256]).max() for i in range(0, len(rest), 256)], np.float32)
        bytes_ = np.zeros(len(rest), dtype=np.uint8)
        for i, value in enumerate(rest):
            bytes_[i] = np.abs(steps * largest[i // 256] - value).argmin()
            absmax[i] = np.float32(np.float32(steps[bytes_[i]] * largest[i // 256]) + offset)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        tensors[".weight.absmax"] = torch.from_numpy(bytes_)
        tensors[".weight.nested_absmax"] = torch.from_numpy(largest)
        tensors[".weight.nested_quant_map"] = torch.from_numpy(steps)
    else:
        tensors[".weight.absmax"] = torch.from_numpy(absmax)
    scale = np.repeat(absmax, block)[: len(flat)]
    codes = np.abs(flat[:, None] / scale[:, None] - table).argmin(1).astype(np.uint8)
    packed = np.array([codes[i] << 4 | codes[i + 1] for i in range(0, len(codes), 2)], dtype=np.uint8)
    tensors[".weight"] = torch.from_numpy(packed)[:, None]
    tensors[".weight.quant_map"] = torch.from_numpy(table)
    text = json.dumps(state).encode()
    tensors[f".weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    values = torch.from_numpy(table[codes] * scale).reshape(weight.shape)
    return tensors, values, scale.reshape(weight.shape)


def write_bitsandbytes(source: Path, target: Path, **options: Any) -> Values:
    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return bitsandbytes_tensors(weight, **options)[:2]

    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": options.get("kind", "nf4"),
        "bnb_4bit_use_double_quant": options.get("nested", False),
    }
    return write(source, target, encode, config)


# --- GPTQ -----------------------------------------------------------------------------------------


def gptq_words(codes: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Codes ``[K, N]`` packed along K into int32 ``[K * bits / 32, N]``, as AutoGPTQ's loops do."""
    k, n = codes.shape
    words = np.zeros((k * bits // 32, n), dtype=np.uint32)
    wide = codes.astype(np.uint32)
    if bits in (2, 4):
        for i in range(k):
            words[i * bits // 32] |= wide[i] << np.uint32(i * bits % 32)
        return words.view(np.int32)
    for start in range(0, k, 32):  # 32 codes in three words; the codes 10 and 21 lie across a border
        first, second, third = (start * 3 // 32 + i for i in range(3))
        for j in range(10):
            words[first] |= wide[start + j] << np.uint32(3 * j)
            words[second] |= wide[start + 11 + j] << np.uint32(3 * j + 1)
            words[third] |= wide[start + 22 + j] << np.uint32(3 * j + 2)
        words[first] |= wide[start + 10] << np.uint32(30)
        words[second] |= wide[start + 10] >> np.uint32(2)
        words[second] |= wide[start + 21] << np.uint32(31)
        words[third] |= wide[start + 21] >> np.uint32(1)
    return words.view(np.int32)


def gptq_tensors(
    weight: Tensor,
    bits: int = 4,
    group: int = 32,
    version: int = 1,
    zeros: Tensor | None = None,
    g_idx: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one weight and its dequantized values.

    Args:
        zeros: ``[K / g, N]``; symmetric without.
        g_idx: ``[K]``; groups of neighbours without.
    """
    n, k = weight.shape
    count = k // group
    index = (torch.arange(k) // group if g_idx is None else g_idx).to(torch.int32)
    rows = weight.float().t()  # [K, N]
    scales = torch.stack([rows[index == g].abs().amax(0) for g in range(count)]) * 2 / (2**bits - 1)
    scales = scales.clamp(min=1e-6).to(scale_dtype)
    zero = torch.full((count, n), 1 << bits - 1) if zeros is None else zeros
    of_input = scales.float()[index.long()], zero[index.long()]
    codes = (rows / of_input[0] + of_input[1]).round().clamp(0, 2**bits - 1).to(torch.int64)
    stored = (zero - (2 - version)).numpy().astype(np.uint32)
    tensors = {
        ".qweight": torch.from_numpy(gptq_words(codes.numpy(), bits)),
        ".qzeros": torch.from_numpy(gptq_words(stored.T, bits).T.copy()),
        ".scales": scales,
        ".g_idx": index,
    }
    values = (of_input[0] * (codes - of_input[1]).float()).t().contiguous()
    return tensors, values


def write_gptq(source: Path, target: Path, **options: Any) -> Values:
    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return gptq_tensors(weight, **options)

    config = {
        "quant_method": "gptq",
        "bits": options.get("bits", 4),
        "group_size": options.get("group", 32),
        "desc_act": "g_idx" in options,
        "sym": "zeros" not in options,
        "checkpoint_format": "gptq_v2" if options.get("version", 1) == 2 else "gptq",
    }
    return write(source, target, encode, config)


# --- AWQ ------------------------------------------------------------------------------------------


def awq_words(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Codes ``[rows, N]`` packed along N into int32 ``[rows, N / 8]``."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def awq_tensors(weight: Tensor, group: int = 32, zero: int | Tensor = 8) -> tuple[dict[str, Tensor], Tensor]:
    n, k = weight.shape
    rows = weight.float().t()
    scales = (rows.reshape(k // group, group, n).abs().amax(1) / 7.5).to(torch.float16)
    zeros = torch.as_tensor(zero).expand(k // group, n)
    repeated = scales.float().repeat_interleave(group, 0), zeros.repeat_interleave(group, 0)
    codes = (rows / repeated[0] + repeated[1]).round().clamp(0, 15)
    tensors = {
        ".qweight": torch.from_numpy(awq_words(codes.numpy())),
        ".qzeros": torch.from_numpy(awq_words(zeros.numpy())),
        ".scales": scales,
    }
    return tensors, ((codes - repeated[1]) * repeated[0]).t().contiguous()


def write_awq(source: Path, target: Path, **options: Any) -> Values:
    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return awq_tensors(weight, **options)

    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    return write(source, target, encode, config)


# --- upstream FLUTE -------------------------------------------------------------------------------


def upstream_words(codes: np.ndarray[Any, Any], bits: int, tile: int = 32) -> np.ndarray[Any, Any]:
    """Codes ``[N, K]`` of 2 or 4 bits packed into int16 ``[N * bits / 16, K]``."""
    n, k = codes.shape
    per_word = 16 // bits
    words = np.zeros((n // per_word, k), dtype=np.uint16)
    for row in range(n):
        block, inside = divmod(row, per_word * tile)
        j, p = divmod(inside, tile)
        for column in range(k):
            shift = bits * (2 * (j % (per_word // 2)) + 1 - column % 2)
            words[block * tile + p, 2 * (column // 2) + j // (per_word // 2)] |= np.uint16(
                int(codes[row, column]) << shift
            )
    return words.view(np.int16)


def upstream_tensors(
    weight: Tensor, bits: int = 4, group: int = 64, tile: int = 32
) -> tuple[dict[str, Tensor], Tensor]:
    n, k = weight.shape
    table = torch.tensor(NF4)[:: 16 >> bits].to(weight.dtype)
    grouped = weight.float().view(n, k // group, group)
    scales = grouped.abs().amax(2).to(weight.dtype)
    codes = (grouped[..., None] / scales.float()[..., None, None] - table.float()).abs().argmin(-1)
    pairs = torch.stack(torch.meshgrid(table, table, indexing="ij"), -1).contiguous()
    tensors = {
        ".weight": torch.from_numpy(upstream_words(codes.view(n, k).numpy(), bits, tile)),
        ".scales": scales,
        ".tables": table,
        ".tables2": pairs.view(torch.float32),
    }
    return tensors, (table.float()[codes] * scales.float()[..., None]).view(n, k)


def write_upstream(source: Path, target: Path, *, sms: bool = True, **options: Any) -> Values:
    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return upstream_tensors(weight, **options)

    values = write(source, target, encode, None)
    config = {"num_bits": options.get("bits", 4), "group_size": options.get("group", 64)}
    (target / "flute_config.json").write_text(json.dumps({**config, **({"num_sms": 108} if sms else {})}))
    return values


# --- HIGGS of Transformers ------------------------------------------------------------------------


def write_higgs(
    source: Path, target: Path, *, bits: int, p: int, template: int, size: int, dtype: torch.dtype
) -> Values:
    """Values are those of the rotated weight. Codes are random: what they stand for is what matters."""
    from transformers.integrations.higgs import get_higgs_grid

    random = torch.Generator().manual_seed(0)
    grid = get_higgs_grid(p, 2 ** (p * bits)).to(dtype)
    # The tuned kernels of upstream with tiles of 64: 0 to 15, 48 to 63 and 96 to 111 at 4 bits, and
    # 0 to 3, 12 to 15 and 24 to 27 at 2.
    tile = 64 if template % (48 if bits == 4 else 12) < (16 if bits == 4 else 4) else 32
    metadata = {}

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        metadata[name] = {"template_id": template, "num_bits": bits}
        codes = torch.randint(0, 2 ** (p * bits), (n, k // p), generator=random)
        scales = torch.rand(n, k // size, generator=random).to(dtype).repeat_interleave(size // 64, 1)
        halves = [(codes >> bits) & (2**bits - 1), codes & (2**bits - 1)] if p == 2 else [codes]
        flat = torch.stack(halves, -1).view(n, k)
        single = torch.arange(2**bits).to(dtype) if p == 2 else grid[:, 0]
        pairs = grid if p == 2 else torch.cartesian_prod(single, single)
        tensors = {
            ".weight": torch.from_numpy(upstream_words(flat.numpy(), bits, tile)),
            ".scales": scales,
            ".tables": single.clone(),
            ".tables2": pairs.reshape(2**bits, 2**bits, 2).clone().view(torch.float16),
        }
        values = grid.float()[codes].reshape(n, k // 64, 64) * scales.float()[..., None]
        return tensors, values.reshape(n, k)

    config = {"quant_method": "higgs", "bits": bits, "p": p, "hadamard_size": size, "group_size": 64}
    values = write(source, target, encode, config)
    written = json.loads((target / "config.json").read_text())
    written["quantization_config"]["tune_metadata"] = metadata
    (target / "config.json").write_text(json.dumps(written))
    return values
