"""Documents: samples run, links lead somewhere, and the README's generated parts are up to date."""

import re
import shlex
import sys

import pytest

import dovetail
import generated
from dovetail.chains.registry import _REGISTERED as REGISTRY
from dovetail.chains.registry import links
from dovetail.cli.main import main
from places import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page) -> list[tuple[str, str, str]]:
    """Return language, title and text of a page's blocks of code that a test can run."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [(language, title, text) for skipped, language, title, text in found if not skipped]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a shell line of a page in this process, and return its standard output."""

    def call(line: str) -> str:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        monkeypatch.setattr("dovetail.cli.main.quiet", lambda: None)  # it changes this process for good
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        assert not done.value.code, f"{line}\n{err}"
        return out

    return call


MESSAGES = ROOT / "docs/troubleshooting.md"
SAMPLES = ROOT / "docs/add_a_method.md"  # its blocks are files of their own, tested above
RUN = [
    page
    for page in PAGES
    if page not in (MESSAGES, SAMPLES) and {"python", "bash"} & {block[0] for block in blocks(page)}
]


SHORTER = {r"max_steps=\d+": "max_steps=1", r"epochs: \d+|max_steps: \d+": "max_steps: 1", r"limit=\d+": "limit=8",
           r"limit: \{train: \d+, test: \d+\}": "limit: {train: 8, test: 8}", r"batch_size: \d+": "batch_size: 8",
           r'(\.jsonl"), \d+': r"\1, 8"}  # fmt: skip
"""What a page trains, scores and writes, and how much of it is enough to see that its blocks run."""


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, command):
    """Python blocks share their names; a YAML block with a title is written to that file; bash lines are commands."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    before = dict(links())
    try:
        for language, title, text in blocks(page):
            for long, short in SHORTER.items():
                text = re.sub(long, short, text)
            if language == "python":
                exec(compile(text, f"{page.name}", "exec"), names)
            elif language == "yaml" and title:
                (tmp_path / title).write_text(text, encoding="utf-8")
            elif language == "bash":
                for line in text.replace("\\\n", " ").splitlines():
                    assert command(line)
    finally:
        REGISTRY.clear()
        REGISTRY.update(before)


def test_the_readmes_example_is_short():
    (code,) = [text for language, _, text in blocks(ROOT / "README.md") if language == "python"]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12


def test_the_readmes_tree_and_table_are_up_to_date():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert generated.tree() in text
    assert generated.written(text) == text, "python tests/generated.py writes them"


def test_the_messages_of_troubleshooting_are_those_that_are_raised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = MESSAGES.read_text(encoding="utf-8")
    assert generated.with_messages(text) == text, "python tests/generated.py writes them"


def test_the_reference_has_every_public_name():
    documented = set()
    for page in (ROOT / "docs/reference").glob("*.md"):
        documented |= set(re.findall(r"^::: dovetail\.(\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE))
    public = {*dovetail.__all__} - {"experts"} | {f"experts.{name}" for name in dovetail.experts.__all__}
    assert documented == public | {*generated.extension_names()}, "python tests/generated.py writes the extension API"


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY"))])
def test_links_lead_to_files_and_headings(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


CONTRACTION = re.compile(
    r"\b\w+n['’]t\b|\b(?:it|that|there|what|here|let|he|she|who)['’]s\b|\b(?:we|you|they|i)['’](?:ll|re|ve|d|m)\b", re.I
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_contractions(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert not CONTRACTION.findall(prose)
