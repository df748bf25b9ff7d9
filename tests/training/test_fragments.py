"""How often fragments find their images, against ranks worked out from the model called directly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch
from conftest import picture
from torch import Tensor
from transformers import AutoImageProcessor

from modeling_micl import MiclForPreTraining, MiclModel, MiclPreTrainedModel
from training import embed, fragments
from training.embed import EmbedConfig
from training.fragments import FragmentsConfig, ranks
from training.results import save_model


Entry = dict[str, Any]
BROKEN = {3, 17}
SOUND = [number for number in range(33) if number not in BROKEN]
SHARES = [0.1, 0.5, 1.0]


@pytest.fixture
def folder(
    tmp_path: Path,
    write_shards: Callable[..., Path],
    tiny_model: Callable[..., MiclPreTrainedModel],
    no_accelerator: Callable[[], None],
) -> Path:
    """With data/, of which two of 33 images are broken, a model/ and its collection vectors/."""
    data = write_shards(20, 13, broken=BROKEN)
    save_model(tiny_model(MiclForPreTraining, image_size=16, patch_size=4), tmp_path / "model")
    where = {"dataset": str(data), "model": str(tmp_path / "model"), "output_dir": str(tmp_path / "vectors")}
    embed.main(EmbedConfig(**where, num_workers=0, images_per_part=8))
    return tmp_path


@pytest.fixture
def run(folder: Path, no_accelerator: Callable[[], None]) -> Callable[..., list[Entry]]:
    """Run the program in this process; keywords replace single settings. Returns what eval.json then holds."""

    def measure(**overrides: Any) -> list[Entry]:
        few = {"visible_shares": [0.5, 0.1, 1.0, 0.5], "num_workers": 0, "seed": 2}
        config = FragmentsConfig(**({"collection": str(folder / "vectors")} | few | overrides))
        config.validate()
        no_accelerator()
        fragments.main(config)
        file = Path(config.output_dir or folder / "model") / "eval.json"
        entries: list[Entry] = json.loads(file.read_text())["results"]
        return entries

    return measure


@torch.no_grad()
def hits(folder: Path, numbers: list[int], share: float, k: int) -> float:
    """How many of these images are among the k nearest of their own fragments."""
    model = MiclModel.from_pretrained(folder / "model").eval()
    processor = AutoImageProcessor.from_pretrained(folder / "model")
    pixel_values = processor([picture(number) for number in SOUND], return_tensors="pt").pixel_values
    orders = [np.random.default_rng((2, number)).permutation(16)[: round(16 * share)] for number in SOUND]
    whole = model(pixel_values).pooler_output
    parts = model(pixel_values, ids_visible=torch.tensor(np.array(orders))[:, None]).pooler_output
    nearest = torch.cosine_similarity(parts[:, None], whole[None], dim=2).argsort(dim=1, descending=True)[:, :k]
    chosen = [SOUND.index(number) for number in numbers]
    return float(np.mean([place in nearest[place] for place in chosen]))


def values(entries: list[Entry]) -> dict[tuple[float, str], float]:
    return {(entry["visible_share"], entry["metric"]): entry["value"] for entry in entries}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hit_is_the_very_image_that_the_fragment_comes_from(
    workers: int, folder: Path, run: Callable[..., list[Entry]]
) -> None:
    found = values(run(num_workers=workers))
    expected = {(s, f"top-{k} accuracy"): hits(folder, SOUND, s, k) for s in SHARES for k in (1, 5)}
    assert found == pytest.approx(expected)
    assert found[1.0, "top-1 accuracy"] == 1
    assert len(set(found.values())) > 2


def test_some_images_from_all_over_the_collection_are_asked_for(folder: Path, run: Callable[..., list[Entry]]) -> None:
    entries = run(max_queries=10)
    chosen = [SOUND[place * 31 // 10] for place in range(10)]
    expected = {(s, f"top-{k} accuracy"): hits(folder, chosen, s, k) for s in SHARES for k in (1, 5)}
    assert values(entries) == pytest.approx(expected)
    assert {(entry["num_test_images"], entry["num_collection_images"]) for entry in entries} == {(10, 31)}


def test_an_entry_says_what_was_measured(folder: Path, run: Callable[..., list[Entry]]) -> None:
    entries = run()
    assert [entry["visible_share"] for entry in entries] == [0.1, 0.1, 0.5, 0.5, 1.0, 1.0]
    assert [entry["num_visible_patches"] for entry in entries] == [2, 2, 8, 8, 16, 16]
    for entry in entries:
        expected = {
            **{"task": "image-retrieval", "dataset": str(folder / "data"), "split": "train", "max_images": None},
            **{"model": str(folder / "model"), "features": "cls", "seed": 2, "num_test_images": 31},
        }
        assert {name: entry[name] for name in expected} == expected
    assert len(run()) == 6  # measured anew, not added
    assert len(run(seed=3)) == 12


def test_results_can_go_elsewhere(folder: Path, run: Callable[..., list[Entry]]) -> None:
    assert len(run(output_dir=str(folder / "elsewhere"))) == 6
    assert json.loads((folder / "model" / "eval.json").read_text()) == {"results": []}


def test_the_table_holds_every_value(run: Callable[..., list[Entry]], capsys: pytest.CaptureFixture[str]) -> None:
    found = values(run())
    title, *rows = capsys.readouterr().out.splitlines()[-4:]
    assert title == "31 fragments find their image among 31"
    for share, row in zip(SHARES, rows, strict=True):
        one, five = (f"{found[share, f'top-{k} accuracy']:.1%}" for k in (1, 5))
        assert row.split() == [f"{100 * share:g}%", *row.split()[1:5], "top-1", one, "top-5", five]


def test_a_model_that_tells_no_images_apart_finds_none() -> None:
    same = torch.nn.functional.normalize(torch.ones(7, 4), dim=1)
    assert ranks(same, same[:3], torch.arange(3)).tolist() == [7, 7, 7]


def test_ranks_count_from_one() -> None:
    vectors: Tensor = torch.eye(3)
    queries = torch.tensor([[5.0, 1, 0], [5, 1, 0], [5, 1, 0]])
    assert ranks(vectors, queries, torch.tensor([0, 1, 2])).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"collection": None}, "collection is not set"),
        ({"visible_shares": [0.5, 0.0]}, r"visible_shares takes shares in \(0, 1\], got 0.0"),
        ({"visible_shares": [1.5]}, r"visible_shares takes shares in \(0, 1\], got 1.5"),
        ({"max_queries": 0}, "max_queries must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FragmentsConfig(**({"collection": "vectors"} | settings)).validate()


def test_a_model_on_the_hub_has_no_folder_for_results() -> None:
    with pytest.raises(ValueError, match="'somebody/model' is no local folder: say with --output_dir"):
        FragmentsConfig(collection="vectors").results_folder("somebody/model")


@pytest.mark.slow
def test_two_processes_find_what_one_does(folder: Path) -> None:
    found = []
    for processes in (1, 2):
        out = folder / f"{processes} processes"
        settings = {"collection": folder / "vectors", "output_dir": out, "num_workers": 1}
        done = forks.run(forks.command("training.fragments", **settings), folder / "home", processes)
        assert done.status == 0, done.complaints[-3000:]
        assert done.printed.count("fragments find their image") == 1
        found.append(values(json.loads((out / "eval.json").read_text())["results"]))
    assert found[0] == found[1]
