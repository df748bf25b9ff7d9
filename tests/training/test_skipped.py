"""Nasty images through the whole pipeline: right pixels, or a line in skipped.jsonl and another image instead."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import encode, picture
from nasty_images import NASTY, Nasty
from PIL import Image

from training.batch import Batch, concatenate
from training.config import PretrainConfig
from training.data import EvaluationImages, TrainingBatches, TrainingOrder, batches
from training.images import CropAndFlip, central_crop, decode_rgb, to_pixels
from training.log_files import NAMED, SkippedLog, read_metrics
from training.skipped import SkippedImage
from training.source import ImageSource, open_source


Settings = Callable[..., PretrainConfig]
Train = Callable[..., Path]
Rows = list[tuple[str, bytes | None]]

GOOD = [(f"good-{number}.png", encode(picture(number))) for number in range(128 - len(NASTY))]
# Nasty images lie between good ones; both kinds end in the same place of every batch.
MIXED: list[Nasty | tuple[str, bytes]] = [*NASTY, *GOOD]
MIXED = [MIXED[place] for place in np.random.default_rng(0).permutation(len(MIXED))]
BROKEN = {place: one for place, one in enumerate(MIXED) if isinstance(one, Nasty) and one.pixels is None}
SHARDS = [50, 3, 75]


def rows(mended: bool) -> Rows:
    """Names and bytes of all images; mended ones have good images in the place of the broken."""
    found: Rows = [(one.name, one.stored) if isinstance(one, Nasty) else one for one in MIXED]
    for place in BROKEN if mended else ():
        found[place] = (found[place][0], encode(picture(1000 + place)))
    return found


def write_parquet(folder: Path, of: Rows) -> str:
    folder.mkdir()
    first = 0
    for shard, length in enumerate(SHARDS):
        images = [stored and {"bytes": stored, "path": name} for name, stored in of[first : first + length]]
        images = [{"bytes": b"", "path": None} if image == b"" else image for image in images]
        data = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
        data.to_parquet(folder / f"train-{shard:05d}-of-{len(SHARDS):05d}.parquet")
        first += length
    return str(folder)


def write_files(folder: Path, of: Rows) -> str:
    """A folder of images, in the order of the rows; a null is an empty file."""
    folder.mkdir()
    for number, (name, stored) in enumerate(of):
        (folder / f"{number:03d}-{name}").write_bytes(stored or b"")
    return str(folder)


# Decoding


@pytest.mark.parametrize("nasty", NASTY, ids=str)
def test_right_pixels_or_the_reason(nasty: Nasty) -> None:
    stored = None if nasty.stored is None else {"bytes": nasty.stored, "path": nasty.name}
    if nasty.pixels is None:
        with pytest.raises(Exception) as caught:  # noqa: PT011 (Pillow raises nearly anything)
            decode_rgb(stored)
        assert f"{type(caught.value).__name__}: {caught.value}".startswith(nasty.reason)
        return
    image = decode_rgb(stored)
    assert image.mode == "RGB"
    assert to_pixels(image).shape == nasty.pixels.shape
    assert np.abs(to_pixels(image).astype(int) - nasty.pixels).mean() <= nasty.tolerance


def test_the_nasty_images_are_many_and_of_both_kinds() -> None:
    assert len({nasty.name for nasty in NASTY}) == len(NASTY) > 60
    assert len(BROKEN) == sum(bool(nasty.reason) for nasty in NASTY) == 25


@pytest.mark.parametrize("nasty", [nasty for nasty in NASTY if nasty.pixels is not None], ids=str)
def test_every_shape_can_be_cropped(nasty: Nasty) -> None:
    image = decode_rgb({"bytes": nasty.stored, "path": None})
    low, high = to_pixels(image).min(), to_pixels(image).max()
    for crop in (CropAndFlip((16, 24), 0.2, True), central_crop((16, 16)), central_crop((96, 96))):
        pixels = to_pixels(crop(image, np.random.default_rng(0)))
        assert pixels.shape[0] in (16, 96)
        if low == high:  # one colour stays one colour
            assert (pixels == low).all()


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_wherever_a_file_is_cut_it_is_never_half_an_image(kind: str) -> None:
    options = {"progressive": True} if kind == "progressive" else {}
    stored = encode(picture(0, (64, 48)), "JPEG" if options else kind, **options)
    whole = to_pixels(decode_rgb({"bytes": stored}))
    ends = {*range(1, len(stored), max(len(stored) // 40, 1)), *range(len(stored) - 25, len(stored))}
    refused = 0
    for end in ends:
        try:
            image = decode_rgb({"bytes": stored[:end]})
        except (OSError, ValueError, SyntaxError):
            refused += 1
            continue
        np.testing.assert_array_equal(to_pixels(image), whole)
    assert refused > 30


# Streams


@pytest.fixture(params=["parquet", "files"])
def sources(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ImageSource, ImageSource]:
    """The data as they are, and mended; as a stream of Parquet, or as files."""
    write = {"parquet": write_parquet, "files": write_files}[request.param]
    found = [open_source(write(tmp_path / name, rows(name == "mended"))) for name in ("nasty", "mended")]
    assert [source.random_access for source in found] == [request.param == "files"] * 2
    return found[0], found[1]


def an_epoch(source: ImageSource, workers: int = 0) -> list[Batch]:
    order = TrainingOrder(source, global_batch_size=16, seed=1, window=64)
    stream = batches(TrainingBatches(order, CropAndFlip((8, 8), 0.2, True), 0, 16), workers)
    return list(islice(stream, order.steps_per_epoch))


def test_batches_stay_full_and_other_images_are_untouched(sources: tuple[ImageSource, ImageSource]) -> None:
    nasty, mended = map(an_epoch, sources)
    assert len(nasty) == 8
    replaced = 0
    for batch, without in zip(nasty, mended, strict=True):
        assert batch.pixels.shape == (16, 8, 8, 3)
        for place, index in enumerate(without.index.tolist()):
            if index in BROKEN:
                replaced += 1
                assert int(batch.index[place]) not in BROKEN
            else:
                assert int(batch.index[place]) == index
                assert torch.equal(batch.pixels[place], without.pixels[place])
    assert replaced == len(BROKEN)


def check(skipped: Sequence[SkippedImage], source: ImageSource) -> None:
    """Each broken image is there once, with its place and its defect."""
    assert Counter(image.index for image in skipped) == Counter(BROKEN.keys())
    for image in skipped:
        nasty = BROKEN[image.index]
        on_disk = source.random_access and not nasty.stored  # an empty file
        assert image.reason.startswith("ValueError: not in any known image format" if on_disk else nasty.reason)
        if source.random_access:
            assert (image.shard, image.row, image.file) == (0, image.index, None)
            assert str(image.name).endswith(f"/{image.index:03d}-{nasty.name}")
            continue
        assert image.file is not None
        assert f"train-{image.shard:05d}-of" in image.file
        stored = datasets.Dataset.from_parquet(image.file).cast_column("image", datasets.Image(decode=False))
        assert (stored[image.row]["image"] or {}).get("bytes") == nasty.stored
        assert image.name == (nasty.name if nasty.stored else None)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_broken_image_is_reported_with_its_place(workers: int, sources: tuple[ImageSource, ImageSource]) -> None:
    check([image for batch in an_epoch(sources[0], workers) for image in batch.broken], sources[0])


def test_evaluation_leaves_the_same_images_out(sources: tuple[ImageSource, ImageSource]) -> None:
    found = concatenate(list(batches(EvaluationImages(sources[0], central_crop((8, 8)), batch_size=10), 0)))
    assert sorted(found.index.tolist()) == sorted(set(range(128)) - set(BROKEN))
    check(found.broken, sources[0])


def test_files_that_vanish_or_cannot_be_opened_are_skipped(tmp_path: Path) -> None:
    folder = Path(write_files(tmp_path / "pictures", GOOD[:32]))
    source = open_source(str(folder))
    (folder / "003-good-3.png").unlink()
    for name in ("007-good-7.png", "009-good-9.png"):
        (folder / name).unlink()
    (folder / "007-good-7.png").mkdir()
    (folder / "009-good-9.png").symlink_to(folder / "nowhere.png")
    reasons = {image.index: image.reason for batch in an_epoch(source) for image in batch.broken}
    assert {index: reason.split(":")[0] for index, reason in reasons.items()} == {
        3: "FileNotFoundError",
        7: "IsADirectoryError",
        9: "FileNotFoundError",
    }


# Runs


def entries(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["parquet", "files"])
def test_a_run_survives_its_data(
    kind: str, tmp_path: Path, settings: Settings, run_pretraining: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"parquet": write_parquet, "files": write_files}[kind](tmp_path / "nasty", rows(mended=False))
    if kind == "files":
        (tmp_path / "nasty" / "folder.jpg").mkdir()
        (tmp_path / "nasty" / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    config = {"dataset": data, "epochs": 2, "max_bad_fraction": 0.5, "logging_steps": 5, "num_workers": 2}
    run = run_pretraining(settings(shuffle_window=64, **config))
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["step"] == 32
    assert last["broken_images"] == 2 * len(BROKEN)
    found = entries(run)
    check(
        [SkippedImage(**{k: v for k, v in one.items() if k not in ("step", "epoch")}) for one in found],
        open_source(data),
    )
    assert {one["epoch"] for one in found} == {0}
    assert [one["step"] for one in found] == sorted(one["step"] for one in found)
    assert 1 <= found[0]["step"] < found[-1]["step"] <= 16
    printed = capsys.readouterr().err
    assert printed.count("skipped a broken image") == NAMED
    assert printed.count(f"more broken images are named in {run / 'skipped.jsonl'} only") == 1


def test_an_interrupted_run_leaves_the_same_list(tmp_path: Path, settings: Settings, run_pretraining: Train) -> None:
    data = write_parquet(tmp_path / "nasty", rows(mended=False))
    config = {"dataset": data, "epochs": 1, "warmup_epochs": 0, "max_bad_fraction": 0.5, "shuffle_window": 64}
    whole = run_pretraining(settings(**config, output_dir=str(tmp_path / "whole")))
    run = run_pretraining(settings(**config, max_steps=6))
    with (run / "skipped.jsonl").open("a") as file:  # as if it had gone on, and been killed in the middle of a line
        file.write(json.dumps(entries(run)[0] | {"index": 1000, "step": 8}) + '\n{"step": 9, "epo')
    run_pretraining(settings(**config))
    assert (run / "skipped.jsonl").read_text() == (whole / "skipped.jsonl").read_text()


def test_above_the_tolerated_share_the_run_stops_and_names_the_list(
    tmp_path: Path, settings: Settings, run_pretraining: Train
) -> None:
    data = write_parquet(tmp_path / "nasty", rows(mended=False))
    config = settings(dataset=data, max_bad_fraction=0.05, shuffle_window=64)
    with pytest.raises(RuntimeError, match=r"(\d+) of \d+ images .*max_bad_fraction=0.05.*run/skipped.jsonl") as stop:
        run_pretraining(config)
    found = entries(Path(config.output_dir))
    assert len(found) == int(str(stop.value).split()[0]) > 0.05 * 128
    assert {one["index"] for one in found} <= set(BROKEN)


def test_a_run_on_good_data_leaves_no_list(tmp_path: Path, settings: Settings, run_pretraining: Train) -> None:
    run = run_pretraining(settings(dataset=write_files(tmp_path / "good", GOOD[:16]), epochs=1, warmup_epochs=0))
    assert not (run / "skipped.jsonl").exists()


# The list


def skipped(indices: Sequence[int], step: int = 1) -> Iterator[tuple[int, int, SkippedImage]]:
    for index in indices:
        yield step, 0, SkippedImage(index, 0, index, None, f"{index}.png", "ValueError: broken")


def indices_in(path: Path) -> list[int]:
    return [entry["index"] for entry in read_metrics(path)]


def test_an_image_is_listed_once_however_often_it_is_met(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    log = SkippedLog(path, step=0)
    assert len(log.add([*skipped([7, 3], step=2), *skipped([5], step=1), *skipped([5], step=2)])) == 3
    assert log.add([*skipped([3, 5, 7], step=9)]) == []
    assert indices_in(path) == [5, 3, 7]
    resumed = SkippedLog(path, step=2)
    assert resumed.add([*skipped([3, 8], step=12)]) == ["skipped a broken image: image 8 (8.png): ValueError: broken"]
    assert indices_in(path) == [5, 3, 7, 8]


def test_what_was_met_beyond_the_resumed_step_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    SkippedLog(path, step=0).add([*skipped([1], step=4), *skipped([2], step=5)])
    with path.open("a") as file:
        file.write('{"step": 6, "epoch": 0, "ind')
    resumed = SkippedLog(path, step=4)
    assert indices_in(path) == [1]
    resumed.add([*skipped([2], step=5)])
    assert path.read_text().count("\n") == len(path.read_text().splitlines()) == 2
    assert indices_in(path) == [1, 2]
    SkippedLog(path, step=0)
    assert not path.exists()


def test_ten_thousand_broken_images_do_not_flood_the_terminal(tmp_path: Path) -> None:
    log = SkippedLog(tmp_path / "skipped.jsonl", step=0)
    texts = [text for step in range(100) for text in log.add([*skipped(range(100 * step, 100 * step + 100), step)])]
    assert len(texts) == NAMED + 1
    assert len(indices_in(tmp_path / "skipped.jsonl")) == 10_000
    assert SkippedLog(tmp_path / "skipped.jsonl", step=100).add([*skipped([20_000], step=101)]) == []


def test_folders_links_to_nowhere_and_hidden_files_are_no_images(tmp_path: Path) -> None:
    folder = Path(write_files(tmp_path / "pictures", GOOD[:4]))
    for name in ("folder.jpg", "__MACOSX", ".ipynb_checkpoints"):
        (folder / name).mkdir()
        Image.new("RGB", (8, 8)).save(folder / name / "x.txt", "PNG")
    for name in ("__MACOSX/1.png", ".ipynb_checkpoints/1.png", "._1.png"):
        (folder / name).write_bytes(b"no image")
    (folder / "link.jpg").symlink_to(folder / "nowhere.jpg")
    for streaming in (False, True):
        assert open_source(str(folder), streaming=streaming).num_images == 4
