"""Our reader and writer of safetensors, against the format's own library and against hostile files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from flute_kernels import FluteError
from flute_quant import CheckpointError
from flute_quant.checkpoint.safetensors_reader import DTYPE_NAMES, DTYPES, SafetensorsFile
from flute_quant.checkpoint.safetensors_writer import SafetensorsWriter, TensorSlot, file_size

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor([True, False, True]),
    "c": torch.randn(5, 7).to(torch.bfloat16),
    "d": torch.zeros(0, 4),
    "e": torch.tensor(3, dtype=torch.int64),
}


def slots(tensors: dict[str, torch.Tensor]) -> list[TensorSlot]:
    return [TensorSlot(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()]


def crafted(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def test_the_reader_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(file.read(name), tensor)
        assert file.read(name).dtype == tensor.dtype


def test_the_library_reads_what_the_writer_writes_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, slots(TENSORS)) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    assert path.stat().st_size == file_size(slots(TENSORS))
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, TENSORS[name])
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned_to_its_type(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, slots(TENSORS)) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    for stored in SafetensorsFile(path).tensors.values():
        assert stored.start % DTYPES[stored.dtype].itemsize == 0


def test_an_unfinished_file_never_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    def stop() -> None:
        with SafetensorsWriter(path, slots(TENSORS)) as writer:
            writer.write("a", TENSORS["a"])
            assert not path.exists()
            raise RuntimeError("stop")

    def forget() -> None:
        with SafetensorsWriter(path, slots(TENSORS)) as writer:
            writer.write("a", TENSORS["a"])

    for action, said in ((stop, "stop"), (forget, "lacks 4 tensors, one is b")):
        with pytest.raises((RuntimeError, ValueError), match=said):
            action()
        assert list(tmp_path.iterdir()) == []


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes"),
        (b"\x00" * 7, "7 bytes"),
        (crafted({}, length=1 << 63), "9223372036854775808"),
        (crafted({}, length=3), "truncated"),
        (crafted(b"{"), "not JSON"),
        (crafted(b"\xff\xfe"), "not JSON"),
        (crafted(b"[" * 5000), "not JSON"),
        (crafted([]), "list"),
        (crafted({"a": 1}), "a in .* has no valid"),
        (crafted({"a": {**F32, "dtype": "F17"}}, bytes(8)), "F17"),
        (crafted({"a": {**F32, "shape": [3]}}, bytes(8)), "12 bytes; its offsets span 8"),
        (crafted({"a": {**F32, "shape": [-2]}}, bytes(8)), "no valid"),
        (crafted({"a": {**F32, "shape": [2.0]}}, bytes(8)), "no valid"),
        (crafted({"a": {**F32, "shape": [True, 2]}}, bytes(8)), "no valid"),
        (crafted({"a": {**F32, "shape": [1 << 62, 1 << 62]}}, bytes(8)), "offsets span 8"),
        (crafted({"a": {**F32, "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, bytes(8)), "truncated"),
        (crafted({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)), "span -8"),
        (crafted({"a": F32, "b": F32}, bytes(8)), "begins at byte"),
        (crafted({"a": {**F32, "data_offsets": [8, 16]}}, bytes(16)), "begins at byte"),
        (crafted({"a": F32}, bytes(7)), "truncated"),
        (crafted({"a": F32}, bytes(9)), "belong to no tensor"),
        (crafted(b'{"a":{},"a":{}}'), "twice"),
        (crafted(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        SafetensorsFile(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    file = SafetensorsFile(path)
    with path.open("r+b") as opened:
        opened.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="ended 100 bytes before the end of a"):
        file.read("a")


def _read_all(path: Path) -> None:
    file = SafetensorsFile(path)
    for name, stored in file.tensors.items():
        assert file.read(name).numel() == stored.numel


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(save({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.float16)}))
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "grow", "digit"]))
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        if kind == "flip" and content:
            content[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 20))]
        elif kind == "grow":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        elif content:
            content[at] = data.draw(st.sampled_from(b'0123456789[]{},":-.e'))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    _succeeds_or_refuses(lambda: _read_all(path))


@settings(max_examples=200, deadline=None)
@given(
    header=st.dictionaries(
        st.text(max_size=4),
        st.one_of(
            st.integers(),
            st.fixed_dictionaries(
                {
                    "dtype": st.one_of(st.sampled_from(list(DTYPES)), st.text(max_size=3), st.none()),
                    "shape": st.lists(st.one_of(st.integers(-2, 9), st.integers(), st.none()), max_size=3),
                    "data_offsets": st.lists(st.one_of(st.integers(0, 40), st.integers()), max_size=3),
                }
            ),
        ),
        max_size=3,
    ),
    body=st.binary(max_size=40),
)
def test_invented_headers_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, object], body: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "invented.safetensors"
    path.write_bytes(crafted(header, body))
    _succeeds_or_refuses(lambda: _read_all(path))


def _succeeds_or_refuses(action: Callable[[], object]) -> None:
    with contextlib.suppress(FluteError):
        action()
