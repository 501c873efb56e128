"""A report says what its lines say, shows them to anyone, and trusts none of them."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checked import ReportError
from benchmarks.measure import Job
from benchmarks.plots import Bar, Mark, highest, ranges_plot, scatter_plot, short
from benchmarks.records import read_budget, read_kernels, read_losses, read_runs
from benchmarks.report import main
from benchmarks.run import measure_bundle
from device_harness.profiles import find_profile
from tests.conftest import ROOT
from tests.runs import budget_line, changed, paired_lines, run_line, write_lines

RESULTS = ROOT / "benchmarks" / "results"
EVIL = "<script>alert(1)</script>\"'`|&amp;\u202e\n# x"


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    stats = {"rounds": 3, "median": 0.02, "q1": 0.019, "q3": 0.03}
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"benchmarks": [{"name": "test_pack[4]", "stats": stats}]}))
    return path


@pytest.fixture
def full(tmp_path: Path, kernels: Path) -> list[str]:
    """Arguments of a report that has everything."""
    base, new = paired_lines(8)
    write_lines(tmp_path / "base.jsonl", base)
    write_lines(tmp_path / "curve.jsonl", [budget_line(tiles) for tiles in (17, 1, 5, 10)])
    runs = [str(write_lines(tmp_path / "runs.jsonl", new))]
    options = ["--baseline", str(tmp_path / "base.jsonl"), "--budget", str(tmp_path / "curve.jsonl")]
    options += ["--quality", str(RESULTS / "quality_recipes.json"), "--kernels", str(kernels)]
    return [*runs, *options, "--out", str(tmp_path / "out")]


def made(tmp_path: Path, lines: list[Any], *options: str) -> tuple[str, str, dict[str, Any]]:
    """The page, the Markdown and the JSON of a report on lines."""
    out = tmp_path / "out"
    assert main([str(write_lines(tmp_path / "runs.jsonl", lines)), *options, "--out", str(out)]) == 0
    figures = json.loads((out / "report.json").read_text())
    return (out / "report.html").read_text(), (out / "report.md").read_text(), figures


class Page(HTMLParser):
    """Every tag with its attributes, and whether tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_report_has_every_phase_of_every_run_and_the_limits(tmp_path: Path) -> None:
    lines = [run_line(seed, samples=5) for seed in range(3)]
    lines.append(run_line(9, bundle__recipe="int8"))
    page, text, figures = made(tmp_path, lines)
    first, second = figures["groups"]
    assert (first["runs"], second["runs"]) == (3, 1)
    samples = sorted(s for line in lines[:3] for s in line["phases"]["decode"]["samples_ms"])
    decode = next(phase for phase in first["phases"] if phase["name"] == "decode")
    assert decode["samples"] == 15
    assert decode["median_ms"] == samples[7]
    assert (decode["low_ms"], decode["high_ms"]) == (samples[1], samples[-2])
    assert first["peak_rss_mib"] == 85.0
    assert [limit["name"] for limit in first["limits_met"]] == ["load_ms", "first_token_ms", "token_ms", "memory_mib"]
    assert "tiny int4 on profile x86-laptop: within all limits" in page
    assert f"| decode | 15 | {samples[7]:.2f} |" in text
    for said in ("simulated on this machine", "NOT enforced", "A processor", "Python 3.11.1"):
        assert said in page
        assert said in text


def test_runs_over_a_limit_are_counted(tmp_path: Path) -> None:
    late = run_line(0, over=["token_ms: 2.0, at most 1"], profile__limits__token_ms=0.31, noise=0.2)
    page, text, figures = made(tmp_path, [late, changed(run_line(1), {"profile": late["profile"]})])
    limit = next(limit for limit in figures["groups"][0]["limits_met"] if limit["name"] == "token_ms")
    medians = [sorted(line["phases"]["decode"]["samples_ms"])[2] for line in (late, run_line(1))]
    assert limit["runs_over"] == sum(m > 0.31 for m in medians)
    assert limit["worst"] == max(medians)
    assert f"no: {limit['runs_over']} of 2 runs over" in page
    assert "over token\\_ms" in text


def test_the_same_lines_give_the_same_bytes(full: list[str], tmp_path: Path) -> None:
    assert main(full) == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert main(full) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    assert set(first) == {"report.html", "report.md", "report.json"}


def test_the_page_stands_alone_and_says_what_each_plot_shows(full: list[str], tmp_path: Path) -> None:
    assert main(full) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not [a for _, attrs in page.tags for a in attrs if a in ("src", "href", "style") or a.startswith("on")]
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    names = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(names) == len(set(names))
    plots = [attrs["aria-labelledby"] for tag, attrs in page.tags if tag == "svg"]
    assert len(plots) == 7  # comparison, latency, memory, three of the curve, losses
    for labels in plots:
        assert labels is not None
        assert set(labels.split()) <= set(names)
    for label in ("ms, logarithmic", "resident memory, MiB", "tiles, at most", "bundle, MB", "mean KL, nats a token"):
        assert f">{label}</text>" in text


def test_a_text_from_a_file_is_never_markup(tmp_path: Path) -> None:
    hostile = {
        "commit": EVIL,
        "measured": EVIL,
        "over": [EVIL],
        "bundle__model": EVIL,
        "bundle__recipe": EVIL,
        "profile__name": EVIL,
        "execution": EVIL,
        "environment__processor": EVIL,
        "environment__instruction_set": [EVIL],
        "bundle__payload_digest": EVIL,
        "phase_starts": [[0.1, EVIL]],
        "memory_over_time": [[0.0, 1.0], [0.1, 1e15]],
    }
    curve = write_lines(tmp_path / "curve.jsonl", [budget_line(1, bundle__model=EVIL, accuracy__data=EVIL)])
    page, text, _ = made(tmp_path, [changed(run_line(), hostile)], "--budget", str(curve))
    assert "<script" not in page
    assert html.escape("<script>alert(1)</script>") in page
    assert Page(page).open == []
    assert "\u202e" not in page + text
    assert "<script" not in text.replace("\\<", "")
    assert not re.search(r"^# x", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema is 2, want 1"),
        ({"commit": 7}, "commit is 7, want a text"),
        ({"simulated": "yes"}, "simulated is 'yes', want true or false"),
        ({"phases": {}}, "phases is {}, want a phase or more"),
        ({"phases__decode__samples_ms": []}, r"phases\.decode\.samples_ms is \[\], want a list of 1 to"),
        ({"phases__decode__samples_ms": [1, -1]}, r"phases\.decode\.samples_ms\[1\] is -1, want a number of 0 to"),
        ({"phases__decode__samples_ms": [0]}, r"samples_ms\[0\] is 0, want a number above 0"),
        ({"phases__decode__samples_ms": [1e300]}, "want a number of 0 to 1,000,000,000,000,000"),
        ({"phases__decode__samples_ms": [True]}, "is True, want a number"),
        ({"phases__decode__cpu_s": None}, r"phases\.decode\.cpu_s is None, want a number"),
        ({"phases__<b>": {"samples_ms": [1.0], "cpu_s": 0, "peak_rss_mib": None}}, "a phase under a name of"),
        ({"memory_over_time": [[1]]}, r"memory_over_time\[0\] is \[1\], want a list of 2 to 2 items"),
        ({"job": []}, r"job is \[\], want an object"),
        ({"job__threads": 1.5}, r"job\.threads is 1\.5, want a whole number"),
        ({"environment__cores": 0}, r"environment\.cores is 0, want a whole number of 1"),
    ],
)
def test_a_line_that_is_not_of_the_schema_is_refused_by_file_line_and_field(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "runs.jsonl", [run_line(), run_line(**changes)])
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert re.search(rf"runs\.jsonl: line 2: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no line"),
        ("{}\n{", "line 1: schema is missing"),
        ("nonsense", "line 1: is not JSON"),
        ("[1]", r"line 1: is \[1\], want an object"),
        ('{"schema": NaN}', "line 1: is not JSON: NaN is no number"),
        ("[" * 100_000, "line 1: is not JSON"),
        ('{"schema": ' + "9" * 5000 + "}", "line 1: is not JSON"),
    ],
)
def test_a_file_that_holds_no_runs_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(text)
    with pytest.raises(ReportError, match=message):
        read_runs(path)
    with pytest.raises(ReportError, match="cannot be read: No such file"):
        read_runs(tmp_path / "none.jsonl")


def test_every_missing_field_is_named(tmp_path: Path) -> None:
    line = run_line()
    unused = {"warmup", "repeats", "allow_pending", "bundle"}
    names = [(name,) for name in line] + [("job", name) for name in line["job"] if name not in unused]
    names += [("environment", name) for name in line["environment"] if name != "cores"]
    for way in names:
        broken = changed(line, {})
        at = broken
        for step in way[:-1]:
            at = at[step]
        del at[way[-1]]
        with pytest.raises(ReportError, match=re.escape(f"line 1: {'.'.join(way)} is missing")):
            read_runs(write_lines(tmp_path / "runs.jsonl", [broken]))


def test_a_real_run_is_reported(tiny_bundle: Path, tmp_path: Path) -> None:
    job = Job(str(tiny_bundle), tiles=1, prefill_tokens=8, decode_at=4, decode_tokens=2, threads=1, repeats=1)
    records = measure_bundle(tiny_bundle, find_profile("x86-laptop"), job, 1)
    page, _, figures = made(tmp_path, records)
    (group,) = figures["groups"]
    assert group["limits"] == {"load_ms": 3000, "first_token_ms": 20000, "token_ms": 100}
    assert {p["name"]: p["median_ms"] for p in group["phases"]} == records[0]["medians_ms"]
    assert str(tiny_bundle) not in page


def test_the_curve_is_ordered_and_one_without_accuracy_has_no_plot_of_it(tmp_path: Path) -> None:
    lines = [budget_line(tiles, accuracy=None) for tiles in (10, 1)]
    path = write_lines(tmp_path / "curve.jsonl", lines)
    page, text, _ = made(tmp_path, [run_line()], "--budget", str(path))
    assert text.index("| 1 | 16 |") < text.index("| 10 | 160 |")
    assert "Accuracy by tiles" not in page
    write_lines(path, [budget_line(1, accuracy__mean=1.5)])
    with pytest.raises(ReportError, match=r"line 1: accuracy\.mean is 1\.5, want a number of 0 to 1"):
        read_budget(path)


def test_sizes_and_losses_are_joined_by_digest() -> None:
    losses = {
        loss.recipe: loss for loss in read_losses(RESULTS / "quality_recipes.json", RESULTS / "recipe_loss.jsonl")
    }
    sizes = [json.loads(line) for line in (RESULTS / "recipe_loss.jsonl").read_text().splitlines()]
    (size,) = {line["payload_bytes"] for line in sizes if (line["model"], line["recipe"]) == ("checkpoint", "int4")}
    assert losses["int4"].size_bytes == size
    assert losses["int4"].interval_95[0] < losses["int4"].kl < losses["int4"].interval_95[1]
    assert losses["vision-u8-static"].size_bytes is None
    assert read_losses(RESULTS / "quality_recipes.json", None)[0].size_bytes is None
    with pytest.raises(ReportError, match=r"recipe_loss\.jsonl: is not JSON"):
        read_losses(RESULTS / "recipe_loss.jsonl", None)


def test_kernels_of_another_form_are_refused(kernels: Path) -> None:
    assert read_kernels(kernels)[0].name == "pack[4]"
    kernels.write_text('{"benchmarks": [{"name": "x", "stats": {"rounds": 0}}]}')
    with pytest.raises(ReportError, match=r"kernels\.json: benchmarks\[0\]\.stats\.rounds is 0, want a whole number"):
        read_kernels(kernels)


def test_a_report_that_cannot_be_written_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    path = write_lines(tmp_path / "runs.jsonl", [run_line()])
    assert main([str(path), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.3141, "0.314"), (19.04, "19"), (1234.5, "1,234"), (5e-4, "5e-4"), (2.5e8, "2.5e8"), (100, "100")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_thinning_a_line_keeps_its_peak() -> None:
    points = [(i / 50, 1000.0 if i == 7777 else 5.0) for i in range(30_000)]
    thin = highest(points)
    assert len(thin) <= 400
    assert max(thin, key=lambda point: point[1]) == points[7777]


@pytest.mark.parametrize("values", [(1e-9, 1e12), (5.0, 5.0), (0.99, 1.01)])
def test_axes_have_ticks_for_any_range(values: tuple[float, float]) -> None:
    svg = ranges_plot("x", "t", [Bar("a", values, *sorted((*values, values[0])))], "ms")
    assert svg.count('class="grid"') >= 2
    marks = [Mark("m", value, value, value, value) for value in values]
    assert "nan" not in svg + scatter_plot("y", "t", marks, ("MB", "KL"))


FRAME = """<!doctype html><meta charset="utf-8"><title>waiting</title>
<iframe id="page" style="width:{width}px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>
window.onload = () => {{
  const page = document.getElementById("page").contentDocument, found = [];
  const wide = page.documentElement.scrollWidth;
  if (wide > {width}) found.push("the page is " + wide + " wide");
  for (const svg of page.querySelectorAll("svg")) {{
    const box = svg.getBoundingClientRect(), taken = [];
    if (box.width > {width}) found.push("a plot is " + box.width + " wide");
    for (const text of svg.querySelectorAll("text")) {{
      const b = text.getBoundingClientRect();
      if (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1)
        found.push("cut off: " + text.textContent);
      for (const [c, other] of taken)
        if (b.left < c.right - 1 && c.left < b.right - 1 && b.top < c.bottom - 3 && c.top < b.bottom - 3)
          found.push(text.textContent + " over " + other);
      taken.push([b, text.textContent]);
    }}
  }}
  document.title = found.length ? found.join("; ") : "fine, " + page.querySelectorAll("svg").length + " plots";
}};
</script>"""


@pytest.mark.client
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_scrolling_sideways_or_text_over_text(
    width: int, full: list[str], tmp_path: Path
) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    assert main(full) == 0
    frame = tmp_path / "frame.html"
    page = (tmp_path / "out" / "report.html").read_text()
    frame.write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--dump-dom"]
    done = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    assert re.findall("<title>(.*?)</title>", done.stdout)[0] == "fine, 7 plots"
