"""English text to measure a language model with: 93 Wikipedia articles of 2016.

The wheel of gensim carries an excerpt of a Wikipedia dump as test data. Its text belongs to Wikipedia's
authors, under CC BY-SA, so it is fetched and cleaned where it is used and never distributed with FLUTE.
"""

from __future__ import annotations

import bz2
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from xml.etree import ElementTree as ET

import cache
import mwparserfromhell
from mwparserfromhell import nodes
from mwparserfromhell.wikicode import Wikicode

__all__ = ["articles", "extract", "prose", "wikipedia"]

_REQUIREMENT = "gensim==4.4.0"
_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"

_SHORTEST_PARAGRAPH = 80  # characters; what is shorter is a caption, a list or a line of a formula
_SHORTEST_ARTICLE = 1500

# Markup around words of a sentence. All other tags (references, tables, formulas) go with their content.
_TEXT_TAGS = {"abbr", "b", "big", "blockquote", "center", "cite", "del", "div", "em", "i", "ins", "nowiki"}
_TEXT_TAGS |= {"p", "poem", "q", "s", "small", "span", "strong", "sub", "sup", "tt", "u", "var"}
_LIST_TAGS = {"dd", "dt", "li"}
_LIST_MARK = "*"
_NO_PROSE = (_LIST_MARK, "!", "|", "[[", "{{")  # lists, and markup that its author left open
# Links that show a picture, or that file a page under a heading or in another language.
_UNSHOWN_LINK = re.compile(r"\s*(file|image|media|category|simple|[a-z]{2,3}(-[a-z]+)*)\s*:", re.IGNORECASE)
_EMPTY_PARENTHESES = re.compile(r"\s*\([\s,;:]*\)")


def wikipedia() -> str:
    """The evaluation text; the dump that it is extracted from is kept in the cache.

    Raises:
        DownloadError: the dump is not there and cannot be downloaded.
    """
    return extract(cache.fetch(_REQUIREMENT, _MEMBER, _SHA256, cache.default_cache() / "enwiki.xml.bz2"))


def extract(dump: Path) -> str:
    """The text of a compressed XML dump: an article's title, then its paragraphs, a line each."""
    texts = []
    with bz2.open(dump) as file:
        for title, wikitext in articles(file):
            paragraphs = prose(wikitext)
            if sum(map(len, paragraphs)) >= _SHORTEST_ARTICLE:
                texts.append("\n".join([title, *paragraphs]))
    return "\n\n".join(texts) + "\n"


def articles(dump: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Title and wikitext of the pages in the main namespace that are no redirects."""
    for _, page in ET.iterparse(dump):
        if not page.tag.endswith("}page"):
            continue
        if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
            yield page.findtext("{*}title") or "", page.findtext("{*}revision/{*}text") or ""
        page.clear()  # of six million characters one page is kept


def prose(wikitext: str) -> list[str]:
    """The paragraphs of running text in an article's source."""
    lines = _shown(mwparserfromhell.parse(wikitext)).split("\n")
    paragraphs = (" ".join(_EMPTY_PARENTHESES.sub("", line).split()) for line in lines)
    return [p for p in paragraphs if len(p) >= _SHORTEST_PARAGRAPH and not p.startswith(_NO_PROSE)]


def _shown(code: Wikicode | None) -> str:
    return "".join(map(_shown_node, code.nodes)) if code is not None else ""


def _shown_node(node: nodes.Node) -> str:
    """What a reader of the page sees of a node, as far as it belongs to a sentence."""
    match node:
        case nodes.Text():
            return str(node.value)
        case nodes.HTMLEntity():
            return str(node.normalize())
        case nodes.Wikilink():
            title = str(node.title)
            return "" if _UNSHOWN_LINK.match(title) else _shown(node.text) or title.removeprefix(":")
        case nodes.ExternalLink():
            return _shown(node.title)
        case nodes.Tag():
            name = str(node.tag).strip().lower()
            if name in _LIST_TAGS:
                return _LIST_MARK
            return "\n" if name == "br" else _shown(node.contents) if name in _TEXT_TAGS else ""
    return ""  # templates, comments, headings
