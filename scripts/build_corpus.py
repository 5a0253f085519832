"""Build the training text of the bundled model from three public-domain works that Debian ships.

    python scripts/build_corpus.py OUT        writes OUT/train.txt, OUT/valid.txt, OUT/test.txt (about 9 MB)

Needs a Debian machine with apt (as root, to install the `bible` reader). The works, and where Debian's copyright file
says that they are in the public domain: the King James Bible (bible-kjv-text: copyright expired), the Jargon File
4.4.7 (jargon-text: "in the public domain"), SQLite's documentation (sqlite3-doc: License: public-domain).
"""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

BLOCK = 8192
"""Held-out text is cut as whole blocks. The works still repeat themselves (the Bible above all): of 128-byte windows of
the held-out text about 3 % stand somewhere in the training text word for word."""
HELD_OUT_EVERY = 50


class Paragraphs(HTMLParser):
    """The running prose of a page: paragraphs and list items, without code, tables and navigation."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._inside = False
        self._skip = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in ("pre", "table", "script", "style"):
            self._skip += 1
        elif tag in ("p", "li", "dd"):
            self._inside = True
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("pre", "table", "script", "style"):
            self._skip = max(0, self._skip - 1)
        elif tag in ("p", "li", "dd", "div", "h1", "h2", "h3"):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside and not self._skip:
            self.paragraphs[-1] += data


def tidy(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def bible() -> str:
    subprocess.run(["apt-get", "install", "-y", "-qq", "bible-kjv", "bible-kjv-text"], check=True)
    raw = subprocess.run(["bible", "-f"], input="ge1:1-re22:21\n", capture_output=True, text=True, check=True).stdout
    verses = re.findall(r"^([0-9A-Za-z]+\d+):(\d+) (.+)$", raw, flags=re.MULTILINE)
    lines, seen = [], set()
    for chapter, verse, text in verses:
        if (chapter, verse) not in seen:  # the reader greets with Genesis 1:1 before it answers
            seen.add((chapter, verse))
            lines.append(("\n" if verse == "1" else "") + tidy(text))
    return "\n".join(lines)


def package(name: str, folder: Path) -> Path:
    subprocess.run(["apt-get", "download", "-qq", name], cwd=folder, check=True)
    deb = next(folder.glob(f"{name}_*.deb"))
    subprocess.run(["dpkg", "-x", str(deb), str(folder / name)], check=True)
    return folder / name / "usr" / "share" / "doc"


def jargon(folder: Path) -> str:
    text = gzip.decompress((package("jargon-text", folder) / "jargon-text" / "jargon.txt.gz").read_bytes())
    paragraphs = [tidy(p) for p in text.decode("latin-1").split("\n\n")]
    return "\n\n".join(p for p in paragraphs if len(p) > 60)


def sqlite(folder: Path) -> str:
    seen: set[str] = set()
    kept = []
    for page in sorted((package("sqlite3-doc", folder) / "sqlite3").rglob("*.html")):
        parser = Paragraphs()
        parser.feed(page.read_text(errors="replace"))
        for paragraph in map(tidy, parser.paragraphs):
            if len(paragraph) > 80 and paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
    return "\n\n".join(kept)


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("bible", bible()), ("jargon", jargon(Path(folder))), ("sqlite", sqlite(Path(folder)))):
            ascii_text = text.encode("ascii", errors="ignore").decode()
            print(f"{name}: {len(ascii_text):,} bytes")
            for i in range(0, len(ascii_text), BLOCK):
                kind = {0: "valid", 1: "test"}.get(i // BLOCK % HELD_OUT_EVERY, "train")
                parts[kind].append(ascii_text[i : i + BLOCK])
    for kind, blocks in parts.items():
        # Blocks of one work follow each other, so joining them restores the text except where a block was held out.
        (out / f"{kind}.txt").write_text("".join(blocks))
        print(f"{kind}: {sum(map(len, blocks)):,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
