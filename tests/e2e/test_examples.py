"""The parts that the examples are made of, and the demo on a tiny model; nothing here is downloaded."""

from __future__ import annotations

import bz2
import hashlib
import math
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import cache
import measure
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10">
  <page><title>Moth &amp; Flame</title><ns>0</ns><revision><text>{article}</text></revision></page>
  <page><title>Old</title><ns>0</ns><redirect/><revision><text>{article}</text></revision></page>
  <page><title>Talk:Moth</title><ns>1</ns><revision><text>{article}</text></revision></page>
  <page><title>Stub</title><ns>0</ns><revision><text>Too short to be an article.</text></revision></page>
</mediawiki>"""
SENTENCE = "A moth flies by night, and by day it sleeps on the bark of a tree where no bird will find it."


# --- cache.py ---------------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "first").write_text("1")
    (path / "second").write_text("2")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_made_is_made_once(tmp_path: Path) -> None:
    target = tmp_path / "parent/target"
    calls: list[Path] = []

    def make(path: Path) -> None:
        calls.append(path)
        make_folder(path)

    for _ in range(2):
        assert cache.make_once(target, make) == target
    assert len(calls) == 1
    assert names(target) == {"first", "second"}
    assert names(target.parent) == {"target"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(path: Path) -> None:
        make_folder(path)
        raise error

    with pytest.raises(error):
        cache.make_once(tmp_path / "target", fail)
    assert names(tmp_path) == set()


def test_the_half_of_a_killed_run_is_not_taken_for_whole(tmp_path: Path) -> None:
    program = (
        f"import os, sys; sys.path.insert(0, {str(Path(cache.__file__).parent)!r})\n"
        "import cache, pathlib\n"
        "def die(path):\n"
        "    path.mkdir(); (path / 'first').write_text('1'); os._exit(9)\n"
        f"cache.make_once(pathlib.Path({str(tmp_path / 'target')!r}), die)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert not (tmp_path / "target").exists()
    cache.make_once(tmp_path / "target", make_folder)
    assert names(tmp_path / "target") == {"first", "second"}


def test_of_two_runs_at_once_the_faster_one_wins(tmp_path: Path) -> None:
    def overtaken(path: Path) -> None:
        make_folder(path)
        make_folder(tmp_path / "target")
        (tmp_path / "target/third").write_text("of the faster run")

    cache.make_once(tmp_path / "target", overtaken)
    assert names(tmp_path / "target") == {"first", "second", "third"}
    assert names(tmp_path) == {"target"}


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLUTE_CACHE", str(tmp_path))
    assert cache.default_cache() == tmp_path
    monkeypatch.delenv("FLUTE_CACHE")
    assert cache.default_cache() == Path(__file__).resolve().parents[2] / ".cache"


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Content of ``data/file`` in a wheel that takes the place of a download."""

    def download(requirement: str, folder: Path) -> None:
        folder.mkdir()
        with zipfile.ZipFile(folder / "name-1-py3-none-any.whl", "w") as archive:
            archive.writestr("data/file", b"content")

    monkeypatch.setattr(cache, "_download", download)
    return b"content"


def test_fetch_keeps_one_file_of_a_wheel(wheel: bytes, tmp_path: Path) -> None:
    digest = hashlib.sha256(wheel).hexdigest()
    kept = cache.fetch("name==1", "data/file", digest, tmp_path / "kept")
    assert kept.read_bytes() == wheel
    assert names(tmp_path) == {"kept"}


@pytest.mark.parametrize(
    ("member", "said"), [("data/file", "expected 0123"), ("data/other", "holds no file data/other")]
)
def test_fetch_refuses_another_file(wheel: bytes, tmp_path: Path, member: str, said: str) -> None:
    with pytest.raises(cache.DownloadError, match=said):
        cache.fetch("name==1", member, "0123", tmp_path / "kept")
    assert names(tmp_path) == set()


@pytest.mark.skipif(find_spec("pip") is None, reason="pip is not installed here.")
@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("PIP_NO_INDEX", "1", "No matching distribution found for gensim==4.4.0"),
        ("PIP_INDEX_URL", "https://127.0.0.1:9/simple", "the package index cannot be reached."),
    ],
)
def test_a_failed_download_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(cache.DownloadError) as caught:
        cache.fetch("gensim==4.4.0", "x", "0123", tmp_path / "kept")
    assert str(caught.value) == f"pip could not download gensim==4.4.0, which this example needs: {said}"
    assert names(tmp_path) == set()


# --- texts.py ---------------------------------------------------------------------------------------------


def test_a_dump_is_read_as_articles_of_prose(tmp_path: Path) -> None:
    texts = pytest.importorskip("texts", reason="mwparserfromhell is not installed here.")
    # Escaped as in a dump; long enough, in twenty paragraphs, to be an article.
    paragraph = SENTENCE.replace("moth", "&lt;b&gt;moth&lt;/b&gt;&lt;ref&gt;A book&lt;/ref&gt;", 1)
    dump = tmp_path / "dump.bz2"
    dump.write_bytes(bz2.compress(DUMP.format(article="\n\n".join([paragraph] * 20)).encode()))
    assert texts.extract(dump) == "\n".join(["Moth & Flame", *[SENTENCE] * 20]) + "\n"


@pytest.mark.parametrize(
    ("source", "read"),
    [
        (SENTENCE, [SENTENCE]),
        (f"== Night ==\n{SENTENCE}\nShort.\n{SENTENCE}", [SENTENCE, SENTENCE]),
        (f"* {SENTENCE}\n# {SENTENCE}\n: {SENTENCE}", []),
        (f"{{{{Infobox|name={SENTENCE}}}}}\n{{|\n| {SENTENCE}\n|}}\n<!-- {SENTENCE} -->", []),
        (f"[[File:Moth.jpg|thumb|{SENTENCE}]]\n[[Category:{SENTENCE}]]\n[[de:{SENTENCE}]]", []),
        ("A [[moth|''moth'']] " + SENTENCE[7:], [SENTENCE]),
        ("A [[moth]]" + SENTENCE[6:], [SENTENCE]),
        ("A [https://example.org moth]<ref name=x /> ({{IPA|x}}; )" + SENTENCE[6:], [SENTENCE]),
        (SENTENCE.replace(" ", "&nbsp;", 1), [SENTENCE]),
    ],
)
def test_prose_is_what_a_reader_sees_in_sentences(source: str, read: list[str]) -> None:
    texts = pytest.importorskip("texts", reason="mwparserfromhell is not installed here.")
    assert texts.prose(source) == read


# --- measure.py -------------------------------------------------------------------------------------------


def test_windows_lie_evenly_from_beginning_to_end() -> None:
    tokens = torch.arange(10)
    assert measure.evenly_spaced(tokens, 3, 4).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert measure.evenly_spaced(tokens, 1, 10).tolist() == [list(range(10))]
    for count, length in ((0, 4), (1, 1), (1, 11)):
        with pytest.raises(ValueError, match=f"{count} windows of {length} tokens from a text of 10"):
            measure.evenly_spaced(tokens, count, length)


class Bigrams:
    """A language model of three words, whose next word depends on the last one only."""

    device = torch.device("cpu")
    chances = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])

    def __call__(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.chances.log()[ids].to(torch.float64))


def test_perplexity_is_that_of_a_calculation_by_hand() -> None:
    windows = torch.tensor([[0, 1, 1], [2, 0, 2]])
    # The first token of a window is given: 0 -> 1, 1 -> 1 and 2 -> 0, 0 -> 2.
    by_hand = (0.25 * 0.8 * 0.2 * 0.25) ** (-1 / 4)
    seen = []
    found = measure.perplexity(Bigrams(), windows, lambda: seen.append(1))
    assert math.isclose(found, by_hand, rel_tol=1e-6)
    assert len(seen) == 2


def test_speed_is_the_median_over_the_steps_of_all_rounds(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    # Four tokens a round take three steps: a second each, and a long pause in the second round.
    times = iter([0, 1, 2, 3, 10, 11, 99, 100, 200, 201, 202, 203])
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert measure.decode_speeds({"x": model}, torch.tensor([[5, 6, 7]]), 4) == {"x": 1.0}
    assert next(times, None) is None


def test_a_folder_weighs_what_its_files_do(tmp_path: Path) -> None:
    make_folder(tmp_path / "folder")
    (tmp_path / "more").write_text("345")
    assert measure.folder_bytes(tmp_path) == 5


# --- demo.py ----------------------------------------------------------------------------------------------


def test_the_demo_tells_its_story(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    words: str,
    tmp_path: Path,
) -> None:
    demo = pytest.importorskip("demo", reason="mwparserfromhell is not installed here.")
    monkeypatch.setenv("FLUTE_CACHE", str(tmp_path))
    monkeypatch.setattr(demo.smollm2, "checkpoint", lambda: tiny_model)
    monkeypatch.setattr(demo.texts, "wikipedia", lambda: words)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--windows", "2", "--tokens", "4"])
    for _ in range(2):  # the second run writes over the quantized folders of the first
        demo.main()
        lines = capsys.readouterr().out.splitlines()
        rows = [line.split() for line in lines if "-bit" in line and "MB" in line]
        assert [row[1] for row in rows] == ["16-bit", "4-bit", "3-bit"]
    assert names(tmp_path) == {"SmolLM2-135M-Instruct-4bit", "SmolLM2-135M-Instruct-3bit"}
