"""Which columns and splits of a dataset are used, and clear words where there is none."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from source_rows import all_rows

from training.config import DataSettings
from training.source import available_splits, evaluation_split, open_source, open_split


Write = Callable[..., Path]

IMAGES = ([{"bytes": b"a", "path": None}, {"bytes": b"b", "path": None}], datasets.Image())
CLASSES = ([1, 0], datasets.ClassLabel(names=["cat", "dog"]))


@pytest.mark.parametrize(
    ("splits", "asked", "found"),
    [
        (("train", "test", "validation"), None, "validation"),
        (("train", "test"), None, "test"),
        (("train", "test", "validation"), "test", "test"),
        (("train", "other"), None, None),
        (("train", "other"), "other", "other"),
    ],
)
def test_the_evaluation_split_is_found_or_asked_for(
    splits: tuple[str, ...], asked: str | None, found: str | None, write_shards: Write
) -> None:
    for split in splits:
        folder = write_shards(2, split=split)
    assert evaluation_split(DataSettings(dataset=str(folder), eval_split=asked)) == found


def test_a_split_is_opened_as_the_settings_say(write_columns: Callable[..., str]) -> None:
    file = write_columns(left=IMAGES, right=IMAGES, animal=CLASSES, breed=CLASSES)
    settings = DataSettings(dataset=file, streaming=False, image_column="right", label_column="breed")
    source = open_split(settings, "train", max_images=1)
    assert (source.image_column, source.label_column, source.lengths) == ("right", "breed", [1])
    assert source.random_access
    assert open_split(settings, "train").num_images == 2


def test_one_of_several_image_columns_must_be_named(write_columns: Callable[..., str]) -> None:
    file = write_columns(left=IMAGES, right=IMAGES)
    with pytest.raises(ValueError, match=r"several image columns \['left', 'right'\].*--image_column"):
        open_source(file)
    source = open_source(file, image_column="right")
    assert source.image_of(all_rows(source)[0])["bytes"] == b"a"


def test_data_without_images_is_refused(write_columns: Callable[..., str]) -> None:
    file = write_columns(text=(["a", "b"], datasets.Value("string")))
    with pytest.raises(ValueError, match=r"no image column among \['text'\].*--image_column"):
        open_source(file)
    with pytest.raises(ValueError, match=r"--image_column 'picture' does not exist.*text"):
        open_source(file, image_column="picture")


@pytest.mark.parametrize("streaming", [True, False])
def test_bytes_of_images_may_be_a_plain_column(streaming: bool, write_columns: Callable[..., str]) -> None:
    file = write_columns(picture=([b"a", b"b"], datasets.Value("binary")))
    source = open_source(file, image_column="picture", streaming=streaming)
    assert [source.image_of(row)["bytes"] for row in all_rows(source)] == [b"a", b"b"]


def test_the_only_class_label_is_the_label(write_columns: Callable[..., str]) -> None:
    source = open_source(write_columns(image=IMAGES, animal=CLASSES, count=([3, 4], datasets.Value("int64"))))
    assert (source.label_column, source.class_names) == ("animal", ["cat", "dog"])
    assert [source.label_of(row) for row in all_rows(source)] == [1, 0]


def test_integers_are_labels_when_named(write_columns: Callable[..., str]) -> None:
    file = write_columns(image=IMAGES, count=([3, None], datasets.Value("int32")))
    assert open_source(file).label_column is None
    assert [open_source(file).label_of(row) for row in all_rows(open_source(file))] == [-1, -1]
    source = open_source(file, label_column="count")
    assert [source.label_of(row) for row in all_rows(source)] == [3, -1]
    assert source.class_names is None


def test_of_several_class_labels_none_is_guessed(write_columns: Callable[..., str]) -> None:
    file = write_columns(image=IMAGES, animal=CLASSES, breed=CLASSES)
    assert open_source(file).label_column is None
    assert open_source(file, label_column="breed").label_column == "breed"


@pytest.mark.parametrize("name", ["caption", "weight", "nothing"])
def test_a_label_column_must_hold_integers(name: str, write_columns: Callable[..., str]) -> None:
    columns = {"caption": (["a", "b"], datasets.Value("string")), "weight": ([1.0, 2.0], datasets.Value("float32"))}
    file = write_columns(image=IMAGES, **columns)
    with pytest.raises(ValueError, match=rf"--label_column '{name}' must hold integers.*caption"):
        open_source(file, label_column=name)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_wrong_split_names_those_there_are(streaming: bool, write_shards: Write) -> None:
    write_shards(5)
    folder = str(write_shards(3, split="test"))
    assert available_splits(folder) == ["train", "test"]
    assert open_source(folder, split="test", streaming=streaming).num_images == 3
    with pytest.raises(ValueError, match=r"no split 'validation'.*train.*test"):
        open_source(folder, split="validation", streaming=streaming)


def test_a_dataset_without_rows_is_refused(write_shards: Write) -> None:
    with pytest.raises(ValueError, match="is empty"):
        open_source(str(write_shards(0)))


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n")
    for dataset in (tmp_path / "empty", tmp_path / "table.csv"):
        with pytest.raises(ValueError, match=str(dataset)):
            open_source(str(dataset))


def test_a_folder_that_does_not_exist_is_refused_without_asking_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        open_source(str(tmp_path / "nowhere"))
