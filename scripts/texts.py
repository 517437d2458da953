# SPDX-License-Identifier: Apache-2.0
"""Turns the pinned packages of the pin "texts" into plain text files.

    calib/<language>.txt  calib/code.txt   what calibration may read
    eval/<language>.txt   eval/code.txt    what nothing but evaluation may read
    eval/chat.txt                          the same, conversations
    calib/mix.txt                          pieces of all calib files in turn

Prose is the Debian Administrator's Handbook, the same pages for every language;
code is Django's. Every fourth page or file goes to eval, in all languages the same
ones, so that no passage is in both halves under another language. Conversations are
of two people each, from the Chit Chat dataset; all of them go to eval.
"""

import hashlib
import html.parser
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import tempfile
import zipfile

EVAL_EVERY = 4
MIX_PIECE_CHARS = 6000
MIX_PIECES_PER_FILE = 40
PAGE_CHARS_MIN = 2000
CODE_CHARS = range(4000, 60001)
SECTION_TITLE = re.compile(r"\d+(\.\d+)+\.\s.{0,120}")  # headings and tables of contents
CHAT_CHARS = 240000
CHAT_TURNS_MIN = 12
CHAT_MEMBER = "chitchat_dataset/dataset.json"
HANDBOOK = "usr/share/doc/debian-handbook/html"


class PlainText(html.parser.HTMLParser):
    """Paragraphs, headings and listings of a handbook page; no navigation."""

    BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "li", "pre", "dt", "dd"}
    SKIPPED = {"head", "script", "style"}

    def __init__(self):
        super().__init__()
        self.blocks = [""]
        self.n_skipped_open = 0
        self.in_pre = False

    def handle_starttag(self, tag, attrs):
        if tag in self.SKIPPED:
            self.n_skipped_open += 1
        elif tag == "ul" and "docnav" in (dict(attrs).get("class") or ""):
            self.n_skipped_open += 1
        elif tag in self.BLOCKS:
            self.blocks.append("")
            self.in_pre = tag == "pre"

    def handle_endtag(self, tag):
        # docnav lists hold no other list, so the next </ul> is theirs
        if self.n_skipped_open and (tag in self.SKIPPED or tag == "ul"):
            self.n_skipped_open -= 1
        elif tag in self.BLOCKS:
            self.blocks.append("")
            self.in_pre = False

    def handle_data(self, data):
        if not self.n_skipped_open:
            self.blocks[-1] += data if self.in_pre else re.sub(r"\s+", " ", data)

    def text(self):
        kept = [block.strip() for block in self.blocks]
        return "\n\n".join(b for b in kept if b and not SECTION_TITLE.fullmatch(b)) + "\n"


def page_text(path):
    parser = PlainText()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser.text()


def handbook_pages(root, folder):
    """[(page name, text)] of the pages long enough to be prose, by name."""
    pages = []
    for path in sorted((root / HANDBOOK / folder).glob("*.html")):
        if path.name not in ("index.html", "ix01.html"):
            pages.append((path.name, page_text(path)))
    return pages


def code_files(wheel_path):
    """[(file name, text)] of Python files of ordinary length, by name."""
    files = []
    with zipfile.ZipFile(wheel_path) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(".py") and "/locale/" not in name:
                text = wheel.read(name).decode("utf-8")
                if len(text) in CODE_CHARS:
                    files.append((name, text))
    return files


def chat_turns(conversation):
    """[(sender, text)], no two in a row by the same sender."""
    messages = [message for burst in conversation["messages"] for message in burst if message["text"].strip()]
    return [(sender, " ".join(" ".join(message["text"].split()) for message in several))
            for sender, several in itertools.groupby(messages, lambda message: message["sender"])]


def chat_text(turns):
    """Who writes first is the user. Each answer ends a paragraph."""
    lines = [f"{'Assistant' if i % 2 else 'User'}: {text}\n" + "\n" * (i % 2) for i, (_, text) in enumerate(turns)]
    return "".join(lines).rstrip("\n") + "\n\n"


def chats(wheel_path):
    """Conversations of two people, long enough to be one, in the order of the file."""
    with zipfile.ZipFile(wheel_path) as wheel:
        conversations = json.loads(wheel.read(CHAT_MEMBER))
    out = ""
    for conversation in conversations.values():
        turns = chat_turns(conversation)
        if len(turns) >= CHAT_TURNS_MIN and len({sender for sender, _ in turns}) == 2:
            out += chat_text(turns)
        if len(out) >= CHAT_CHARS:
            break
    return out


def split(pages):
    """{half: text}; the first page of every EVAL_EVERY goes to eval."""
    halves = {"calib": "", "eval": ""}
    for i, (_, text) in enumerate(pages):
        halves["calib" if i % EVAL_EVERY else "eval"] += text + "\n"
    return halves


def mix(texts):
    """Takes a piece of each text in turn, cut at line ends."""
    rest = [text[:MIX_PIECE_CHARS * MIX_PIECES_PER_FILE] for text in texts]
    out = ""
    while any(rest):
        for i, text in enumerate(rest):
            cut = text.find("\n", MIX_PIECE_CHARS) + 1 or len(text)
            out += text[:cut]
            rest[i] = text[cut:]
    return out


def unpack(pin, files, result):
    """Rule "texts": files are the handbook's .deb, a wheel of Python code and one of conversations."""
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f"{result.name}.part", dir=result.parent))
    try:
        subprocess.run(["dpkg-deb", "-x", str(files[0]), str(scratch / "deb")], check=True)
        sources = {"code": code_files(files[1])}
        languages = {lang: handbook_pages(scratch / "deb", folder)
                     for lang, folder in pin["languages"].items()}
        long_names = {name for name, text in languages["en"] if len(text) >= PAGE_CHARS_MIN}
        for lang, pages in languages.items():
            sources[lang] = [page for page in pages if page[0] in long_names]
        shutil.rmtree(scratch / "deb")
        halves = {name: split(pages) for name, pages in sorted(sources.items())}
        for half in ("calib", "eval"):
            (scratch / half).mkdir()
            for name, parts in halves.items():
                (scratch / half / f"{name}.txt").write_text(parts[half], encoding="utf-8")
        (scratch / "eval" / "chat.txt").write_text(chats(files[2]), encoding="utf-8")
        mixed = mix([parts["calib"] for parts in halves.values()])
        found = hashlib.sha256(mixed.encode()).hexdigest()
        if found != pin["mix_sha256"]:
            raise SystemExit(f"texts: sha256 of mix.txt is {found}, not as pinned")
        (scratch / "calib" / "mix.txt").write_text(mixed, encoding="utf-8")
        scratch.chmod(0o755)
        shutil.rmtree(result, ignore_errors=True)
        scratch.rename(result)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
