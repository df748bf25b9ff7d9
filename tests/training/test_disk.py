"""A folder is replaced so that a whole one is there at any moment, and a full disk is told from other troubles."""

import errno
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from assassin import Assassin, Killed
from safetensors import SafetensorError
from safetensors.torch import save_file

from training import disk
from training.disk import is_disk_full, put_back, replace_file, replace_folder, without_stopping


ROOT = Path(__file__).parents[2]
NO_SPACE = "Error while serializing: I/O error: No space left on device (os error 28)"
OWN_MOUNTS = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
NO_MOUNT = (
    sys.platform != "linux" or subprocess.run([*OWN_MOUNTS, "mount -t tmpfs none /tmp"], check=False).returncode != 0
)
# Replaces a folder of two files again and again, and says each time that it has.
REPLACE = """
import shutil, sys
from itertools import count
from pathlib import Path
from training import disk

final = Path(sys.argv[1])
if sys.argv[2] == "renamed":
    disk._exchange = lambda *_: False
for number in count(int(sys.argv[3])):
    new = final.with_name(".tmp-model")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for name in ("config", "weights"):
        (new / name).write_text(str(number))
    disk.replace_folder(new, final)
    print(number, flush=True)
"""


def start_replacing(final: Path, way: str, number: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", REPLACE, str(final), way, str(number)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    new, final = tmp_path / ".tmp-model", tmp_path / "model"
    for content in ("first", "second"):
        new.mkdir()
        (new / f"{content}.txt").write_text(content)
        replace_folder(new, final)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert [path.name for path in final.iterdir()] == [f"{content}.txt"]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("way", ["exchanged", "renamed"])
def test_death_while_replacing_a_folder_leaves_the_old_or_the_new_one(
    way: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "renamed":
        monkeypatch.setattr(disk, "_exchange", lambda *_: False)
    new, final = tmp_path / ".tmp-model", tmp_path / "model"
    for victim in range(50):
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
        for folder, content in ((final, "old"), (new, "new")):
            folder.mkdir()
            (folder / "content").write_text(content)
        assassin = Assassin(moment)
        try:
            with monkeypatch.context() as patch:
                assassin.watch(patch)
                assassin.victim = victim
                replace_folder(new, final)
        except Killed:
            if way == "renamed":
                put_back(final)
            assert (final / "content").read_text() in ("old", "new")
        else:
            assert (final / "content").read_text() == "new"
            assert victim > 3
            return
    raise AssertionError("replacing never came to its end")


def test_a_second_death_loses_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder is still under its other name when the next replacement begins."""
    monkeypatch.setattr(disk, "_exchange", lambda *_: False)
    for victim in range(20):
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
        for name in ("model.old", ".tmp-model"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "content").touch()
        assassin = Assassin("after")
        try:
            with monkeypatch.context() as patch:
                assassin.watch(patch)
                assassin.victim = victim
                replace_folder(tmp_path / ".tmp-model", tmp_path / "model")
        except Killed:
            shutil.rmtree(tmp_path / ".tmp-model", ignore_errors=True)  # as the next to write one begins
        else:
            return
        put_back(tmp_path / "model")
        assert (tmp_path / "model" / "content").exists()
    raise AssertionError("replacing never came to its end")


@pytest.mark.parametrize("way", ["exchanged", "renamed"])
def test_a_killed_process_leaves_a_whole_folder(way: str, tmp_path: Path) -> None:
    final, moments, last = tmp_path / "model", random.Random(0), 0
    for _ in range(8):
        process = start_replacing(final, way, last + 1)
        assert process.stdout
        last = int(process.stdout.readline())
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        last = max([last, *map(int, process.communicate()[0].split())])
        if way == "renamed":
            put_back(final)
        config, weights = ((final / name).read_text() for name in ("config", "weights"))
        assert config == weights
        assert last <= int(config) <= last + 1
        last = int(config)


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
def test_the_folder_is_there_at_any_moment(tmp_path: Path) -> None:
    process = start_replacing(tmp_path / "model", "exchanged")
    assert process.stdout
    assert process.stdout.readline()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        assert (tmp_path / "model").is_dir()
    process.kill()
    assert len(process.communicate()[0].split()) > 3


def test_what_a_crash_left_is_put_back_only_where_there_is_nothing(tmp_path: Path) -> None:
    final, old = tmp_path / "model", tmp_path / "model.old"
    put_back(final)
    assert not final.exists()
    old.mkdir()
    put_back(final)
    assert final.exists()
    old.mkdir()
    put_back(final)
    assert old.exists()


def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, on_the_disk = tmp_path / "file", list[str]()
    monkeypatch.setattr(disk, "synchronise_file", lambda path: on_the_disk.append(path.read_text()))
    for content in ("first", "second"):
        with replace_file(file) as unfinished:
            unfinished.write_text(content)
            assert not on_the_disk or file.read_text() == "first"
        assert file.read_text() == content
        assert list(tmp_path.iterdir()) == [file]
    assert on_the_disk == ["first", "second"]


@pytest.mark.parametrize("written", [True, False])
def test_an_error_leaves_the_old_file_and_nothing_else(written: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def fail() -> None:
        with replace_file(tmp_path / "file") as unfinished:
            if written:
                unfinished.write_text("half of the ne")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_full_disk_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as text:
        Path("/dev/full").write_text("text")
    with pytest.raises(Exception, match="os error 2") as elsewhere:
        save_file({"weight": torch.zeros(9)}, tmp_path / "no" / "file")
    full = [text.value, OSError(errno.EDQUOT, "Disk quota exceeded"), SafetensorError(NO_SPACE)]
    assert [is_disk_full(error) for error in full] == [True] * 3
    others = [elsewhere.value, OSError(errno.EACCES, "Permission denied"), ValueError("disk"), KeyError(28)]
    assert [is_disk_full(error) for error in others] == [False] * 4


FILL = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file

try:
    save_file({"weight": torch.zeros(2**19)}, Path(sys.argv[1]) / "file")
except Exception as error:
    print(error)
"""


@pytest.mark.skipif(NO_MOUNT, reason="this system lets nobody mount a file system of 1 MiB")
def test_a_full_disk_is_told_in_the_words_that_are_looked_for(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=1M none {tmp_path} && {sys.executable} -c '{FILL}' {tmp_path}"
    done = subprocess.run([*OWN_MOUNTS, mount], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == NO_SPACE


def test_only_a_full_disk_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with without_stopping("the log"), open("/dev/full", "w") as file:
        file.write("text")
    assert "WARNING: the log cannot be written now ([Errno 28] No space" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError), without_stopping("the log"):
        (tmp_path / "no" / "file").write_text("text")
