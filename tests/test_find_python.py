"""Which interpreter the scripts take, and how .venv is made: half of one is never taken."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import REPOSITORY

# A Python as far as the search needs one: what it can import is in a file of its .venv.
FAKE = r"""#!/bin/bash
here="$(dirname "$0")"
case "$1 $2 $3" in
  "-m venv"*)
    if [ -n "${NO_VENV:-}" ]; then printf 'ensurepip is\n\nnot available\n'; exit 1; fi
    echo "venv ${*:3}" >>"$CALLS"
    if [ "$3" = --clear ]; then rm -rf .venv; fi
    mkdir -p .venv/bin && touch .venv/pyvenv.cfg && cp "$ORIGINAL" .venv/bin/python ;;
  "-m pip"*)
    echo "pip ${*:6}" >>"$CALLS"
    if [ -n "${KILL_PIP:-}" ]; then kill -9 $$; fi
    if [ "$6" = --force-reinstall ]; then rm -f .venv/damaged; fi
    touch .venv/has-all ;;
  "-  ") cat >/dev/null ;;  # the lock, or its version alone
  "- "* | "-c import"*)
    cat >/dev/null
    [ "$here" = .venv/bin ] && [ -e .venv/has-all ] && [ ! -e .venv/damaged ] ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """Runs the search in a folder; returns its status, lines, and what it had called."""
    fake, calls = tmp_path / "bin/python3", tmp_path / "calls"
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)
    shutil.copy(fake, fake.with_name("python"))
    folder = tmp_path / "here"
    shutil.copytree(REPOSITORY / "bench", folder / "bench", ignore=lambda *_: ["results"])

    def run(script='source bench/python.sh; find_python torch; echo "found $PYTHON"', **more):
        calls.write_text("")
        variables = {k: v for k, v in os.environ.items() if k != "PYTHON"}
        variables |= {"PATH": f"{fake.parent}:/usr/bin:/bin", "CALLS": str(calls)}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env={**variables, "ORIGINAL": str(fake), **more},
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=60,
        )
        words = [line.split()[:2] for line in calls.read_text().splitlines()]
        return done.returncode, (done.stdout + done.stderr).splitlines(), words

    run.folder = folder
    return run


MADE = [["venv", ".venv"], ["pip", "-r"]]
MADE_ANEW = [["venv", "--clear"], ["pip", "-r"]]


def test_one_that_was_interrupted_is_made_anew(start):
    """And one that is whole is taken as it is, without a word from the network."""
    status, _, calls = start(KILL_PIP="1")
    assert status == 2 and calls == MADE
    (start.folder / ".venv/has-all").touch()  # as far as one can see
    status, lines, calls = start()
    assert (status, lines[0]) == (0, ".venv was left half made: making it anew")
    assert calls == MADE_ANEW and lines[-1] == "found .venv/bin/python"
    assert start() == (0, ["found .venv/bin/python"], [])


def test_one_whose_python_is_gone_is_made_anew(start):
    assert start()[0] == 0
    python = start.folder / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nonexistent/python3")
    status, lines, calls = start()
    assert (status, lines[0]) == (0, "the Python of .venv is gone: making .venv anew")
    assert calls == MADE_ANEW


def test_what_else_lies_in_a_venv_stays(start):
    """It lacks something: that is added."""
    start()
    (start.folder / ".venv/has-all").unlink()
    (start.folder / ".venv/own.txt").touch()
    status, _, calls = start()
    assert (status, calls) == (0, [["pip", "-r"]]) and (start.folder / ".venv/own.txt").exists()
    (start.folder / ".venv/damaged").touch()  # and pip thinks that it is whole
    status, lines, calls = start()
    assert (status, calls) == (0, [["pip", "-r"], ["pip", "--force-reinstall"]])
    assert (start.folder / ".venv/own.txt").exists() and "is whole: installing" in lines[-2]
    shutil.rmtree(start.folder / ".venv")
    (start.folder / ".venv").mkdir()
    (start.folder / ".venv/own.txt").touch()
    status, lines, calls = start()
    assert (status, calls) == (2, []) and ".venv is no virtual environment" in lines[-1]


def test_what_fails_is_said_in_one_line(start):
    status, lines, _ = start(NO_VENV="1")
    assert status == 2 and len(lines) == 2 and lines[0].startswith("No Python with torch here")
    assert "python3 -m venv .venv failed" in lines[1]
    assert lines[1].endswith("ensurepip is not available")
    # Nothing is left that a later start would stumble over.
    assert start()[0] == 0


def test_the_tests_start_with_what_is_there(start):
    shutil.copy(REPOSITORY / "run_tests.sh", start.folder)
    status, lines, calls = start("./run_tests.sh")
    assert status == 0 and calls == MADE, lines
    status, _, calls = start("./run_tests.sh")
    assert status == 0 and calls == []


@pytest.mark.parametrize(
    ("files", "is_taken"),
    [
        ({"part/data.so": ""}, False),  # a folder without its Python files
        ({"part/__init__.py": "import part.gone"}, False),
        ({"part/__init__.py": ""}, True),
        # Installed to its end, so it is not imported.
        (
            {
                "part/__init__.py": "raise ImportError",
                "part-1.dist-info/METADATA": "Name: part\nVersion: 1\n",
                "part-1.dist-info/INSTALLER": "pip",
            },
            True,
        ),
        (
            {
                "part/__init__.py": "import part.gone",
                "part-1.dist-info/METADATA": "Name: part\nVersion: 1\n",
            },
            False,
        ),
    ],
)
def test_half_of_a_package_is_none(tmp_path, files, is_taken):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    script = f'source bench/python.sh; can_import "{sys.executable}" part'
    done = subprocess.run(
        ["bash", "-c", script], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert (done.returncode == 0) == is_taken
