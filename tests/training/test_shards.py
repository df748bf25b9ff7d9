"""Shards that are written again and again: interruptions, workers and full disks leave no trace."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import pytest
from prepared import contents, settings, shard_names, write_split
from tqdm.auto import tqdm

from training import prepare, shards
from training.recoding import Recoding
from training.shards import Shards, about_split, prepare_split, read_facts, usual_number_of_shards
from training.source import open_source


Run = Callable[..., Path]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that were decoded."""
    names: list[str] = []
    original = Recoding.recode

    def spy(self: Recoding, image: Any) -> Any:
        names.append(image["path"])
        return original(self, image)

    monkeypatch.setattr(Recoding, "recode", spy)
    return names


@pytest.mark.parametrize(
    ("images", "expected"),
    [(1, 1), (511, 1), (1024, 2), (32767, 63), (50_000, 64), (1_281_167, 320), (14_197_122, 3456)],
)
def test_the_usual_number_of_shards_serves_all_readers(images: int, expected: int) -> None:
    assert usual_number_of_shards(images) == expected


@pytest.fixture
def whole(workplace: Path, run_prepare: Run) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    return contents(run_prepare(output_dir=str(workplace / "whole")))


def test_workers_write_what_one_process_does(run_prepare: Run, whole: dict[str, bytes]) -> None:
    out = run_prepare(num_workers=2)
    assert contents(out) == whole
    assert not (out / ".unfinished").exists()


def test_workers_share_the_shards(workplace: Path) -> None:
    source = open_source(str(workplace / "source"), all_columns=True)
    done: list[int] = []
    prepare_split(source, workplace / "out", about_split(source, Recoding(24), 4), Recoding(24), 2, done.append)
    assert done == [8, 8, 8, 9]


def test_what_is_there_already_is_not_decoded_again(
    run_prepare: Run, whole: dict[str, bytes], decoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_prepare()
    card = out / "README.md"
    card.write_text(card.read_text() + "What the owner adds stays.\n")
    decoded.clear()
    run_prepare()
    assert decoded == []
    assert "train: 4 of 4 shards are there already" in capsys.readouterr().out
    assert card.read_text().endswith("stays.\n")
    (out / "data" / "train-00001-of-00004.parquet").unlink()
    run_prepare()
    assert decoded == [f"picture-{number}.img" for number in range(8, 16)]
    assert contents(out) == whole


def test_a_killed_run_goes_on_while_its_workers_still_write(
    workplace: Path, run_prepare: Run, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, recode = workplace / "out", Recoding.recode

    def slowly(self: Recoding, image: Any) -> Any:
        time.sleep(0.02)
        return recode(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(Recoding, "recode", slowly)
        # The lock of the progress bars is shared with forks: a killed one must not have it.
        patch.setattr(prepare, "tqdm", partial(tqdm, disable=True))
        killed = get_context("fork").Process(target=prepare.main, args=(settings(workplace, num_workers=2),))
        killed.start()
        deadline = time.monotonic() + 60
        while not list(out.glob(".unfinished/train-*")) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(killed.pid or 0, signal.SIGKILL)
        killed.join()
    left = contents(out)
    assert 1 <= sum(name.startswith(".unfinished/train-") for name in left) < 4
    assert not any(name.startswith("data/") for name in left)
    run_prepare()
    assert contents(out) == whole


def test_a_process_that_outlives_its_run_cannot_spoil_the_next(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 3)
    source = open_source(str(workplace / "source"), all_columns=True)
    about, recoding, out = about_split(source, Recoding(24), 4), Recoding(24), workplace / "out"
    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        orphan = iter(Shards(source, out, about, recoding, [0]))
        next(orphan)
    (left,) = out.iterdir()
    left.unlink()
    successor = iter(Shards(source, out, about, recoding, [0]))
    next(successor)
    with pytest.raises(FileNotFoundError):
        list(orphan)
    assert list(successor) == [3, 2]
    (file,) = out.iterdir()
    assert read_facts(file)[1].images_in == 8


def test_a_split_is_not_there_before_it_is_whole(
    run_prepare: Run, whole: dict[str, bytes], workplace: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    rename, replace = Path.rename, Path.replace
    for method, original, times in (("replace", replace, 2), ("rename", rename, 2)):
        counter = iter(range(100))

        def die(
            self: Path, target: Path, original: Any = original, times: int = times, counter: Any = counter
        ) -> Path:
            if self.suffix == ".parquet" and next(counter) == times:
                raise KeyboardInterrupt
            return original(self, target)  # type: ignore[no-any-return]

        with monkeypatch.context() as patch:
            patch.setattr(Path, method, die)
            with pytest.raises(KeyboardInterrupt):
                run_prepare()
        assert not list((workplace / "out").rglob(".tmp-*"))
        assert len(shard_names(workplace / "out")) == (0 if method == "replace" else 2)
    assert len(decoded) == 33 + len(range(16, 24))  # the third shard twice
    assert contents(run_prepare()) == whole


def test_what_another_split_has_got_so_far_stays(
    workplace: Path, run_prepare: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_split(workplace / "source", "test", lengths=(4,), first=100)
    replace, counter = Path.replace, iter(range(100))

    def die(self: Path, target: Path) -> Path:
        if self.suffix == ".parquet" and next(counter) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            run_prepare()
    run_prepare(split=["test"])
    assert [path.name[:11] for path in sorted((workplace / "out" / ".unfinished").iterdir())] == [
        "train-00000",
        "train-00001",
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_full_disk_is_told_and_harms_nothing(
    num_workers: int, workplace: Path, run_prepare: Run, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = Path.open

    def open_on_full_disk(self: Path, *arguments: Any, **options: Any) -> IO[Any]:
        full = self.name.endswith("train-00002-of-00004.parquet")
        return open_file(Path("/dev/full") if full else self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        with pytest.raises(
            RuntimeError, match=f"{workplace / 'out'} is full .*No space left.*: free some space, and run"
        ):
            run_prepare(num_workers=num_workers)
    assert sorted(contents(workplace / "out")) == [f".unfinished/train-0000{n}-of-00004.parquet" for n in (0, 1)]
    assert contents(run_prepare()) == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"short_side": 25}, "short_side: 24 → 25"),
        ({"quality": 91}, "quality: 90 → 91"),
        ({"num_shards": 5}, "num_shards: 4 → 5"),
        ({"max_images": 32}, "max_images: None → 32"),
        ({"streaming": False}, "fingerprint: "),
    ],
    ids=str,
)
def test_other_settings_are_refused_by_name_before_anything_is_decoded(
    change: dict[str, Any], words: str, run_prepare: Run, decoded: list[str]
) -> None:
    out = run_prepare()
    before, number = contents(out), len(decoded)
    with pytest.raises(ValueError, match=f"was made otherwise .*{words}.* choose another --output_dir"):
        run_prepare(**change)
    assert contents(out) == before
    assert len(decoded) == number


def test_other_data_or_another_encoder_is_refused_but_not_another_name(
    workplace: Path, run_prepare: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run_prepare())
    (workplace / "source").rename(workplace / "moved")
    assert contents(run_prepare(dataset=str(workplace / "moved"))) == before
    with monkeypatch.context() as patch:
        patch.setattr("training.recoding.pillow", "1.0")
        with pytest.raises(ValueError, match="encoder: 'Pillow .*' → 'Pillow 1.0, "):
            run_prepare(dataset=str(workplace / "moved"))
    write_split(workplace / "source", first=100)  # files of the same names and lengths
    with pytest.raises(ValueError, match="version: "):
        run_prepare()


def test_files_of_others_are_named_and_stay(workplace: Path, run_prepare: Run) -> None:
    out = run_prepare()
    shard = out / "data" / "train-00002-of-00004.parquet"
    shard.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="train-00002-of-00004.parquet cannot be read .*: delete it"):
        run_prepare()
    write_split(out)
    before = contents(out)
    with pytest.raises(ValueError, match="train-00000-of-00002.parquet is not from training.prepare"):
        run_prepare()
    assert contents(out) == before
