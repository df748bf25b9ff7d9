"""What preparing a dataset gains: the same images in turns, and their bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import encode, picture
from prepared import BROKEN, SOUND, stored, write_split

from training import prepared_cost
from training.benchmark import main, parse
from training.images import decode_rgb
from training.prepared_cost import PreparedSettings, decode_rates


pytestmark = pytest.mark.usefixtures("no_accelerator")


def test_the_same_images_are_measured_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path / "source")
    measured: list[dict[str, Any]] = []
    original: Callable[..., Any] = decode_rates

    def spy(kinds: Any, *arguments: Any) -> Any:
        measured.append(kinds)
        return original(kinds, *arguments)

    monkeypatch.setattr(prepared_cost, "decode_rates", spy)
    output = tmp_path / "new" / "numbers.json"
    flags = ["--part=prepared", f"--dataset={tmp_path / 'source'}", "--short_side=24", "--image_size=16"]
    main(*parse([*flags, "--repetitions=3", f"--output={output}"]))
    (kinds,) = measured
    assert [image["bytes"] for image in kinds["source"]] == [stored(number) for number in SOUND]
    kept = [number for number in SOUND if number % 4 >= 2]
    small = [image["bytes"] for image in kinds["prepared"]]
    assert [content for content in small if min(decode_rgb({"bytes": content}).size) < 24] == [*map(stored, kept)]
    assert sorted({min(decode_rgb({"bytes": content}).size) for content in small}) == [20, 24]
    source, prepared = json.loads(output.read_text())["results"]
    assert (source["images"], prepared["images"]) == (33 - len(BROKEN), 33 - len(BROKEN))
    for entry, images in ((source, kinds["source"]), (prepared, kinds["prepared"])):
        assert entry["bytes"] == sum(len(image["bytes"]) for image in images)
        assert entry["images_per_second"] == sorted(entry["all_images_per_second"])[1] > 0
        assert entry["speed_ratio"] == entry["images_per_second"] / source["images_per_second"]
        assert entry["bytes_ratio"] == entry["bytes"] / source["bytes"]
    assert f"| prepared | {prepared['images_per_second']:.0f} |" in capsys.readouterr().out


def test_kinds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(image: Any) -> Any:
        seen.append(image["path"])
        return decode_rgb(image)

    monkeypatch.setattr(prepared_cost, "decode_rgb", spy)
    kinds = {name: [{"bytes": encode(picture(0)), "path": name}] * 2 for name in "ab"}
    rates = decode_rates(kinds, 8, 0.2, 2)
    assert seen == list("aabbaabb")
    assert {name: len(rate) for name, rate in rates.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("wrong", [{"max_images": 0}, {"repetitions": 0}, {"crop_min_scale": 0}], ids=str)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PreparedSettings(**wrong).validate()
