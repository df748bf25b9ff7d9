"""What a prepared dataset says of itself."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prepared import BROKEN, SOUND, stored, undecoded

from training.images import central_crop, decode_rgb
from training.source import open_source


Run = Callable[..., Path]


def test_the_record_counts_and_measures(workplace: Path, run_prepare: Run) -> None:
    out = run_prepare(quality=50)
    record = json.loads((out / "prepare.json").read_text())
    entry = record["splits"]["train"]
    before = {number: len(stored(number)) for number in SOUND}
    rows = undecoded(out)
    expected = {
        **{"dataset": "source", "split": "train", "fingerprint": open_source(str(workplace / "source")).fingerprint},
        **{"num_images": 33, "images_in": 33, "images_out": 31, "skipped": 2, "num_shards": 4, "max_images": None},
        **{"kept": sum(n % 4 >= 2 for n in SOUND), "resized": sum(n % 4 < 2 for n in SOUND)},
        **{"short_side": 24, "quality": 50, "chroma": "4:4:4", "bytes_before": sum(before.values())},
        **{"bytes_after": sum(len(image["bytes"]) for image in rows["image"])},
        **{"bytes_of_shards": sum(file.stat().st_size for file in (out / "data").iterdir())},
    }
    assert {name: entry[name] for name in expected} == expected
    assert "evaluation numbers may differ" in record["note"]
    assert {"python", "datasets", "commit"} <= record["versions"].keys()
    crop, rng = central_crop((224, 224)), np.random.default_rng(0)
    differences = [
        np.asarray(crop(decode_rgb({"bytes": stored(number)}), rng)) - np.asarray(crop(decode_rgb(image), rng)) * 1.0
        for number, image in zip(SOUND, rows["image"], strict=True)
        if number % 4 < 2
    ]
    found = entry["pixel_difference"]
    assert found["images"] == len(differences)
    assert found["mean_absolute"] == pytest.approx(np.abs(differences).mean(), abs=1e-3)
    assert found["psnr_db"] == pytest.approx(10 * math.log10(255**2 / np.square(differences).mean()), abs=0.01)


def test_broken_images_are_listed_as_in_training(run_prepare: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_prepare()
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert listed == [
        {
            **{"split": "train", "index": number, "shard": 0, "row": number, "name": f"picture-{number}.img"},
            **{"file": "train-00000-of-00002.parquet", "reason": "ValueError: not in any known image format"},
        }
        for number in sorted(BROKEN)
    ]
    printed = capsys.readouterr().out
    assert "train: 31 of 33 images in 4 shards, 15 kept byte for byte, 16 resized" in printed
    assert f"2 broken images have no row: {out / 'skipped.jsonl'}" in printed


def test_where_nothing_is_changed_nothing_is_said_to_be(run_prepare: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_prepare(short_side=40)
    record = json.loads((out / "prepare.json").read_text())
    assert "No image was changed" in record["note"]
    assert record["splits"]["train"]["pixel_difference"] is None
    assert "re-encoded" not in capsys.readouterr().out
    assert [image["bytes"] for image in undecoded(out)["image"]] == [stored(number) for number in SOUND]
