"""Labels: what is wrong with them is said before anything is trained, and few-shot parts are fair and repeatable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from source_rows import all_rows

from training import labels as labels_module
from training.labels import check_labels, class_names, few_shot, stored_labels
from training.source import open_source


Write = Callable[..., Path]
CLASSES = datasets.ClassLabel(names=["cat", "dog", "owl"])


@pytest.fixture
def write_labels(tmp_path: Path, write_shards: Write) -> Callable[..., str]:
    """Write Parquet shards with these labels, one list for each, of this type."""

    def write(*shards: list[Any], kind: Any = CLASSES, split: str = "train") -> str:
        folder = tmp_path / "labelled" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        for number, labels in enumerate(shards):
            columns = {"image": [{"bytes": b"", "path": None}] * len(labels), "label": labels}
            rows = datasets.Dataset.from_dict(columns, features=features)
            rows.to_parquet(folder / f"{split}-{number:05d}-of-{len(shards):05d}.parquet")
        return str(tmp_path / "labelled")

    return write


# Names of the classes


@pytest.mark.parametrize("streaming", [True, False])
def test_the_classes_of_good_labels_are_named(streaming: bool, write_labels: Callable[..., str]) -> None:
    source = open_source(write_labels([0, 2, 1], [2, 2]), streaming=streaming)
    assert class_names(source) == ["cat", "dog", "owl"]


def test_folders_are_classes(write_image_folder: Write) -> None:
    assert class_names(open_source(str(write_image_folder(4)))) == ["even", "odd"]


def test_data_without_a_label_column_is_refused(tmp_path: Path) -> None:
    columns = {"image": [{"bytes": b"", "path": None}], "caption": ["a cat"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"split 'train' has no label column.*--label_column.*sub-folder per class"):
        class_names(open_source(str(tmp_path)))


def test_integers_without_names_are_refused_with_the_cure(write_labels: Callable[..., str]) -> None:
    folder = write_labels([0, 1], kind=datasets.Value("int64"))
    with pytest.raises(ValueError, match="no class names: cast it") as refused:
        class_names(open_source(folder, label_column="label"))
    assert "--label_column 'label' of the split 'train' is Value('int64')" in str(refused.value)
    assert "dataset.cast_column('label', datasets.ClassLabel(names=[...]))" in str(refused.value)


STREAMING = pytest.mark.parametrize("streaming", [pytest.param(True, id="stream"), pytest.param(False, id="random")])


@STREAMING
@pytest.mark.parametrize("none", [-1, None])
def test_a_split_without_any_label_is_called_unlabelled(
    none: int | None, streaming: bool, write_labels: Callable[..., str]
) -> None:
    source = open_source(write_labels([none] * 3, [none]), streaming=streaming)
    with pytest.raises(ValueError, match="The split 'train' is unlabelled: choose another one"):
        class_names(source)


@STREAMING
@pytest.mark.parametrize("none", [-1, None])
def test_a_few_missing_labels_are_counted(none: int | None, streaming: bool, write_labels: Callable[..., str]) -> None:
    source = open_source(write_labels([0, 1, 2], [2, none, 0, none]), streaming=streaming)
    with pytest.raises(ValueError, match=r"split 'train' has labels outside 0 ≤ label < 3, as -1 \(2 of 7"):
        class_names(source)


@pytest.mark.parametrize("wrong", [3, 17, -2])
def test_labels_out_of_range_are_named_and_counted(wrong: int) -> None:
    for labels in (np.array([0, 2, wrong, 1]), torch.tensor([0, 2, wrong, 1])):
        with pytest.raises(ValueError, match=rf"split 'test' has labels outside 0 ≤ label < 3, as {wrong} \(1 of 4"):
            check_labels(labels, 3, "test")
    check_labels(np.array([0, 1, 2]), 3, "test")
    check_labels(np.array([], dtype=np.int64), 3, "test")


@STREAMING
def test_a_label_beyond_the_class_names_in_the_last_shard_is_found(
    streaming: bool, write_labels: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in files whose schema was edited: `datasets` itself does not look."""
    source = open_source(write_labels([0, 1], [2, 2]), streaming=streaming)
    source.class_names = ["cat", "dog"]
    with pytest.raises(ValueError, match=r"labels outside 0 ≤ label < 2, as 2 \(2 of 4"):
        class_names(source)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (["cat", "owl", "dog"], r"\['cat', 'dog', 'owl'\] and \['cat', 'owl', 'dog'\] are the first of 3 and 3"),
        (["cat", "dog"], r"\['cat', 'dog', 'owl'\] and \['cat', 'dog'\] are the first of 3 and 2"),
    ],
)
def test_splits_with_other_classes_are_refused(
    others: list[str], words: str, write_labels: Callable[..., str]
) -> None:
    """`datasets` reads all splits with the names of the first: only the files tell."""
    write_labels([0, 1, 1], kind=datasets.ClassLabel(names=others), split="test")
    folder = write_labels([0, 2, 1])
    train, test = (open_source(folder, split) for split in ("train", "test"))
    with pytest.raises(ValueError, match=rf"'train' and 'test' have different classes, or in another order: {words}"):
        class_names(train, test)


def test_splits_with_the_same_classes_are_one_dataset(write_labels: Callable[..., str]) -> None:
    write_labels([0, 1, 1], split="test")
    folder = write_labels([0, 2, 1])
    assert class_names(*(open_source(folder, split) for split in ("train", "test"))) == CLASSES.names
    broken = open_source(write_labels([-1, -1], split="other"), "other")
    with pytest.raises(ValueError, match="The split 'other' is unlabelled"):
        class_names(open_source(folder), broken)


# What is stored


SHARDS = ([0, 1, 2], [], [2, None], [1, -1, 1, 0])
STORED = [0, 1, 2, 2, -1, 1, -1, 1, 0]


@STREAMING
def test_all_labels_are_read_in_the_order_of_the_images(streaming: bool, write_labels: Callable[..., str]) -> None:
    source = open_source(write_labels(*SHARDS), streaming=streaming)
    assert stored_labels(source).tolist() == STORED


@STREAMING
@pytest.mark.parametrize("max_images", [1, 3, 4, 7, 100])
def test_labels_are_those_of_the_images_in_use(
    max_images: int, streaming: bool, write_labels: Callable[..., str]
) -> None:
    source = open_source(write_labels(*SHARDS), streaming=streaming, max_images=max_images)
    rows = all_rows(source)
    assert len(rows) == min(max_images, len(STORED))
    assert stored_labels(source).tolist() == [source.label_of(row) for row in rows]


def test_labels_of_parquet_files_are_read_without_the_images(
    write_labels: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, asked = open_source(write_labels(*SHARDS)), []
    read = labels_module.pq.read_table

    def spy(file: Any, columns: list[str]) -> Any:
        asked.append(columns)
        return read(file, columns=columns)

    monkeypatch.setattr(labels_module.pq, "read_table", spy)
    stored_labels(source)
    assert asked == [["label"]] * 4


@STREAMING
def test_labels_may_be_plain_integers_in_another_column(streaming: bool, tmp_path: Path) -> None:
    columns = {"image": [{"bytes": b"", "path": None}] * 3, "label": [0, 0, 0], "breed": [7, None, 300]}
    features = {"image": datasets.Image(), "label": CLASSES, "breed": datasets.Value("int32")}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(tmp_path / "train.parquet")
    source = open_source(str(tmp_path), label_column="breed", streaming=streaming)
    assert stored_labels(source).tolist() == [7, -1, 300]


def test_of_other_streams_the_beginning_is_read(write_tars: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write_tars(5, 3)), label_column="cls")
    assert stored_labels(source).tolist() == [0, 1, 0, 1, 0]
    monkeypatch.setattr(labels_module, "CHECKED_ROWS", 2)
    assert stored_labels(source).tolist() == [0, 1]


def test_streamed_folders_of_images_are_read_too(write_image_folder: Write) -> None:
    source = open_source(str(write_image_folder(7)), streaming=True)
    assert class_names(source) == ["even", "odd"]


# Few-shot parts


LABELS = torch.from_numpy(np.random.default_rng(0).permutation([0] * 400 + [1] * 50 + [3] * 30 + [7] * 1))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 1.0])
def test_every_class_gives_its_share_and_at_least_one_image(share: float) -> None:
    chosen = few_shot(LABELS, share, seed=0)
    counts = {label: int((LABELS[chosen] == label).sum()) for label in (0, 1, 3, 7)}
    assert counts == {label: max(1, round(share * total)) for label, total in ((0, 400), (1, 50), (3, 30), (7, 1))}
    assert len(chosen) == sum(counts.values())
    assert chosen.tolist() == sorted(set(chosen.tolist()))


def test_a_seed_always_chooses_the_same_and_another_one_others() -> None:
    first, again, other = (few_shot(LABELS, 0.1, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    assert torch.equal(few_shot(LABELS, 0.1, 0), first)


def test_images_are_chosen_from_all_over_a_class() -> None:
    chosen = torch.cat([few_shot(torch.zeros(1000), 0.1, seed) for seed in range(20)])
    assert abs(chosen.float().mean() - 500) < 40
    assert len(set(chosen.tolist())) > 700
