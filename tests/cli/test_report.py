# SPDX-License-Identifier: Apache-2.0
"""tqkv report: the page is well-formed and whole, or there is none."""

import hashlib
import json
import shutil
import struct
import subprocess
import zlib
from xml.etree import ElementTree

import pytest

OK, FAILED, USAGE = 0, 1, 2
SVG = "{http://www.w3.org/2000/svg}"
HTML = "{http://www.w3.org/1999/xhtml}"
NASTY = "<script>alert('&amp;')</script> \"\u00e9\u4e2d\" \ufffe\u0001"


def make_row(cache, bits, kl, n_ubatch=512, texts=("en.txt", NASTY)):
    parts = [{"text": text, "kl_mean": kl, "kl_median": kl, "kl_p999": kl, "top1": 0.9, "tokens": 100}
             for text in texts]
    positions = [{"first": 200 + 100 * i, "last": 299 + 100 * i, "kl_mean": kl, "tokens": 100} for i in range(2)]
    return {"cache": cache, "n_ctx": 400, "n_ubatch": n_ubatch, "n_scored": 200, "kl_mean": kl, "kl_error": 0.001,
            "kl_median": kl, "kl_p999": kl, "top1": 0.9, "bits": bits, "ratio": bits and 16 / bits, "texts": parts,
            "positions": positions}


def make_eval():
    return {"model": "models/tiny.gguf", "base": "plugin f16", "scored": "second half of each piece",
            "results": [make_row("q4_0", 4.5, 0.045), make_row("ours 5x", 3.2, 0.006), make_row(NASTY, None, None),
                        make_row("ours-f16", 16, -1e-12), make_row("ours 5x", 3.2, 0.007, n_ubatch=16)]}


@pytest.fixture
def eval_file(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(make_eval()))
    return path


@pytest.fixture
def calibration_file(tmp_path):
    path = tmp_path / "calib.json"
    path.write_text(json.dumps({"k_kl": [0.2], "v_kl": [None]}))
    return path


def named_plan(plan, path, name):
    """The plan with another model's name of the same length; docs/FORMAT.md says what is hashed."""
    data = plan.read_bytes().replace("model \u00e9".encode(), name)
    digest = hashlib.sha256(data[:24] + data[56:]).digest()
    path.write_bytes(data[:24] + digest + data[56:])
    return path


def read_page(path):
    text = path.read_text(encoding="utf-8")
    page = ElementTree.fromstring(text)
    assert not any(mark in text for mark in ("<script", "src=", "href=", "url(", "@import"))
    assert "prefers-color-scheme: dark" in text
    return page


def cells(page):
    return [rect for rect in page.iter(SVG + "rect") if "cell" in rect.get("class", "").split()]


def titles(page):
    return [title.text for title in page.iter(HTML + "h3")]


def test_report_of_a_plan(tqkv, plan_file):
    done = tqkv("report", plan_file)
    assert done.returncode == OK and done.stdout == "" and done.stderr == ""
    page = read_page(plan_file.with_suffix(".html"))
    assert len(cells(page)) == 2 * 2 * 64 // 16
    assert "K head 1, channels 16-31: 8 bits" in cells(page)[5].find(SVG + "title").text
    assert titles(page) == ["Bit map", "Bits by layer", "Spectrum", "Memory against context"]
    assert all(caption.text.strip() for caption in page.iter(HTML + "figcaption"))


def test_report_of_layers_that_differ(tqkv, mixed_plan, tmp_path):
    done = tqkv("report", mixed_plan, "-o", tmp_path / "page.html")
    assert done.returncode == OK and done.stderr == ""
    told = [cell.find(SVG + "title").text for cell in cells(read_page(tmp_path / "page.html"))]
    assert len(told) == 2 * (2 + 1)
    assert told[-1] == "layer 2, V head 0, channels 0-15: 16 bits (f16)"


def test_report_with_measurements(tqkv, plan_file, eval_file, calibration_file, tmp_path):
    page_path = tmp_path / "page.html"
    done = tqkv("report", plan_file, "--eval", eval_file, "--eval", eval_file, "--calibration", calibration_file,
                "-o", page_path)
    assert done.returncode == OK and done.stderr == ""
    page = read_page(page_path)
    assert "Sensitivity" in titles(page)
    assert titles(page).count("By position") == 2 * 2  # files, settings
    rows = [[cell.text for cell in row] for row in page.iter(HTML + "tr")]
    assert rows[1] == ["q4_0", "4.50", "3.56x", "0.04500", "0.00100", "0.04500", "0.0450", "90.00 %"]
    assert rows[3][1] == "\u2013"  # not known
    labels = [text.text for text in page.iter(SVG + "text")]
    assert labels.count("q4_0") == 2 * 2  # by size and by position
    assert not list(tmp_path.glob("*.tmp"))


def test_report_escapes_names(tqkv, mixed_plan, eval_file, tmp_path):
    done = tqkv("report", named_plan(mixed_plan, tmp_path / "named.tqkv", b"<b>&\"'</"), "--eval", eval_file)
    assert done.returncode == OK, done.stderr
    page = read_page(tmp_path / "named.html")
    assert next(page.iter(HTML + "h1")).text == "<b>&\"'</"
    told = [text for element in page.iter() for text in [element.text or ""]]
    assert any(text.startswith("<script>alert('&amp;')</script> \"\u00e9\u4e2d\"") for text in told)


def test_report_on_stdout(tqkv, plan_file):
    done = tqkv("report", plan_file, "-o", "-")
    assert done.returncode == OK
    assert len(cells(ElementTree.fromstring(done.stdout))) == 16
    assert not plan_file.with_suffix(".html").exists()


@pytest.mark.parametrize("args", [[], ["a", "b"], ["--eval"], ["--no-such", "a"], ["a", "-o"]])
def test_wrong_usage(tqkv, args):
    done = tqkv("report", *args)
    assert done.returncode == USAGE
    assert done.stdout == "" and "tqkv report --help" in done.stderr


def without(key):
    data = make_eval()
    del data["results"][1][key]
    return data


def with_value(key, value):
    data = make_eval()
    data["results"][0][key] = value
    return data


@pytest.mark.parametrize("content, told", [
    ("", "line 1"), ("{", "line 1"), ("[]", "object"), ('{"a": 1, "a": 2}', "duplicate"), (b"\xff", "line 1"), ({}, "'model'"),
    ({"model": 3}, "'model'"), ({"model": "m", "base": "b", "scored": "s"}, "'results'"),
    ({**make_eval(), "results": [1]}, "'cache'"), ({**make_eval(), "results": {}}, "'results'"),
    *[(without(key), f"'{key}'") for key in make_row("x", 4, 0.1)],
    (with_value("kl_mean", "0.1"), "'kl_mean'"), (with_value("kl_mean", 1e300), "'kl_mean'"),
    (with_value("n_ctx", -1), "'n_ctx'"), (with_value("n_ctx", 1 << 40), "'n_ctx'"), (with_value("texts", [{}]), "'text'"),
    (with_value("positions", [{"first": 1}]), "'last'"), (with_value("texts", []), "'texts' is not the same"),
])
def test_report_refuses_bad_results(tqkv, plan_file, tmp_path, content, told):
    bad = tmp_path / "bad.json"
    bad.write_bytes(content if isinstance(content, bytes) else
                    (content if isinstance(content, str) else json.dumps(content)).encode())
    done = tqkv("report", plan_file, "--eval", bad)
    assert done.returncode == FAILED and done.stdout == ""
    assert "bad.json" in done.stderr and told in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "tiny.tqkv"]


@pytest.mark.parametrize("content, told", [
    ({"v_kl": [1]}, "'k_kl'"), ({"k_kl": [1]}, "'v_kl'"), ({"k_kl": [1, 2], "v_kl": [1]}, "'k_kl' has 2 layers"),
    ({"k_kl": [1], "v_kl": ["x"]}, "'v_kl'"),
])
def test_report_refuses_bad_calibrations(tqkv, plan_file, tmp_path, content, told):
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(content))
    done = tqkv("report", plan_file, "--calibration", bad)
    assert done.returncode == FAILED
    assert "bad.json" in done.stderr and told in done.stderr
    assert not plan_file.with_suffix(".html").exists()


def test_an_older_page_survives_an_error(tqkv, plan_file, tmp_path):
    page = plan_file.with_suffix(".html")
    page.write_text("older")
    done = tqkv("report", plan_file, "--eval", tmp_path / "none.json")
    assert done.returncode == FAILED and "none.json" in done.stderr
    assert page.read_text() == "older"
    assert tqkv("report", plan_file, "-o", tmp_path).returncode == FAILED
    assert tqkv("report", plan_file, "-o", tmp_path / "no" / "page.html").returncode == FAILED
    assert tqkv("report", tmp_path / "none.tqkv").returncode == FAILED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.html", "tiny.tqkv"]


def png_rows(path):
    """Filtered rows of pixels; equal rows of one colour differ in no byte."""
    data, packed, at = path.read_bytes(), b"", 8
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    while at < len(data):
        n, name = struct.unpack(">I4s", data[at:at + 8])
        packed += data[at + 8:at + 8 + n] if name == b"IDAT" else b""
        at += 12 + n
    pixels = zlib.decompress(packed)
    row_bytes = 1 + width * {2: 3, 6: 4}[kind] * depth // 8
    return [pixels[i * row_bytes:(i + 1) * row_bytes] for i in range(height)]


def test_a_browser_draws_the_page(tqkv, plan_file, eval_file, tmp_path):
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium")
    assert tqkv("report", plan_file, "--eval", eval_file, "-o", tmp_path / "page.html").returncode == OK
    subprocess.run([chromium, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}",
                    "--window-size=1200,1600", f"--screenshot={tmp_path / 'page.png'}",
                    (tmp_path / "page.html").as_uri()], check=True, timeout=120, capture_output=True)
    rows = png_rows(tmp_path / "page.png")
    assert len(rows) == 1600
    assert len(set(rows)) > 200
