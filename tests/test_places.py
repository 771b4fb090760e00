"""Links, pipes and files of others: none is followed too far, waited for, or deleted."""

import json
import os
import socket

import pytest
from helpers import segregate_small, train, write_processed

import dlrm_s_pytorch
import fae_train
import input_segregation
from slipstream.logs.columnfile import read_column_file
from slipstream.logs.preprocess import preprocess
from slipstream.tools.npz import open_npz, write_npz
from slipstream.tools.places import own_names, remove_ours, resolved
from slipstream.tools.plugins import find_plugin
from slipstream.tools.runlog import RunLog
from slipstream.tools.runtime import read_json, write_json
from slipstream.training.saved import BEST, checkpoints_in, open_checkpoint
from slipstream.training.sets import ROWS_FILE

LINE = "1" + "\t3" * 13 + "\tab12" * 26 + "\n"


@pytest.fixture
def folder(tmp_path):
    """Small data as the trainers take it, and `big`, to which links lead."""
    write_processed(tmp_path / "p.npz", 1500)
    segregate_small(tmp_path / "p.npz")
    (tmp_path / "big").mkdir()
    return tmp_path


def linked(place, target):
    """Move what is at a place, and leave a link there."""
    place.rename(target)
    place.symlink_to(target, target_is_directory=True)


def write_log(path):
    """A log of Kaggle's form whose days have both classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(str(row % 2) + LINE[1:] for row in range(140)))
    return path


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_rotation_deletes_of_a_link_the_link_and_no_file_of_others(folder, capsys):
    models = folder / "m"
    flags = ["--save-model", models, "--checkpoint-every", "2", "--load-model", "auto"]
    train(fae_train, folder, *flags, "--num-batches", "4")
    linked(models / "step-0000000002", folder / "big/old")
    (models / "step-0000000004/notes.txt").write_text("mine")
    others = ["step-by-step.old", "step-notes.partial", "step-4.old", "step-0000000004.damaged"]
    for name in [*others, "step-٣.partial", "step-0000000001.partial"]:
        (models / name).mkdir()
        (models / name / "a").write_text("mine")
        (models / name / "state.npz").write_text("")
    (models / "step-0000000003.partial").symlink_to(folder / "big")
    capsys.readouterr()
    train(fae_train, folder, *flags, "--num-batches", "10")
    said = capsys.readouterr().out
    open_checkpoint(folder / "big/old")
    assert [path.name[-2:] for path in checkpoints_in(models)] == ["08", "10"]
    for name in (*others, "step-٣.partial"):
        assert names_in(models / name) == ["a", "state.npz"]
    assert names_in(models / "step-0000000004") == ["notes.txt"]
    assert names_in(models / "step-0000000001.partial") == ["a"]
    assert not os.path.lexists(models / "step-0000000003.partial")
    assert not os.path.lexists(models / "step-0000000002")
    stays = f"{models}/step-0000000004 stays: it holds notes.txt, which is not ours"
    assert said.count(stays) == 1
    train(fae_train, folder, *flags, "--num-batches", "11")
    assert stays not in capsys.readouterr().out  # once


def test_a_linked_checkpoint_is_gone_on_from_by_its_name(folder):
    flags = ["--save-model", folder / "m", "--checkpoint-every", "2"]
    train(fae_train, folder, *flags, "--num-batches", "4")
    newest = folder / "m/step-0000000004"
    linked(newest, folder / "big/newest")
    train(fae_train, folder, *flags, "--num-batches", "6", "--load-model", newest)
    assert newest.is_symlink() and open_checkpoint(folder / "m/step-0000000006")


def test_a_damaged_checkpoint_gives_way_to_what_others_put_under_its_name(folder):
    flags = ["--save-model", folder / "m", "--checkpoint-every", "2", "--load-model", "auto"]
    train(fae_train, folder, *flags, "--num-batches", "4")
    (folder / "m/step-0000000004/state.npz").write_bytes(b"")
    aside = folder / "m/step-0000000004.damaged"
    aside.mkdir()
    (aside / "report.txt").write_text("mine")
    train(fae_train, folder, *flags, "--num-batches", "4")
    assert names_in(aside) == ["report.txt"]
    assert (folder / "m/step-0000000004.damaged-2/state.npz").exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_linked_outputs_are_written_to_where_they_lead(folder, is_there):
    """Again and again, also where nothing is there yet; nothing is left beside them."""
    big = folder / "big"
    linked(folder / "hot_cold", big / "hc")
    (folder / "m").mkdir()
    for link, name in (("m/best", "best"), ("n", "models"), ("runs", "logs")):
        (folder / link).symlink_to(big / name)
        if is_there:
            (big / name).mkdir()
    for budget in (3000, 4000, 5000):
        segregate_small(folder / "p.npz", "--hot-emb-gpu-mem", str(budget))
        options = json.loads(open_npz(big / "hc" / ROWS_FILE)["manifest"].tobytes())["options"]
        assert options["hot_emb_gpu_mem"] == budget
    saves = ["--save-model", folder / "m", "--load-model", "auto", "--val-freq", "5"]
    for number in (5, 10):
        train(fae_train, folder, *saves, "--num-batches", str(number))
        best = open_checkpoint(folder / "m" / BEST)
        assert best.values["trainer"]["progress"]["best"]["step"] == best.step
        assert best.step == number or number == 10
    train(fae_train, folder, "--save-model", folder / "n", "--num-batches", "3")
    assert all((folder / link).is_symlink() for link in ("hot_cold", "m/best", "n", "runs"))
    assert sorted(os.listdir(big)) == ["best", "hc", "logs", "models"]
    assert os.listdir(big / "models") == ["step-0000000003"] and len(os.listdir(big / "logs")) == 3
    assert not [name for name in names_in(folder) if name.endswith((".old", ".partial"))]


def test_the_best_is_never_written_over_another_checkpoint(folder):
    (folder / "m").mkdir()
    (folder / "m/best").symlink_to("step-0000000002")
    flags = ["--save-model", folder / "m", "--checkpoint-every", "2", "--num-batches", "4"]
    with pytest.raises(ValueError, match="best is a link to step-0000000002 beside it"):
        train(fae_train, folder, *flags, "--val-freq", "2")


def test_a_linked_processed_file_and_its_linked_work_folder(tmp_path):
    log, link = write_log(tmp_path / "log/train.txt"), tmp_path / "log/train_processed.npz"
    big = tmp_path / "big"
    (big / "work").mkdir(parents=True)
    link.symlink_to(big / "p.npz")
    (big / "p.npz.work").symlink_to(big / "work")
    (big / "work/notes.txt").write_text("mine")
    inner = big / "work/part_00000_00000"
    inner.mkdir()
    (inner / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="part_00000_00000 holds what is not ours; move"):
        preprocess("kaggle", log)
    inner.rename(big / "work/part_00007_00000")
    for seed in (1, 2):
        assert preprocess("kaggle", log, split=f"random:{seed}")
    assert not preprocess("kaggle", log, split="random:2")
    assert link.is_symlink() and (big / "p.npz").is_file() and (big / "p.npz.work").is_symlink()
    assert sorted(os.listdir(tmp_path / "log")) == ["train.txt", link.name]
    kept = ["notes.txt", "part_00007_00000", "part_00007_00000/mine.txt"]
    assert names_in(big / "work") == kept
    assert sorted(os.listdir(big)) == ["p.npz", "p.npz.columns.txt", "p.npz.work", "work"]


def test_an_unfinished_file_is_never_written_through_a_link(tmp_path):
    (tmp_path / "thesis").write_text("five years")
    for name, write in (("a.npz", write_npz), ("a.json", write_json)):
        (tmp_path / f"{name}.partial").symlink_to("thesis")
        write(tmp_path / name, {})
    assert (tmp_path / "thesis").read_text() == "five years"
    os.mkfifo(tmp_path / "b.npz.partial")
    with pytest.raises(ValueError, match=r"b.npz.partial is a pipe"):
        write_npz(tmp_path / "b.npz", {})


def test_runs_have_no_folder_in_what_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "lost").symlink_to("none/where")
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (
        ("lost", "lost is a link to none/where, which cannot be made; make its folder"),
        ("lost/deeper", "lost is a link to none/where, which cannot be made"),
        ("loop", "loop is a link to loop, which cannot be made"),
        ("file", "file cannot be made: .*file is a file; choose another folder"),
        ("file/deeper", "file/deeper cannot be made: .*file is a file"),
    ):
        for resumed in (False, True):
            with pytest.raises(OSError, match=reason):
                RunLog(tmp_path / name, None, "fae", resumed)
    RunLog(tmp_path, "x", "fae", True).close()
    (tmp_path / "y").symlink_to("later")
    RunLog(tmp_path, "y", "fae").close()
    assert (tmp_path / "later/log.jsonl").exists() and resolved(tmp_path / "x") == tmp_path / "x"


@pytest.fixture(params=["a pipe", "a device", "a folder", "a socket"])
def endless(request, tmp_path):
    """What it is, and a function that puts such a thing at a place."""

    def put(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if request.param == "a pipe":
            os.mkfifo(path)
        elif request.param == "a device":
            path.symlink_to("/dev/zero")
        elif request.param == "a folder":
            path.mkdir()
        else:
            here = os.open(path.parent, os.O_RDONLY)  # a socket's path must be short
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(f"/proc/self/fd/{here}/{path.name}")
            os.close(here)
        return path

    return request.param, put


def test_no_file_is_read_that_may_have_no_end(endless, tmp_path):
    what, put = endless
    for name, read in (
        ("a.npz", open_npz),
        ("a.json", read_json),
        ("columns.json", read_column_file),
        ("columns.yaml", read_column_file),
        ("own.py", lambda path: find_plugin(f"{path}:Net", {}, "--model")),
    ):
        with pytest.raises(ValueError, match=f"{name} is {what}; expected a regular file"):
            read(put(tmp_path / name))
    log = put(tmp_path / "log/train.txt")
    if what != "a folder":
        with pytest.raises(ValueError, match=f"train.txt is {what}.*, as it is read more than on"):
            preprocess("kaggle", log, tmp_path / "p.npz")
        with pytest.raises(ValueError, match=f"train.txt is {what}"):  # a log in files
            preprocess_folder(tmp_path)
    with pytest.raises(ValueError, match=rf"p\.npz, {what}; expected a file name"):
        preprocess("kaggle", write_log(tmp_path / "good.txt"), put(tmp_path / "p.npz"))


def preprocess_folder(tmp_path):
    """Preprocess `log` as a user's own log in files."""
    columns = tmp_path / "mine.json"
    columns.write_text('{"label": "a", "categorical": ["b"]}')
    preprocess("custom", tmp_path / "log", tmp_path / "out.npz", columns=columns)


def test_what_is_beside_a_log_may_be_anything(endless, tmp_path):
    """Notes of its maker, and what an interrupted run left."""
    _, put = endless
    log = write_log(tmp_path / "train.txt")
    put(tmp_path / "train.txt.json")
    assert preprocess("kaggle", log)
    put(tmp_path / "out.npz.work/identity.json")
    if not (tmp_path / "out.npz.work/identity.json").is_dir():
        assert preprocess("kaggle", log, tmp_path / "out.npz")
        assert not (tmp_path / "out.npz.work").exists()


def test_side_files_of_what_is_trained_on(endless, folder):
    what, put = endless
    times, state = folder / "hot_cold/times.json", folder / "m/step-0000000002/state.npz"
    times.unlink()
    put(times)
    saves = ["--save-model", folder / "m", "--load-model", "auto"]
    with pytest.raises(ValueError, match=f"times.json is {what}"):
        train(fae_train, folder, *saves, "--num-batches", "2")
    times.rmdir() if times.is_dir() else times.unlink()
    train(fae_train, folder, *saves, "--num-batches", "2")
    state.unlink()
    put(state)
    with pytest.raises(ValueError, match="no checkpoint that is whole"):
        train(fae_train, folder, *saves, "--num-batches", "4")
    (folder / "p.npz").unlink()
    put(folder / "p.npz")
    with pytest.raises(ValueError, match=f"p.npz is {what}"):
        train(dlrm_s_pytorch, folder)


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "a.npz").symlink_to("gone.npz")
    with pytest.raises(FileNotFoundError, match=r"a.npz is a link to gone.npz, which does not ex"):
        open_npz(tmp_path / "a.npz")
    write_log(tmp_path / "log/part-0")
    (tmp_path / "log/part-1").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match=r"part-1 is a link to gone, which does not exist"):
        preprocess_folder(tmp_path)
    (tmp_path / "hc").symlink_to("/nowhere/at/all")
    flags = ["--processed-data-file", write_processed(tmp_path / "p.npz")]
    with pytest.raises(FileNotFoundError, match=r"hc is a link to /nowhere/at/all, which cannot"):
        input_segregation.main([*map(str, flags), "--segregated-data-dir", str(tmp_path / "hc")])


def test_deleting_stops_at_names_kinds_and_links(tmp_path, capsys):
    own = own_names(["a.npz", "b"])
    place, other = tmp_path / "place", tmp_path / "other"
    other.mkdir()
    for name in ("a.npz", "a.npz.partial", "aXnpz", "b.old", "ab"):
        (other / name).write_text("x")
    place.mkdir()
    for name in ("a.npz", "b.partial"):
        (place / name).write_text("x")
    (place / "b").symlink_to(other)
    assert remove_ours(place, own) and not place.exists()
    place.symlink_to(other)
    assert remove_ours(place, own) and not os.path.lexists(place)
    assert len(os.listdir(other)) == 5 and not capsys.readouterr().out
    (other / "b").mkdir()  # a folder of this name is not what we write
    assert not remove_ours(other, own)
    assert "holds aXnpz, which is not ours" in capsys.readouterr().out
    assert sorted(os.listdir(other)) == ["aXnpz", "ab", "b", "b.old"]
    assert not remove_ours(other, own) and not capsys.readouterr().out
    assert remove_ours(tmp_path / "none", own)
