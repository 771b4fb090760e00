"""The arrow of imports: scripts -> shared scripts -> the package -> libraries, never back."""

import ast
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
]
MAINS = [name for name in SCRIPTS if name != "dlrm_data_pytorch"]


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_the_package_never_imports_a_script():
    for path in (REPOSITORY / "slipstream").glob("*.py"):
        assert not imported(path) & {*SCRIPTS, "bench", "tests"}, path.name


def test_entry_scripts_import_only_what_they_share():
    shared = {"data_utils", "dlrm_data_pytorch", "dlrm_s_pytorch"}
    for name in SCRIPTS:
        assert imported(REPOSITORY / f"{name}.py") & {*SCRIPTS, "bench", "tests"} <= shared, name
    assert not imported(REPOSITORY / "dlrm_data_pytorch.py") & {*SCRIPTS}
    assert imported(REPOSITORY / "dlrm_s_pytorch.py") & {*SCRIPTS} == {"dlrm_data_pytorch"}


def test_no_pickle():
    for path in [
        *REPOSITORY.glob("*.py"),
        *REPOSITORY.glob("slipstream/*.py"),
        *REPOSITORY.glob("bench/*.py"),
    ]:
        text = path.read_text()
        assert "pickle" not in imported(path) and "allow_pickle=True" not in text, path.name
        assert "torch.load" not in text or "weights_only=True" in text, path.name


def test_training_needs_no_polars_pandas_or_matplotlib():
    code = (
        f"import sys; import {', '.join(SCRIPTS)}; import slipstream.trainer; print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
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


# data_utils hands all its flags to `preprocess` as keywords.
@pytest.mark.parametrize("name", sorted({*MAINS} - {"data_utils"}))
def test_no_flag_that_nothing_reads(name):
    """Every flag of a script's parser is read as `args.<name>` somewhere."""
    sources = "".join((REPOSITORY / f"{script}.py").read_text() for script in SCRIPTS)
    sources += (REPOSITORY / "slipstream/cli.py").read_text()
    required = {
        "input_segregation": ["--processed-data-file", "x"],
        "dlrm_s_pytorch": ["--processed-data-file", "x"],
    }.get(name, ["--segregated-data-dir", "x"])
    for flag in vars(__import__(name).parse_args(required)):
        assert re.search(rf"args\.{flag}\b", sources), flag


def test_underscore_spellings_are_aliases():
    import slipstream_train

    flags = ["--segregated_data_dir", "x", "--mini_batch_size=7", "--drop_percentage", "20"]
    args = slipstream_train.parse_args(flags)
    assert (args.mini_batch_size, args.drop_percentage) == (7, 20)
