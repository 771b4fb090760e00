"""Where a run happens: other locales, other systems, folders that cannot be written to."""

import ast
import errno
import json
import os
import subprocess
import sys

import polars as pl
import pytest
from helpers import REPOSITORY

import data_utils
from slipstream.tools import cli

BINARY_OPENERS = {"os", "Part", "archive", "tarfile"}  # their `open` is another one


def test_no_text_is_read_or_written_by_the_locale():
    found = []
    paths = [*REPOSITORY.glob("*.py"), *(REPOSITORY / "slipstream").rglob("*.py")]
    for path in [*paths, *(REPOSITORY / "bench").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            owner, _, method = name.rpartition(".")
            is_open = method == "open" and owner not in BINARY_OPENERS
            modes = [ast.unparse(argument) for argument in node.args]
            is_binary = is_open and any("b'" in mode for mode in modes)
            if (is_open and not is_binary) or method in ("read_text", "write_text"):
                if "encoding" not in [keyword.arg for keyword in node.keywords]:
                    found.append(f"{path.name}:{node.lineno}: {name}")
    assert found == []


def test_names_that_the_locale_cannot_spell(tmp_path):
    folder = tmp_path / "Café ü"
    (folder / "log").mkdir(parents=True)
    frame = pl.DataFrame(
        {
            "geklickt": [row % 2 for row in range(400)],
            "größe": [*range(400)],
            "Läden": [f"s{row % 50}é" for row in range(400)],
        }
    )
    frame.write_parquet(folder / "log" / "päck.parquet")
    frame.write_csv(folder / "lög.csv")
    described = {"label": "geklickt", "dense": ["größe"], "categorical": ["Läden"]}
    text = json.dumps(described, ensure_ascii=False)
    (folder / "späl.json").write_text(text, encoding="utf-8")

    def run(script, *flags):
        words = [sys.executable, str(REPOSITORY / script), *flags]
        locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = subprocess.run(
            words, cwd=folder, env={**os.environ, **locale}, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    for raw in ("log", "lög.csv"):
        flags = ["--raw-data-file", raw, "--processed-data-file", raw + "ü.npz", "--verbose"]
        said = run("data_utils.py", "--data-set", "custom", "--columns", "späl.json", *flags)
        assert rb"gr\xf6\xdfe" in said and rb"L\xe4den" in said
        report = (folder / f"{raw}ü.npz.columns.txt").read_text(encoding="utf-8")
        assert "größe" in report and "Läden" in report
    model = ["--arch-mlp-bot=1-4-2", "--arch-mlp-top=4-1", "--arch-sparse-feature-size=2"]
    files = ["--processed-data-file", "lög.csvü.npz", "--segregated-data-dir", "ségr"]
    run("input_segregation.py", *files)
    files = [*files[2:], "--save-model", "mödel", "--runs-dir", "rüns", "--mini-batch-size=32"]
    run("slipstream_train.py", *files, *model, "--nepochs=1")
    assert list((folder / "mödel").glob("step-*"))


def test_a_system_without_locks_is_told_in_a_line():
    code = "import sys; sys.modules['fcntl'] = None; import data_utils"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "Slipstream runs on Linux and macOS (on Windows: in WSL), not here\n"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("flags", [[], ["--processed-data-file", "new/folder/x.npz"]])
def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, capsys, number, flags):
    (tmp_path / "train.txt").write_bytes(b"1" + b"\t" * 39 + b"\n")
    mkdir = os.mkdir

    def refuse(path, *rest, **more):
        if str(path).endswith(".work") or not str(path).startswith("/"):
            raise OSError(number, os.strerror(number), str(path))
        mkdir(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(sys, "argv", ["data_utils.py", "--raw-data-file", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(data_utils.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    where = "new/folder" if flags else str(tmp_path)
    assert f"{where} cannot be written to ({os.strerror(number)})" in said
    assert "--processed-data-file" in said and os.listdir(tmp_path) == ["train.txt"]


def test_a_raw_file_that_cannot_be_read_is_another_error(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_bytes(b"1" + b"\t" * 39 + b"\n")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "denied", str(tmp_path / "train.txt"))

    monkeypatch.setattr("slipstream.logs.rawfile.RawFile.blocks", refuse)
    with pytest.raises(PermissionError, match=r"denied: .*train\.txt"):
        data_utils.preprocess("kaggle", tmp_path)
