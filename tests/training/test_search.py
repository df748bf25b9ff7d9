"""A search with pictures and fragments of them, against cosines of the model called directly."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch
from conftest import GARBAGE, encode, picture
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from modeling_micl import MiclForPreTraining, MiclModel, MiclPreTrainedModel
from training import embed, search
from training.embed import EmbedConfig
from training.results import save_model
from training.search import SearchConfig
from training.search_figures import Found, save_neighbours


Write = Callable[..., Path]
BROKEN = {3, 17}
SOUND = [number for number in range(33) if number not in BROKEN]
PATCHES = 16


@pytest.fixture
def folder(
    tmp_path: Path,
    write_shards: Write,
    tiny_model: Callable[..., MiclPreTrainedModel],
    no_accelerator: Callable[[], None],
) -> Path:
    """With data/ of 33 images, two of them broken, a model/, its collection vectors/, and four pictures in asked/."""
    data = write_shards(20, 13, broken=BROKEN)
    save_model(tiny_model(MiclForPreTraining, image_size=16, patch_size=4), tmp_path / "model")
    where = {"dataset": str(data), "model": str(tmp_path / "model"), "output_dir": str(tmp_path / "vectors")}
    embed.main(EmbedConfig(**where, num_workers=0, images_per_part=8))
    (tmp_path / "asked").mkdir()
    for number in (5, 25, 100, 101):
        (tmp_path / "asked" / f"{number}.png").write_bytes(encode(picture(number)))
    return tmp_path


@pytest.fixture
def run_search(
    folder: Path, no_accelerator: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, list[tuple[float, int]]]]:
    """Run the program in this process; gives (cosine, image) of the neighbours in its table, by the query's name."""

    def run(*query: Path, **overrides: Any) -> dict[str, list[tuple[float, int]]]:
        where = {"collection": str(folder / "vectors"), "picture": str(folder / "figures" / "search.png")}
        config = SearchConfig(**(where | {"query": [str(path) for path in query]} | overrides))
        config.validate()
        no_accelerator()
        capsys.readouterr()
        search.main(config)
        found: dict[str, list[tuple[float, int]]] = {}
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("nearest by cosine to "):
                name = line.removeprefix("nearest by cosine to ").split(" (seen")[0]
                found[Path(name).name] = here = []
            elif match := re.fullmatch(r"  \d+\. +(-?[\d.]+)  class (\d), picture-(\d+).png, image (\d+)", line):
                assert match[3] == match[4]
                assert int(match[2]) == int(match[3]) % 4
                here.append((float(match[1]), int(match[4])))
        return found

    return run


@torch.no_grad()
def vectors_of(folder: Path, numbers: list[int], visible: Tensor | None = None) -> Tensor:
    """[CLS] of numbered pictures, or of some of their patches, from the model called directly."""
    model = MiclModel.from_pretrained(folder / "model").eval()
    processor = AutoImageProcessor.from_pretrained(folder / "model")
    pixel_values = processor([picture(number) for number in numbers], return_tensors="pt").pixel_values
    found: Tensor = model(pixel_values, ids_visible=visible).pooler_output
    return found


def assert_nearest(
    found: dict[str, list[tuple[float, int]]], folder: Path, asked: list[int], queries: Tensor, k: int
) -> None:
    cosines = torch.cosine_similarity(queries[:, None], vectors_of(folder, SOUND)[None], dim=2)
    assert found.keys() == {f"{number}.png" for number in asked}
    for number, row in zip(asked, cosines, strict=True):
        best = sorted(row.tolist(), reverse=True)[:k]
        assert [cosine for cosine, _ in found[f"{number}.png"]] == pytest.approx(best, abs=2e-3)
        for cosine, image in found[f"{number}.png"]:
            assert row[SOUND.index(image)] == pytest.approx(cosine, abs=2e-3)


def test_the_nearest_of_all_images_are_found_and_named(folder: Path, run_search: Any) -> None:
    found = run_search(folder / "asked" / "25.png", k=4)
    assert_nearest(found, folder, [25], vectors_of(folder, [25]), k=4)
    assert found["25.png"][0] == (1.0, 25)


def test_several_pictures_and_folders_of_them_can_be_asked_for(folder: Path, run_search: Any) -> None:
    (folder / "asked" / "notes.txt").write_text("no picture")
    found = run_search(folder / "asked", k=2)
    assert list(found) == ["100.png", "101.png", "25.png", "5.png"]
    assert_nearest(found, folder, [100, 101, 25, 5], vectors_of(folder, [100, 101, 25, 5]), k=2)
    assert run_search(folder / "asked" / "5.png", folder / "asked" / "100.png", k=2) == {
        name: found[name] for name in ("5.png", "100.png")
    }


def test_images_of_the_data_can_be_asked_for_by_their_numbers(folder: Path, run_search: Any) -> None:
    found = run_search(Path("25"), Path("5"), k=3)
    expected = run_search(folder / "asked" / "25.png", folder / "asked" / "5.png", k=3)
    assert found == {f"image {name.removesuffix('.png')}": rows for name, rows in expected.items()}


def test_there_are_no_more_neighbours_than_images(folder: Path, run_search: Any) -> None:
    found = run_search(folder / "asked" / "5.png", k=99)
    assert sorted(image for _, image in found["5.png"]) == SOUND


@pytest.mark.parametrize("visible", [0.25, 0.01])
def test_of_a_fragment_only_the_visible_patches_are_seen(visible: float, folder: Path, run_search: Any) -> None:
    asked = [100, 25]
    found = run_search(*(folder / "asked" / f"{number}.png" for number in asked), visible=visible, seed=3)
    orders = [np.random.default_rng((3, place)).permutation(PATCHES) for place in range(2)]
    kept = max(1, round(visible * PATCHES))
    queries = vectors_of(folder, asked, torch.tensor(np.array(orders))[:, None, :kept])
    assert_nearest(found, folder, asked, queries, k=5)


# The picture


def test_the_picture_shows_what_the_model_saw_and_the_images_that_were_found(
    folder: Path, run_search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[Tensor], list[str], list[list[Found]]]] = []
    monkeypatch.setattr(search, "save_neighbours", lambda _, *what: drawn.append(what))
    found = run_search(folder / "asked" / "5.png", folder / "asked" / "100.png", visible=0.25, k=3)
    ((seen, names, neighbours),) = drawn
    assert names == ["5.png", "100.png"]
    for number, image in zip((5, 100), seen, strict=True):
        own = cropped(number)
        gray = (image - 0.92).abs().amax(dim=2) < 1e-4
        assert (~gray).sum() <= 4 * 16
        assert (~gray).sum() > 10
        torch.testing.assert_close(image[~gray], own[~gray])
    for name, row in zip(names, neighbours, strict=True):
        for (cosine, number), each in zip(found[name], row, strict=True):
            assert each.cosine == pytest.approx(cosine, abs=1e-3)
            assert each.name.endswith(f"picture-{number}.png, image {number}")
            torch.testing.assert_close(each.image, cropped(number))


def cropped(number: int) -> Tensor:
    """The central square of a picture, 16 pixels wide."""
    return torch.from_numpy(np.array(picture(number).crop((2, 0, 18, 16)))) / 255


def test_images_are_found_again_also_with_random_access_and_where_they_have_moved(
    folder: Path, run_search: Any, no_accelerator: Callable[[], None]
) -> None:
    expected = run_search(folder / "asked" / "25.png")
    no_accelerator()
    where = {"dataset": str(folder / "data"), "model": str(folder / "model"), "output_dir": str(folder / "others")}
    embed.main(EmbedConfig(**where, num_workers=0, streaming=False))
    assert run_search(folder / "asked" / "25.png", collection=str(folder / "others")) == expected
    (folder / "data").rename(folder / "moved")
    (folder / "model").rename(folder / "moved_model")
    moved = {"dataset": str(folder / "moved"), "model": str(folder / "moved_model")}
    assert run_search(folder / "asked" / "25.png", **moved) == expected


def test_the_file_is_a_picture_with_a_row_for_each_query(folder: Path, run_search: Any) -> None:
    sizes = []
    for asked in (["5.png"], ["5.png", "25.png", "100.png"]):
        run_search(*(folder / "asked" / name for name in asked), k=4)
        with Image.open(folder / "figures" / "search.png") as drawn:
            sizes.append(drawn.size)
            assert len(drawn.convert("RGB").getcolors(maxcolors=1_000_000)) > 100
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] == pytest.approx(3 * sizes[0][1], abs=3)


def test_names_are_no_formulas_and_not_wider_than_their_pictures(tmp_path: Path) -> None:
    image = torch.rand(8, 8, 3)
    save_neighbours(tmp_path / "a.png", [image], ["$x^{.png"], [[Found(image, math.nan, "$" + 99 * "long ")]])
    assert (tmp_path / "a.png").exists()


# Mistakes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"collection": None}, "collection is not set.*--collection"),
        ({"query": []}, "query is not set.*--query"),
        ({"visible": 0.0}, r"visible must lie in \(0, 1\], got 0.0"),
        ({"visible": 1.1}, r"visible must lie in \(0, 1\], got 1.1"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SearchConfig(**({"collection": "vectors", "query": ["a.png"]} | settings)).validate()


def test_what_is_no_picture_is_refused(folder: Path, run_search: Any) -> None:
    (folder / "empty").mkdir()
    for path in (folder / "nothing.png", folder / "empty"):
        with pytest.raises(ValueError, match=f"--query {path} is no picture, and no folder with any"):
            run_search(path)
    with pytest.raises(ValueError, match="--query 33 is no file, and the data have only 33 images"):
        run_search(Path("33"))
    with pytest.raises(ValueError, match="--query image 3 cannot be decoded"):
        run_search(Path("3"))
    (folder / "asked" / "broken.png").write_bytes(GARBAGE)
    with pytest.raises(ValueError, match=r"broken.png cannot be decoded: not in any known image format"):
        run_search(folder / "asked")


def test_another_model_and_other_images_than_the_collections_are_refused(
    folder: Path, run_search: Any, write_shards: Write, tiny_model: Callable[..., MiclPreTrainedModel]
) -> None:
    model = tiny_model(MiclForPreTraining, image_size=16, patch_size=4)
    torch.nn.init.ones_(model.vit.layernorm.bias)
    save_model(model, folder / "other")
    with pytest.raises(ValueError, match="other' is not the one that made the collection .*weights: "):
        run_search(folder / "asked", model=str(folder / "other"))
    other = write_shards(20, 12, folder="fewer")
    with pytest.raises(ValueError, match="--dataset .*fewer': its split 'train' has other files"):
        run_search(folder / "asked", dataset=str(other))


def test_a_folder_that_is_no_whole_collection_is_refused(folder: Path, run_search: Any) -> None:
    with pytest.raises(ValueError, match="asked holds no vectors: make them with training.embed"):
        run_search(folder / "asked", collection=str(folder / "asked"))
    shutil.copy(folder / "vectors" / "part-00000-of-00005.parquet", folder / "asked")
    with pytest.raises(ValueError, match="asked is not complete, 4 of 5 parts are missing"):
        run_search(folder / "asked", collection=str(folder / "asked"))


def test_the_command_prints_a_table_or_what_is_wrong(folder: Path) -> None:
    settings = {"collection": folder / "vectors", "query": [folder / "asked" / "5.png"], "k": 2}
    settings |= {"picture": folder / "search.png"}
    for more, status in ({"visible": 0.5}, 0), ({"dataset": folder / "model"}, 1):
        done = forks.run(forks.command("training.search", **settings, **more), folder / "home")
        assert done.status == status
        if status == 0:
            lines = done.printed.splitlines()
            assert lines[0] == f"nearest by cosine to {folder / 'asked' / '5.png'} (seen: 8 of 16 patches)"
            assert len(lines) == 4
            assert (folder / "search.png").exists()
        else:
            assert "Traceback" not in done.complaints
            assert done.complaints.splitlines()[-1].startswith("training.search: ")
