"""Steps take turns and are timed in full; on a GPU nothing waits within a step. Times as such are never asserted."""

from collections.abc import Iterator
from itertools import count

import pytest
import torch

from training import timing
from training.timing import per_image, time_phases, time_steps


CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What steps do; each call takes a second of a clock that stands still otherwise."""
    done: list[str] = []
    monkeypatch.setattr(timing, "perf_counter", lambda: float(len(done)))
    return done


def test_steps_take_turns_after_a_warm_up(calls: list[str]) -> None:
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert time_steps(steps, repetitions=2, device=CPU) == {"a": [1, 1], "b": [1, 1]}
    assert calls == list("ababab")


def test_phases_are_timed_one_by_one(calls: list[str]) -> None:
    phases = [lambda: calls.append("forward"), lambda: calls.extend(["back", "ward"])]
    assert time_phases({"step": phases}, repetitions=2, device=CPU) == {"step": [[1, 2], [1, 2]]}
    assert calls == ["forward", "back", "ward"] * 3


def test_a_gpu_is_waited_for_after_ten_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    clock: Iterator[int] = count(0, 1000)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)  # milliseconds

        def elapsed_time(self, end: "Event") -> int:
            assert happened[-1] == "synchronize"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("synchronize"))
    phases = [lambda: happened.append("forward"), lambda: happened.append("backward")]
    seconds = time_phases({"step": phases}, repetitions=1, device=torch.device("cuda"))
    assert happened == 2 * (10 * ["forward", "backward"] + ["synchronize"])
    assert seconds == {"step": [[1, 1]]}


def test_times_are_medians_of_an_image() -> None:
    assert per_image([0.2, 0.1, 0.9, 0.4, 0.3], images=10) == {
        "ms_per_image": pytest.approx(30),
        "ms_per_image_iqr": pytest.approx(20),
        "seconds": [0.2, 0.1, 0.9, 0.4, 0.3],
    }
