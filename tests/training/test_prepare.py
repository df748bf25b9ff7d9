"""Prepared datasets: what is in them, from any kind of source, and which settings are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hub_client import upload
from hub_server import HubServer
from huggingface_hub import DatasetCard
from PIL import Image
from prepared import BROKEN, MASK, SMALL, SOUND, contents, settings, shard_names, stored, undecoded, write_split
from source_rows import all_rows

from training import shards
from training.config import DataSettings
from training.images import decode_rgb
from training.source import open_source, open_split


Run = Callable[..., Path]


def test_the_datasets_library_reads_the_same_rows_with_smaller_images(run_prepare: Run) -> None:
    out = run_prepare()
    assert shard_names(out) == [f"train-0000{shard}-of-00004.parquet" for shard in range(4)]
    rows = datasets.load_dataset(str(out), split="train")
    assert list(rows.features) == ["caption", "image", "label", "boxes", "views"]
    assert rows.features["image"] == datasets.Image()
    assert rows.features["label"].names == ["cat", "dog", "cow"]
    assert rows.features["views"] == datasets.List(datasets.Image())
    assert rows["caption"][:] == [f"picture {n}" if n % 5 else None for n in SOUND]
    assert rows["label"][:] == [n % 3 if n != 5 else None for n in SOUND]
    assert rows["boxes"][:] == [[[n, 0.5, 1, 2]] * (n % 3) for n in SOUND]
    for number, row in zip(SOUND, rows, strict=True):
        size = (36, 24) if number % 4 < 2 else SMALL
        assert (row["image"].size, row["image"].mode) == (size, "RGB")
        exact = decode_rgb({"bytes": stored(number)}).resize(size, Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(row["image"]).astype(int) - np.asarray(exact)).mean() < 4


def test_small_files_and_all_other_columns_stay_byte_for_byte(run_prepare: Run) -> None:
    rows = undecoded(run_prepare())
    views = rows.cast_column("views", datasets.List(datasets.Image(decode=False)))["views"][:]
    assert views == [[{"bytes": MASK, "path": None}]] * len(SOUND)
    for number, image in zip(SOUND, rows["image"], strict=True):
        assert image["path"] == f"picture-{number}.img"
        assert (image["bytes"] == stored(number)) == (number % 4 >= 2)


def test_training_reads_it_from_any_row_on(run_prepare: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 3)
    out = run_prepare()
    source = open_split(DataSettings(dataset=str(out)), "train")
    assert source.lengths == [7, 8, 7, 9]
    assert source.row_groups == [[3, 2, 2], [3, 3, 2], [2, 3, 2], [3, 3, 3]]
    assert (source.image_column, source.label_column) == ("image", "label")
    rows = all_rows(source)
    assert [row["image"]["path"] for row in rows] == [f"picture-{number}.img" for number in SOUND]
    assert [source.label_of(row) for row in rows] == [n % 3 if n != 5 else -1 for n in SOUND]
    found = [row["image"]["path"] for row in source.read(1, 4, 7)]
    assert found == [f"picture-{number}.img" for number in SOUND[11:14]]


def test_several_splits_go_into_one_folder_at_once_or_later(workplace: Path, run_prepare: Run) -> None:
    for number, split in enumerate(("validation", "test"), 1):
        write_split(workplace / "source", split, lengths=(10,), first=100 * number)
    out = run_prepare(split=["train", "validation"])
    before = contents(out)
    run_prepare(split=["test"], num_shards=2)
    after = contents(out)
    assert {name: after[name] for name in before if name.startswith("data/")}.items() <= before.items()
    for split, first, length in (("validation", 100, 10), ("test", 200, 10)):
        captions = datasets.load_dataset(str(out), split=split)["caption"][:]
        assert [c for c in captions if c] == [f"picture {n}" for n in range(first, first + length) if n % 5]
    splits = json.loads((out / "prepare.json").read_text())["splits"]
    assert {split: entry["num_shards"] for split, entry in splits.items()} == {"test": 2, "train": 4, "validation": 4}
    files = DatasetCard.load(out / "README.md").data.configs[0]["data_files"]
    assert sorted(each["split"] for each in files) == ["test", "train", "validation"]


@pytest.mark.parametrize("dataset", ["write_image_folder", "write_tars", "streamed_folder", "one_file"])
def test_every_kind_of_dataset_can_be_prepared(
    dataset: str, workplace: Path, run_prepare: Run, request: pytest.FixtureRequest
) -> None:
    options: dict[str, Any] = {"num_shards": 2}
    if dataset == "one_file":
        options["dataset"] = str(workplace / "source" / "data" / "train-00000-of-00002.parquet")
    elif dataset == "write_tars":
        options |= {"dataset": str(request.getfixturevalue(dataset)(5, 4)), "label_column": "cls"}
    else:
        options |= {"dataset": str(request.getfixturevalue("write_image_folder")(9))}
        options |= {"streaming": True} if dataset == "streamed_folder" else {}
    where = {name: options.get(name) for name in ("dataset", "label_column", "streaming")}
    source = open_source(**where)
    broken = {f"picture-{number}.img" for number in BROKEN}
    expected = [row for row in all_rows(source) if Path(source.image_of(row)["path"]).name not in broken]
    out = run_prepare(**options)
    prepared = open_source(str(out), label_column=options.get("label_column"))
    assert prepared.class_names == source.class_names
    rows = all_rows(prepared)
    assert [prepared.label_of(row) for row in rows] == [source.label_of(row) for row in expected]
    names = [Path(source.image_of(row)["path"]).name for row in expected]
    assert [prepared.image_of(row)["path"] for row in rows] == names
    assert "__url__" not in prepared.columns
    assert not [name for name, content in contents(out).items() if str(workplace).encode() in content]


def test_a_stream_from_the_hub_gives_what_the_local_folder_gives_and_the_result_can_be_uploaded(
    hub: HubServer, workplace: Path, run_prepare: Run
) -> None:
    upload(hub, workplace / "source", "datasets/me/pictures", private=True)
    local = run_prepare()
    out = run_prepare(dataset="me/pictures", output_dir=str(workplace / "streamed"), num_workers=1)
    assert undecoded(out).to_list() == undecoded(local).to_list()
    assert json.loads((out / "prepare.json").read_text())["splits"]["train"]["dataset"] == "me/pictures"
    upload(hub, out, "datasets/me/small")
    again = open_source("me/small")
    assert [row["image"] for row in all_rows(again)] == undecoded(local)["image"][:]


def test_a_shard_of_nothing_but_broken_images_can_be_read_too(run_prepare: Run, workplace: Path) -> None:
    write_split(workplace / "few", lengths=(4,))
    out = run_prepare(dataset=str(workplace / "few"))
    assert len(shard_names(out)) == 4
    for streaming in (True, False):
        rows = datasets.load_dataset(str(out), split="train", streaming=streaming).select_columns("caption")
        assert [row["caption"] for row in rows] == [None, "picture 1", "picture 2"]


def test_a_part_of_the_images_for_a_quick_look(run_prepare: Run) -> None:
    rows = undecoded(run_prepare(max_images=8))
    assert [row["image"]["path"] for row in rows] == [f"picture-{number}.img" for number in (0, 1, 2, 20, 21, 22, 23)]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"output_dir": None}, "output_dir is not set.*--output_dir"),
        ({"eval_split": "test"}, "eval_split='test' is not for this program.*--split"),
        ({"short_side": 0}, "short_side must be at least 1, got 0"),
        ({"quality": 0}, "quality must be at least 1, got 0"),
        ({"quality": 101}, "quality must be at most 100, got 101"),
        ({"num_shards": 0}, "num_shards must be at least 1, got 0"),
        ({"split": []}, "split takes one name or several different ones"),
        ({"split": ["train", "train"]}, "split takes one name or several different ones"),
        ({"split": ["train[:10%]"]}, "split='train\\[:10%\\]' is no name of a whole split: use --max_images"),
        ({"output_dir": "{workplace}/source/small"}, "lies in dataset=.* choose another --output_dir"),
        ({"output_dir": "{workplace}/source/data/train-00000-of-00002.parquet"}, "is a file: name a folder"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], words: str, workplace: Path) -> None:
    if isinstance(wrong.get("output_dir"), str):
        wrong = {"output_dir": wrong["output_dir"].format(workplace=workplace)}
    with pytest.raises(ValueError, match=words):
        settings(workplace, **wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"num_shards": 34}, "more than the 33 images"), ({"split": ["train", "tset"]}, "has no split 'tset'")],
    ids=str,
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_written(
    wrong: dict[str, Any], words: str, workplace: Path, run_prepare: Run
) -> None:
    with pytest.raises(ValueError, match=words):
        run_prepare(**wrong)
    assert not (workplace / "out").exists()
