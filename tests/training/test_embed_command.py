"""The command that embeds, killed and on two processes."""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pyarrow.parquet as pq
import pytest
import test_embed
import torch

from training.embed import EmbedConfig


Write = Callable[..., Path]
BROKEN = {3, 17}


folder, contents = test_embed.folder, test_embed.contents


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"output_dir": None}, "output_dir is not set.*--output_dir"),
        ({"eval_split": "test"}, "eval_split='test' is not for this program.*--split"),
        ({"images_per_part": 0}, "images_per_part must be at least 1, got 0"),
        ({"per_device_batch_size": 0}, "per_device_batch_size must be at least 1, got 0"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        EmbedConfig(**({"model": str(tmp_path), "output_dir": "out"} | settings)).validate()


def embed_in_small_parts(folder: Path, out: str) -> Callable[[], object]:
    where = {"model": folder / "model", "dataset": folder / "data", "output_dir": folder / out, "num_workers": 1}
    return forks.command("training.embed", **where, images_per_part=8, per_device_batch_size=4)


def finish(folder: Path, out: str, processes: int = 1) -> str:
    done = forks.run(embed_in_small_parts(folder, out), folder / "home", processes)
    assert done.status == 0, done.complaints[-3000:]
    return done.printed


@pytest.mark.slow
def test_a_killed_run_goes_on_and_two_processes_write_what_one_does(folder: Path, write_shards: Write) -> None:
    write_shards(150, 163, broken=BROKEN)
    finish(folder, "whole")
    whole = contents(folder / "whole")
    assert len(whole) == 40

    killed = forks.Fork(embed_in_small_parts(folder, "killed"), folder / "home")
    deadline = time.monotonic() + 600
    while len(list((folder / "killed").glob("part-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.kill()
    before = contents(folder / "killed")
    left = {name: content for name, content in before.items() if name.startswith("part-")}
    assert 3 <= len(left) < 40
    assert left.items() <= whole.items()

    printed = finish(folder, "killed", processes=2)
    assert f"{len(left)} of 40 parts are there already" in printed
    assert printed.count("311 vectors of 32 numbers") == 1
    assert contents(folder / "killed").keys() == whole.keys()
    for name, content in whole.items():
        written, expected = pq.read_table(folder / "killed" / name), pq.read_table(io.BytesIO(content))
        assert written.drop("vector").equals(expected.drop("vector"), check_metadata=True)
        # Not to the last bit: the same vectors now and then round differently in another process.
        vectors = [torch.tensor(table["vector"].to_pylist()) for table in (written, expected)]
        torch.testing.assert_close(*vectors)
