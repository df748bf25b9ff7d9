"""Collections of vectors: what is in them, and that interruptions, workers and processes leave no trace."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import encode, picture, renormalize
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from modeling_micl import MiclForImageClassification, MiclForPreTraining, MiclModel, MiclPreTrainedModel
from training import data as data_module
from training import embed
from training.collection import read_collection
from training.embed import EmbedConfig
from training.results import save_model


Write = Callable[..., Path]
Run = Callable[..., Path]
BROKEN = {3, 17}


@pytest.fixture
def folder(tmp_path: Path, write_shards: Write, tiny_model: Callable[..., MiclPreTrainedModel]) -> Path:
    """With data/, 33 images of which two are broken, and a pre-trained encoder in model/."""
    write_shards(20, 13, broken=BROKEN)
    save_model(tiny_model(MiclForPreTraining, image_size=16, patch_size=4), tmp_path / "model")
    return tmp_path


@pytest.fixture
def run_embed(folder: Path, no_accelerator: Callable[[], None]) -> Run:
    """Run the program in this process; keywords replace single settings. Returns the collection's folder."""

    def run(**overrides: Any) -> Path:
        where = {"dataset": str(folder / "data"), "model": str(folder / "model"), "output_dir": str(folder / "out")}
        few = {"num_workers": 0, "images_per_part": 8, "per_device_batch_size": 3}
        config = EmbedConfig(**(where | few | overrides))
        config.validate()
        no_accelerator()
        embed.main(config)
        return Path(str(config.output_dir))

    return run


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The images that were decoded."""
    images: list[bytes] = []
    original = data_module.decode_rgb

    def spy(stored: Any) -> Image.Image:
        images.append(stored["bytes"])
        return original(stored)

    monkeypatch.setattr(data_module, "decode_rgb", spy)
    return images


@torch.no_grad()
def by_transformers(folder: Path, numbers: list[int], pooling: str = "cls") -> Tensor:
    """Vectors of numbered pictures, as anybody else would get them."""
    model = MiclModel.from_pretrained(folder / "model").eval()
    processor = AutoImageProcessor.from_pretrained(folder / "model")
    images = [Image.open(io.BytesIO(encode(picture(number)))) for number in numbers]
    tokens = model(processor(images, return_tensors="pt").pixel_values).last_hidden_state
    return tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(dim=1)


def rows_of(folder: Path) -> dict[str, list[Any]]:
    """All columns of a collection, read by pyarrow alone."""
    files = sorted(folder.glob("*.parquet"))
    columns: dict[str, list[Any]] = pa.concat_tables([pq.read_table(file) for file in files]).to_pydict()
    return columns


def vectors_of(folder: Path) -> Tensor:
    return torch.tensor(rows_of(folder)["vector"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def about(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(pq.read_schema(next(folder.glob("part-00000-*"))).metadata[b"micl"])
    return facts


SOUND = [number for number in range(33) if number not in BROKEN]


# What is written


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("own_processor", [False, True])
def test_a_row_is_an_image_with_its_number_name_label_and_the_vector_that_transformers_gives(
    pooling: str, own_processor: bool, folder: Path, run_embed: Run
) -> None:
    if own_processor:
        renormalize(folder / "model")
    out = run_embed(features=pooling)
    rows = rows_of(out)
    assert rows["index"] == SOUND
    assert rows["path"] == [f"picture-{number}.png" for number in SOUND]
    assert rows["label"] == [number % 4 for number in SOUND]
    torch.testing.assert_close(vectors_of(out), by_transformers(folder, SOUND, pooling), rtol=1e-4, atol=2e-3)
    assert sorted(path.name for path in out.iterdir()) == [f"part-0000{n}-of-00005.parquet" for n in range(5)]
    assert pq.read_schema(out / "part-00000-of-00005.parquet").field("vector").type == pa.list_(pa.float32(), 32)


def test_the_metadata_says_what_the_vectors_are(folder: Path, run_embed: Run) -> None:
    facts = about(run_embed(features="mean", max_images=30))
    expected = {
        **{"model": str(folder / "model"), "features": "mean", "image_size": [16, 16], "mixed_precision": "no"},
        **{"dataset": str(folder / "data"), "split": "train", "max_images": 30, "images_per_part": 8},
    }
    assert {name: facts[name] for name in expected} == expected
    assert facts["normalization"]["mean"] == [0.485, 0.456, 0.406]
    assert {"python", "torch", "transformers", "datasets"} <= facts["versions"].keys()
    assert len(facts["weights"]) == 64


@pytest.mark.parametrize("streaming", [True, False])
def test_the_datasets_library_reads_it_with_class_names(streaming: bool, run_embed: Run) -> None:
    out = run_embed()
    files = [str(path) for path in sorted(out.glob("*.parquet"))]
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
    assert rows.features["label"].names == [f"class {label}" for label in range(4)]
    assert rows.features["vector"].length == 32
    assert [row["index"] for row in rows] == SOUND


@pytest.mark.parametrize("streaming", [True, False])
def test_a_part_of_nothing_but_broken_images_can_be_read_too(
    streaming: bool, write_shards: Write, run_embed: Run
) -> None:
    write_shards(20, 13, broken=range(8, 16))
    out = run_embed()
    files = [str(path) for path in sorted(out.glob("*.parquet"))]
    assert len(files) == 5
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
    assert [row["index"] for row in rows] == [*range(8), *range(16, 33)]
    assert read_collection(out).index.tolist() == [*range(8), *range(16, 33)]


def test_broken_images_are_counted_and_named_also_when_another_run_has_met_them(
    run_embed: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        out = run_embed()
        printed = capsys.readouterr().out
        assert f"31 vectors of 32 numbers in {out}" in printed
        assert "2 broken images have no row" in printed
        for number in BROKEN:
            assert f"image {number} (picture-{number}.png): ValueError: not in any known image format" in printed


def test_images_without_labels_have_no_label_column(folder: Path, run_embed: Run) -> None:
    for file in (folder / "data").rglob("*.parquet"):
        datasets.Dataset.from_parquet(str(file)).remove_columns("label").to_parquet(file)
    assert rows_of(run_embed()).keys() == {"index", "path", "vector"}


def test_an_unlabelled_image_among_labelled_ones_has_an_empty_label(folder: Path, run_embed: Run) -> None:
    for file in (folder / "data").rglob("*.parquet"):
        datasets.Dataset.from_parquet(str(file)).map(lambda row, n: {"label": None if n == 2 else 1}, True).to_parquet(
            file
        )
    labels = dict(zip(*(rows_of(run_embed())[name] for name in ("index", "label")), strict=True))
    assert [number for number, label in labels.items() if label is None] == [2, 22]


def test_images_of_a_folder_keep_their_paths(
    write_image_folder: Callable[[int], Path], folder: Path, run_embed: Run
) -> None:
    rows = rows_of(run_embed(dataset=str(write_image_folder(9))))
    assert [Path(path).name for path in rows["path"]] == [f"{n:03d}.png" for n in (0, 2, 4, 6, 8, 1, 3, 5, 7)]


def test_half_precision_takes_half_the_space(run_embed: Run, folder: Path) -> None:
    whole = read_collection(run_embed()).vectors
    out = run_embed(vector_type="float16", output_dir=str(folder / "half"))
    assert pq.read_schema(out / "part-00000-of-00005.parquet").field("vector").type == pa.list_(pa.float16(), 32)
    assert torch.equal(read_collection(out).vectors, whole.half().float())


def test_a_classifier_gives_what_its_head_sees(
    folder: Path, run_embed: Run, tiny_model: Callable[..., MiclPreTrainedModel]
) -> None:
    model = tiny_model(MiclForImageClassification, image_size=16, patch_size=4, num_labels=3)
    save_model(model, folder / "classifier")
    found = vectors_of(run_embed(model=str(folder / "classifier")))
    assert found.shape == (31, 32)


def test_a_part_of_the_images_are_the_first_of_each_shard_or_evenly_spaced_ones(folder: Path, run_embed: Run) -> None:
    assert rows_of(run_embed(max_images=16, output_dir=str(folder / "1")))["index"] == [0, 1, 2, 4, 5, 6, 7, 8] + list(
        range(20, 27)
    )
    spaced = rows_of(run_embed(max_images=16, streaming=False, output_dir=str(folder / "2")))["index"]
    assert spaced == [n * 33 // 16 for n in range(16) if n * 33 // 16 not in BROKEN]


@pytest.mark.parametrize("changes", [{"num_workers": 2}, {"num_workers": 7}, {"streaming": False}], ids=str)
def test_workers_and_random_access_change_nothing(changes: dict[str, Any], folder: Path, run_embed: Run) -> None:
    found, expected = rows_of(run_embed(**changes, output_dir=str(folder / "other"))), rows_of(run_embed())
    assert found["index"] == SOUND
    assert found == expected


# Interrupted and started again


def test_what_is_there_already_is_not_decoded_again(run_embed: Run, decoded: list[bytes]) -> None:
    out = run_embed()
    whole = contents(out)
    assert len(decoded) == 33
    run_embed()
    assert len(decoded) == 33
    for part, images in (("00001", 8), ("00004", 1)):
        decoded.clear()
        (out / f"part-{part}-of-00005.parquet").unlink()
        run_embed()
        assert len(decoded) == images
        assert contents(out) == whole


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(
    folder: Path, run_embed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(run_embed(output_dir=str(folder / "whole")))
    replace, times = Path.replace, iter(range(100))

    def die(self: Path, target: Path) -> Path:
        if next(times) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            run_embed()
    names = {path.name for path in (folder / "out").glob("part-*")}
    assert names == {"part-00000-of-00005.parquet", "part-00001-of-00005.parquet"}
    with pytest.raises(ValueError, match="not complete, 3 of 5 parts are missing"):
        read_collection(folder / "out")
    assert contents(run_embed()) == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": "mean"}, "features: 'cls' → 'mean'"),
        ({"max_images": 32}, "max_images: None → 32"),
        ({"mixed_precision": "bf16"}, "mixed_precision: 'no' → 'bf16'"),
        ({"vector_type": "float16"}, "vector_type: 'float32' → 'float16'"),
        ({"images_per_part": 9}, "images_per_part: 8 → 9"),
        ({"streaming": False}, "streaming: True → False"),
        ({"split": "test"}, "split: 'train' → 'test'"),
    ],
    ids=str,
)
def test_other_settings_are_refused_by_name_before_anything_is_decoded(
    change: dict[str, Any], words: str, write_shards: Write, run_embed: Run, decoded: list[bytes]
) -> None:
    write_shards(4, split="test")
    out = run_embed()
    before, number = contents(out), len(decoded)
    with pytest.raises(ValueError, match=f"was made otherwise .*{words}.* choose another --output_dir"):
        run_embed(**change)
    assert contents(out) == before
    assert len(decoded) == number


def test_other_weights_normalisation_or_images_are_refused_but_not_other_names(
    folder: Path, write_shards: Write, tiny_model: Callable[..., MiclPreTrainedModel], run_embed: Run
) -> None:
    before = contents(run_embed())
    shutil.copytree(folder / "model", folder / "copy")
    assert contents(run_embed(model=str(folder / "copy"))) == before
    renormalize(folder / "copy")
    with pytest.raises(ValueError, match="normalization: .*0.485.* → .*0.5"):
        run_embed(model=str(folder / "copy"))
    model = tiny_model(MiclForPreTraining, image_size=16, patch_size=4)
    torch.nn.init.ones_(model.vit.layernorm.bias)
    save_model(model, folder / "copy")
    with pytest.raises(ValueError, match="weights: "):
        run_embed(model=str(folder / "copy"))
    write_shards(20, 13, broken={4})  # files of the same names and lengths
    with pytest.raises(ValueError, match="version: "):
        run_embed()


def test_a_damaged_part_is_named(run_embed: Run) -> None:
    out = run_embed()
    (out / "part-00002-of-00005.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="part-00002-of-00005.parquet cannot be read .*: delete it"):
        run_embed()
    datasets.Dataset.from_dict({"a": [1]}).to_parquet(out / "part-00002-of-00005.parquet")
    with pytest.raises(ValueError, match="part-00002-of-00005.parquet is not from training.embed"):
        run_embed()
