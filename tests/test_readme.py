"""README and the reference: every command is run (```bash), or parsed where it needs data that we
lack (```sh); links lead somewhere.
"""

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest
from helpers import REPOSITORY
from test_wrappers import METHODS, WRAPPERS, check_calls, checkout, recorded

import data_utils
from slipstream.tools.npz import open_npz

__all__ = ["checkout"]
IN_PROCESS = ("bench.days", "bench.quality", "bench.figures", "bench.report")
OPTIONAL = ("--save-onnx", "--tensor-board-filename", "bench.serve_onnx")
HAS_OPTIONAL = all(
    map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime", "tensorboard"))
)
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
SMALLER = (" 20000", " 7000")  # rows: a reader's show more, what runs is the same
# What the wrappers make, which other commands of the text go on with.
OF_WRAPPERS = ("./run_", "runs/mine/", "input/synthetic/")


def blocks(language, pages=PAGES):
    """The text of all code blocks of a language, in order."""
    texts = [path.read_text(encoding="utf-8") for path in pages]
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [block for text in texts for block in pattern.findall(text)]


def commands(language):
    """Each command once, where it stands first."""
    lines = [line for block in blocks(language) for line in block.splitlines() if line]
    return list(dict.fromkeys(lines))


def environment_and_words(command):
    """The variables that a command line sets, and what it runs."""
    words, environment = shlex.split(command), {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    return environment, words


def module_of(script):
    return script.removesuffix(".py").replace("/", ".")


@pytest.mark.parametrize("by_wrappers", [True, False])
def test_commands_run(checkout, tmp_path, monkeypatch, by_wrappers):
    """In the order of the text, on small synthetic logs; those of wrappers in one copy of the tree,
    those of Python scripts in another.

    The scripts that a wrapper starts run here one by one: `test_wrappers` runs it whole.
    """
    monkeypatch.chdir(checkout)
    small = {"SYNTHETIC_ROWS": "6000", "HOT_EMB_GPU_MEM": "200000", "OMP_NUM_THREADS": "1"}
    for block in blocks("python"):
        assert block.count("\n") <= 30
        path = checkout / block.partition("\n")[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
    is_of_wrappers = {line: any(word in line for word in OF_WRAPPERS) for line in commands("bash")}
    ran = [line for line, is_theirs in is_of_wrappers.items() if is_theirs == by_wrappers]
    assert len(ran) >= 7
    for command in ran:
        environment, words = environment_and_words(command.replace(*SMALLER))
        if words == ["./run_tests.sh"]:  # this test is part of it
            continue
        if not HAS_OPTIONAL and any(word in command for word in OPTIONAL):
            continue
        if words[:2] == ["python", "-m"] and words[2] not in IN_PROCESS:
            done = subprocess.run(
                [sys.executable, *words[1:]],
                env={**os.environ, **small, **environment},
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, (command, done.stderr)
            continue
        calls = [words[1:] if words[1:2] != ["-m"] else words[2:]]
        if words[0] != "python":
            (tmp_path / "log").unlink(missing_ok=True)
            calls = recorded(checkout, tmp_path, *words, **small, **environment)
        for script, *flags in calls:
            if script.startswith("input/own/"):
                runpy.run_path(script)
                continue
            try:
                importlib.import_module(module_of(script)).main(flags)
            except SystemExit as end:  # of a launcher of ranks, as theirs
                assert end.code == 0, command


@pytest.mark.parametrize("command", commands("sh"))
def test_commands_that_need_data_parse(command, checkout, tmp_path, monkeypatch):
    environment, words = environment_and_words(command)
    if words[0] == "torchrun":
        script = next(at for at, word in enumerate(words) if word.endswith(".py"))
        words = ["python", *words[script:]]
    if words[0] == "bench/paper_figures.sh":
        words = ["python", "-m", "bench.paper_figures", *words[1:]]
    if words[:2] == ["python", "-m"]:
        monkeypatch.chdir(checkout)
        for word in words[3:]:  # data must be there, though nothing reads them
            if word.startswith("input/"):
                (checkout / word).parent.mkdir(parents=True, exist_ok=True)
                (checkout / word).touch()
        importlib.import_module(words[2]).parse_args(words[3:])
        return
    if words[0] == "python":
        check_calls([words[1:]], [module_of(words[1])])
        return
    script = words[0].removeprefix("./")
    if len(words) == 1 and script not in WRAPPERS:  # a recipe that preprocesses a log in its place
        (checkout / "input/kaggle").mkdir(parents=True)
        (checkout / "input/kaggle/train.txt").touch()
    calls = recorded(checkout, tmp_path, script, *words[1:], **environment)
    if script not in WRAPPERS:  # a recipe: the method is its first word
        check_calls(calls, WRAPPERS[METHODS[words[1]]] if words[1:] else ["data_utils"])
        return
    check_calls(calls, WRAPPERS[script])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_the_text_names_exist(page):
    named = r"`((?:bench/|docs/|slipstream/|tests/|run_)[\w/]+\.\w+)`"
    for name in set(re.findall(named, page.read_text(encoding="utf-8"))):
        assert (REPOSITORY / name).exists(), name


def text_without_code(page):
    """A page's text, code blocks left out."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """The names by which a link finds a page's sections, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text_without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page",
    [*PAGES, REPOSITORY / "bench/README.md"],
    ids=lambda page: str(page.relative_to(REPOSITORY)),
)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", text_without_code(page))
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_is_an_entrance():
    """It stays short, leads to every page of the reference, and has the original's sections."""
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 220
    for page in PAGES[1:]:
        assert f"](docs/{page.name})" in text, page.name
    originals = ("dataset-pre-processing", "running-dlrm-baseline", "running-fae-baseline")
    more = ("input-segregation---hotcold", "running-slipstream", "requirements", "license")
    assert {*originals, *more} <= anchors(README)


def test_the_example_of_a_column_file(tmp_path):
    """It is read as the text says: two dense columns, three tables, three days."""
    for language, name in (("csv", "shop.csv"), ("json", "shop.json")):
        (block,) = blocks(language, [README])
        (tmp_path / name).write_text(block)
    data_utils.preprocess("custom", tmp_path / "shop.csv", columns=tmp_path / "shop.json")
    arrays = open_npz(tmp_path / "shop_processed.npz")
    dense = [[3, 12.5], [0, 8], [4, 8], [1, 3.9], [1, 12.5], [2, 12.5], [5, 3.9], [2, 3.9]]
    np.testing.assert_array_equal(arrays["X_int"], np.array(dense, np.float32))
    assert arrays["counts"].tolist() == [3, 3, 3] and arrays["days"].tolist() == [0, 2, 4, 8]
    assert arrays["y"].tolist() == [1, 0, 0, 1, 1, 0, 0, 1]
