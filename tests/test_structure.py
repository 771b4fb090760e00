"""The arrow of imports: scripts -> the package's chapters, down -> libraries, never back."""

import ast
import inspect
import os
import re
import subprocess
import sys

import pytest
from helpers import REPOSITORY

SCRIPTS = [
    "data_utils",
    "dlrm_data_pytorch",
    "dlrm_s_pytorch",
    "input_segregation",
    "fae_train",
    "slipstream_train",
    "predict",
]
MAINS = [name for name in SCRIPTS if name != "dlrm_data_pytorch"]


# The chapters in the order in which data flow: each imports from itself and those before it.
CHAPTERS = ["tools", "logs", "model", "training", "serving"]
OURS = {*SCRIPTS, "bench", "tests", "slipstream"}


def imported(path):
    """Full names of the modules that a file imports, also `from package import module`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def back_arrows(root):
    """Imports of ours that go the wrong way, below a checkout's root."""
    found = []
    for path in sorted([*root.glob("*.py"), *(root / "slipstream").rglob("*.py")]):
        place = path.relative_to(root).with_suffix("").parts
        for name in sorted(imported(path)):
            parts = name.split(".")
            if parts[0] not in OURS:
                continue
            if place[0] != "slipstream":
                is_good = parts[0] == "slipstream"
            elif len(place) < 3 or len(parts) < 2:
                is_good = len(place) >= 3  # the package's own __init__ imports nothing
            else:
                is_good = parts[0] == "slipstream" and (
                    CHAPTERS.index(parts[1]) <= CHAPTERS.index(place[1])
                )
            if not is_good:
                found.append(f"{'.'.join(place)} imports {name}")
    return found


def test_arrows_go_one_way():
    assert back_arrows(REPOSITORY) == []
    modules = [path for path in (REPOSITORY / "slipstream").rglob("*.py")]
    assert len(modules) > 30  # it did look


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("slipstream/logs/deep/er/planted.py", "from slipstream.training import step"),
        ("slipstream/tools/deep/planted.py", "import slipstream.logs.formats as f"),
        ("slipstream/model/planted.py", "from dlrm_s_pytorch import DLRM_Net"),
        ("slipstream/training/planted.py", "def f():\n    from slipstream import serving"),
        ("slipstream/serving/deep/planted.py", "import bench.compare"),
        ("fae_train.py", "from slipstream_train import main"),
    ],
)
def test_a_planted_back_arrow_is_found(place, line, tmp_path):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("import slipstream.tools.cli\n" * place.startswith("slipstream") + line)
    assert len(back_arrows(tmp_path)) >= 1
    path.write_text("import numpy\nfrom slipstream.tools import cli")
    assert back_arrows(tmp_path) == []


def test_files_and_functions_stay_short():
    """CONVENTIONS: a module of 450 lines at most, a function of 60."""
    paths = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("bench/*.py")]
    paths += (REPOSITORY / "slipstream").rglob("*.py")
    too_long = []
    for path in paths:
        text = path.read_text()
        if text.count("\n") > 450:
            too_long.append(path.name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                too_long.append(f"{path.name}: {node.name}")
    assert too_long == []


def test_no_pickle():
    for path in [
        *REPOSITORY.glob("*.py"),
        *(REPOSITORY / "slipstream").rglob("*.py"),
        *REPOSITORY.glob("bench/*.py"),
    ]:
        text = path.read_text()
        assert "pickle" not in imported(path) and "allow_pickle=True" not in text, path.name
        assert "torch.load" not in text or "weights_only=True" in text, path.name


def test_training_needs_no_polars_pandas_or_matplotlib():
    """And how threads wait is set before torch, which reads it, is loaded."""
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, *rest):\n"
        "        assert name != 'torch' or os.environ['GOMP_SPINCOUNT'] == '1000'\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {', '.join(SCRIPTS)}; print(*sys.modules)"
    )
    clean = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        env=clean,
    ).stdout.split()
    assert "torch" in loaded
    assert not {"polars", "pandas", "matplotlib"} & set(loaded)


@pytest.mark.parametrize("name", MAINS)
def test_help_explains_every_flag(name, capsys):
    module = __import__(name)
    with pytest.raises(SystemExit) as stopped:
        module.parse_args(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    parts = [part.split() for part in shown.split("\n  --")[1:]]
    assert len(parts) > 5
    for words in parts:
        assert len(words) >= 4, words  # a flag, its value and an explanation


@pytest.mark.parametrize("name", MAINS)
def test_no_flag_that_nothing_reads(name):
    """Every value of a script's parser is read somewhere, or handed on as a keyword."""
    sources = "".join((REPOSITORY / f"{script}.py").read_text() for script in SCRIPTS)
    sources += "".join(path.read_text() for path in (REPOSITORY / "slipstream").rglob("*.py"))
    required = {
        "data_utils": ["--raw-data-file", "x"],
        "input_segregation": ["--processed-data-file", "x"],
        "dlrm_s_pytorch": ["--processed-data-file", "x"],
        "predict": ["--load-model", "x", "--raw-data-file", "x", "--output", "x"],
    }.get(name, ["--segregated-data-dir", "x"])
    module = __import__(name)
    keywords = set()
    for function in ("preprocess", "segregate"):
        if hasattr(module, function):
            keywords |= set(inspect.signature(getattr(module, function)).parameters)
    for flag in vars(module.parse_args(required)):
        # Read: as an attribute, not as a field that is declared.
        assert (
            flag in keywords or re.search(rf"\w\.{flag}\b", sources) or (f'"{flag}"' in sources)
        ), flag


def test_underscore_spellings_are_aliases():
    import slipstream_train

    flags = ["--segregated_data_dir", "x", "--mini_batch_size=7", "--drop_percentage", "20"]
    args = slipstream_train.parse_args(flags)
    assert (args.mini_batch_size, args.drop_percentage) == (7, 20)
