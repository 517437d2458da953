# SPDX-License-Identifier: Apache-2.0
"""Checks of the tree that no compiler makes: who may include what, names, sizes, exports.

Every rule is a function from a tree to a list of complaints, so that the last tests can show
on planted violations that each rule is able to fail.
"""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# What a module of src/ may include besides itself and turboquant/.
MAY_INCLUDE = {
    "base": set(),
    "format": {"base"},
    "kernels": {"base", "format"},
    "codec": {"base", "format", "kernels"},
    "calib": {"base", "format", "kernels", "codec"},
    "cache": {"base", "format", "kernels", "codec"},
    "attn": {"base", "format", "kernels"},
    "cuda": {"base", "format", "kernels", "codec"},
    "api": {"base", "format", "kernels", "codec", "calib", "cache", "attn", "cuda"},
}
USERS = ("tools", "bench", "integrations")  # these see include/turboquant/ and nothing of src/

SOURCE_ENDINGS = (".c", ".h", ".cu", ".cuh", ".cpp")
SPDX_ENDINGS = SOURCE_ENDINGS + (".py", ".sh", ".cmake")
TEXT_ENDINGS = SPDX_ENDINGS + (".md", ".json", ".txt", ".in", ".ini", ".toml", ".yml")
REPEATED_NAMES = {"README.md", "CMakeLists.txt", "__init__.py", "conftest.py", "pyproject.toml", "setup.py"}
DATA_FOLDERS = ("tests/fuzz/corpus/", "tests/golden/")
LINES_MAX = 800
FUNCTION_LINES_MAX = 70

# Put together from halves so that this file does not complain about itself.
MACHINE_WORDS = [
    r"(?<![\w.])/" + r"(?:work|root|tmp/dl|home/\w+)/",
    r"\bshared" + r"/",
    r"\bpypi" + r"\.org\b",
    r"\bpythonhosted" + r"\.org\b",
    r"\bdeb\.debian" + r"\.org\b",
]
NEEDED_LIBRARIES = re.compile(r"lib(c|m|pthread)\.so\.\d+|ld-linux.*")


def tree_files(root):
    """Paths, relative, of what is in the repository or about to be."""
    got = subprocess.run(["git", "-C", root, "ls-files", "-co", "--exclude-standard"],
                         capture_output=True, text=True, check=False)
    if got.returncode == 0:
        names = got.stdout.splitlines()
    else:
        names = [str(path.relative_to(root)) for path in root.rglob("*")]
        names = [name for name in names if not re.match(r"build/|(.*/)?__pycache__/", name)]
    return sorted(name for name in names if (root / name).is_file())


def read(root, name):
    return (root / name).read_text(encoding="utf-8")


def quoted_includes(text):
    return re.findall(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', text, re.MULTILINE)


def include_complaints(root):
    complaints = []
    for name in tree_files(root):
        parts = name.split("/")
        if not name.endswith(SOURCE_ENDINGS) or parts[0] not in ("src", "include") + USERS:
            continue
        if parts[0] == "integrations" and "test" in parts:
            continue  # tests may include anything
        for included in quoted_includes(read(root, name)):
            if not may_include(root, name, included):
                complaints.append(f"{name} includes {included}")
    return complaints


def may_include(root, name, included):
    if ".." in included.split("/"):
        return False
    parts = name.split("/")
    top = included.split("/")[0]
    if top == "turboquant" and "/" in included:
        return parts[0] != "include"  # public headers name each other without a folder
    beside = (root / name).parent / included
    if beside.is_file() or parts[0] == "include":
        return beside.is_file()
    if parts[0] != "src":
        return (root / parts[0] / parts[1] / included).is_file()
    module = parts[1]
    return "/" in included and (top == module or top in MAY_INCLUDE[module])


def module_complaints(root):
    return [f"{name}: no such module in the table" for name in tree_files(root)
            if name.startswith("src/") and name.count("/") >= 2 and name.split("/")[1] not in MAY_INCLUDE]


def name_complaints(root):
    complaints, seen = [], {}
    for name in tree_files(root):
        short = name.rsplit("/", 1)[-1]
        if short in REPEATED_NAMES or name.startswith(DATA_FOLDERS):
            continue
        if short in seen:
            complaints.append(f"{name} has the file name of {seen[short]}")
        seen.setdefault(short, name)
    return complaints


def needs_spdx(name):
    short = name.rsplit("/", 1)[-1]
    return name.endswith(SPDX_ENDINGS) or short in ("CMakeLists.txt", "Makefile") or name == ".ci/run"


def spdx_complaints(root):
    complaints = []
    for name in tree_files(root):
        if not needs_spdx(name):
            continue
        lines = read(root, name).splitlines()
        if lines and (lines[0].startswith("#!") or "generated" in lines[0].lower()):
            lines = lines[1:]
        if not lines or "SPDX-License-Identifier: Apache-2.0" not in lines[0]:
            complaints.append(f"{name} does not open with its SPDX line")
    return complaints


def is_exempt_from_sizes(name):
    return name.startswith("src/kernels/") or "table" in name.rsplit("/", 1)[-1]


def size_complaints(root):
    complaints = []
    for name in tree_files(root):
        if not name.endswith(SPDX_ENDINGS) or is_exempt_from_sizes(name):
            continue
        lines = read(root, name).splitlines()
        if len(lines) > LINES_MAX:
            complaints.append(f"{name} has {len(lines)} lines")
        if name.endswith(SOURCE_ENDINGS):
            complaints += [f"{name}:{first}: function of {n} lines" for first, n in long_functions(lines)]
    return complaints


def long_functions(lines):
    """(first line, lines) of functions that are too long. Their braces stand in column 0."""
    found, first = [], None
    for number, line in enumerate(lines, 1):
        if line == "{":
            first = number
        elif line == "}" and first is not None:
            if number - first + 1 > FUNCTION_LINES_MAX:
                found.append((first, number - first + 1))
            first = None
    return found


def word_complaints(root):
    complaints = []
    for name in tree_files(root):
        if not name.endswith(TEXT_ENDINGS) and not needs_spdx(name):
            continue
        for number, line in enumerate(read(root, name).splitlines(), 1):
            for pattern in MACHINE_WORDS:
                if re.search(pattern, line):
                    complaints.append(f"{name}:{number}: names one machine or host: {line.strip()[:80]}")
    return complaints


def language_complaints(root):
    """C++ only in *.cu, *.cuh and integrations/."""
    return [f"{name}: C++ outside integrations/" for name in tree_files(root)
            if name.endswith((".cpp", ".cc", ".hpp")) and not name.startswith("integrations/")]


def header_complaints(root):
    """Public headers compile alone, as C99 and as C++11, without a warning."""
    complaints = []
    flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    for header in sorted((root / "include" / "turboquant").glob("*.h")):
        for command in (["gcc", "-std=c99", "-x", "c"], ["g++", "-std=c++11", "-x", "c++"]):
            # Through a second file: compiling a header itself warns about "#pragma once" alone.
            got = subprocess.run(command + flags + ["-I", root / "include", "-"], check=False,
                                 input=f'#include "turboquant/{header.name}"\n', text=True,
                                 capture_output=True)
            if got.returncode != 0:
                complaints.append(f"{header.name} as {command[1][5:]}: {got.stderr[:300]}")
    return complaints


RULES = [include_complaints, module_complaints, name_complaints, spdx_complaints, size_complaints,
         word_complaints, language_complaints, header_complaints]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_tree(rule):
    complaints = rule(ROOT)
    assert not complaints, "\n" + "\n".join(complaints)


def exported_symbols(library):
    got = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True,
                         check=True)
    return [line.split()[-1].split("@")[0] for line in got.stdout.splitlines()]


def built(name):
    """A file of the build under test, named by TQKV_BUILD_DIR."""
    folder = os.environ.get("TQKV_BUILD_DIR")
    if not folder or not (ROOT / folder / name).exists():
        pytest.skip(f"no {name}; make test builds it")
    return ROOT / folder / name


def is_sanitized():
    return "TQKV_SANITIZE:STRING=\n" not in built("CMakeCache.txt").read_text()


def needed_libraries(library):
    got = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    return re.findall(r"\(NEEDED\).*\[(.*)\]", got.stdout)


def test_library_exports_only_its_prefix():
    symbols = exported_symbols(built("lib/libturboquant.so"))
    assert symbols
    assert [symbol for symbol in symbols if not symbol.startswith("tqkv_")] == []


def test_library_exports_what_headers_declare():
    declared = set()
    for header in (ROOT / "include" / "turboquant").glob("*.h"):
        if header.name == "cuda.h":
            continue  # libturboquant-cuda has these
        text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
        for statement in re.findall(r"^TQKV_API\b[^;{]*;", text, re.MULTILINE):
            declared.add(re.search(r"\b(tqkv_\w+)\(", statement).group(1))
    exported = set(exported_symbols(built("lib/libturboquant.so")))
    assert sorted(declared - exported) == [], "declared and not there"
    assert sorted(exported - declared) == [], "there and not declared"


def test_cuda_library_exports_only_its_prefix():
    symbols = exported_symbols(built("lib/libturboquant-cuda.so"))
    assert "tqkv_cuda_decode" in symbols and "tqkv_plan_read" in symbols
    assert [symbol for symbol in symbols if not symbol.startswith("tqkv_")] == []


def test_library_needs_libc_only():
    library = built("lib/libturboquant.so")
    if is_sanitized():
        pytest.skip("sanitizers bring libraries of their own")
    assert [name for name in needed_libraries(library) if not NEEDED_LIBRARIES.fullmatch(name)] == []


def test_library_takes_no_lock_and_starts_no_thread():
    library = built("lib/libturboquant.so")
    if is_sanitized():
        pytest.skip("sanitizers bring locks of their own")
    got = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    assert [name for name in got.stdout.split() if re.match("pthread_|sem_|mtx_|thrd_|call_once", name)] == []


def test_plugin_exports_and_needs_nothing_else():
    plugin = built("lib/libggml-turboquant.so")
    if is_sanitized():
        pytest.skip("sanitizers bring libraries of their own")
    symbols = exported_symbols(plugin)
    assert "ggml_backend_init" in symbols
    assert [name for name in symbols if not name.startswith("ggml_backend_")] == []
    allowed = re.compile(NEEDED_LIBRARIES.pattern + r"|libdl\.so\.\d+")
    assert [name for name in needed_libraries(plugin) if not allowed.fullmatch(name)] == []


SPDX_C = "/* SPDX-License-Identifier: Apache-2.0 */\n"
PLANTED = {
    include_complaints: [
        ("src/base/low.c", SPDX_C + '#include "codec/high.h"\n'),
        ("src/codec/up.c", SPDX_C + '#include "../base/alloc.h"\n'),
        ("src/attn/attn.c", SPDX_C + '#  include "cache/cache.h"\n'),
        ("tools/tqkv/main.c", SPDX_C + '#include "base/alloc.h"\n'),
        ("include/turboquant/pub.h", SPDX_C + '#include "base/alloc.h"\n'),
    ],
    module_complaints: [("src/util/misc.c", SPDX_C)],
    name_complaints: [("src/base/same.c", SPDX_C), ("src/codec/same.c", SPDX_C)],
    spdx_complaints: [("src/base/bare.c", "int x;\n")],
    size_complaints: [
        ("src/base/long.c", SPDX_C + "int x;\n" * LINES_MAX),
        ("src/base/function.c", SPDX_C + "{\n" + "    x++;\n" * FUNCTION_LINES_MAX + "}\n"),
    ],
    word_complaints: [("docs/page.md", "See /wo" + "rk/x\n"), ("docs/other.md", "in share" + "d/y\n")],
    language_complaints: [("src/base/plus.cpp", SPDX_C)],
    header_complaints: [("include/turboquant/broken.h", SPDX_C + "size_t lonely(void);\n")],
}


def plant(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_can_fail(rule, tmp_path):
    shutil.rmtree(tmp_path / ".git", ignore_errors=True)
    plant(tmp_path, "src/base/fine.h", SPDX_C)
    plant(tmp_path, "src/base/fine.c", SPDX_C + '#include "fine.h"\n#include "base/fine.h"\n')
    plant(tmp_path, "src/codec/fine_codec.c", SPDX_C + '#include "base/fine.h"\n#include "turboquant/types.h"\n')
    assert rule(tmp_path) == []
    for name, text in PLANTED[rule]:
        plant(tmp_path, name, text)
    complaints = "\n".join(rule(tmp_path))
    for name, _ in PLANTED[rule][rule is name_complaints:]:  # of two same names the second is told
        assert name.rsplit("/", 1)[-1] in complaints, name
