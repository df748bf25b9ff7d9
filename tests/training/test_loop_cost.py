"""The loop is a real run, set against the bare step. Times are never asserted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from training import loop_cost
from training.config import PretrainConfig
from training.loop_cost import LoopSettings, loop_entry, measure_loop, run_log
from training.parser import parse_settings


TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "mask_ratio": 0.5, "mixed_precision": "no", "contrastive_batch_sizes": [4, 6]}
TINY |= {"num_workers": [0, 1], "logging_steps": 2, "repetitions": 2}

pytestmark = pytest.mark.usefixtures("no_accelerator")


def test_times_are_shared_out() -> None:
    logged = [{"images_per_second": speed, "data_wait": wait} for speed, wait in ((40, 0.1), (50, 0.2), (80, 0.4))]
    entry = loop_entry(10, 2, [0.1, 0.16, 0.1, 0.1], logged)
    assert entry["ms_per_image"] == pytest.approx(20)
    assert entry["step_ms_per_image"] == pytest.approx(10)
    assert entry["time_ratio"] == pytest.approx(2)
    assert entry["data_wait"] == 0.2
    assert entry["overhead"] == pytest.approx(0.6)  # 20 ms, of which 4 are waiting and 10 the step
    assert (entry["images"], entry["num_workers"]) == (10, 2)


def test_unknown_waiting_is_no_overhead() -> None:
    entry = loop_entry(10, 0, [0.1], [{"images_per_second": 50}])
    assert (entry["data_wait"], entry["overhead"]) == (None, None)


def test_every_batch_and_number_of_workers_has_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[PretrainConfig] = []

    def run(flags: list[str]) -> list[dict[str, Any]]:
        runs.append(parse_settings(PretrainConfig, "test", flags))
        return [{"images_per_second": 100.0}]

    monkeypatch.setattr(loop_cost, "run_log", run)
    config = LoopSettings(**TINY)
    config.validate()
    entries = measure_loop(Accelerator(cpu=True), config)
    chosen = [(4, 0), (4, 1), (6, 0), (6, 1)]
    assert [(entry["images"], entry["num_workers"]) for entry in entries] == chosen
    assert [(run.contrastive_batch_size, run.num_workers) for run in runs] == chosen
    assert {run.max_steps for run in runs} == {6}
    assert all(run.model_config().to_dict() == config.model_config().to_dict() for run in runs)
    assert [len(entry["bare_step"]["seconds"]) for entry in entries] == 4 * [4]


@pytest.mark.slow
def test_the_run_is_real(write_shards: Callable[..., Path]) -> None:
    config = LoopSettings(**TINY, dataset=str(write_shards(16)))
    logged = run_log(config.run_flags(4, 0))
    assert [entry["step"] for entry in logged] == [4, 6]  # the first entry warms up
    assert all(entry["images_per_second"] > 0 for entry in logged)


def test_a_run_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_cost.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="the run has failed: false -m training.pretrain --seed=1"):
        run_log(["--seed=1"])


@pytest.mark.parametrize("settings", [{"num_workers": [-1]}, {"logging_steps": 0}, {"repetitions": 0}], ids=str)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        LoopSettings(**settings).validate()
