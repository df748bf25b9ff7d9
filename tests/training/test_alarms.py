"""When a run warns that it learns nothing, that its loss has jumped up, or that it waits for images."""

import math

import pytest

from training import processes
from training.alarms import CollapseAlarm, InputAlarm, SpikeAlarm


def alarm_of(losses: list[float], cosine: float = 0.5, first_step: int = 0) -> list[str]:
    """Warnings for these losses of 64 contrasted images, logged every ten steps."""
    alarm = CollapseAlarm(contrasted_images=64, patience=5, first_step=first_step)
    found = (alarm.check(10 * n, {"loss": loss, "negative_cosine": cosine}) for n, loss in enumerate(losses))
    return [warning for warning in found if warning]


GUESSING = math.log(64)


def test_the_alarm_sounds_after_a_loss_that_stays_at_guessing() -> None:
    assert alarm_of([GUESSING] * 4) == []
    assert len(alarm_of([GUESSING] * 5)) == 1
    assert len(alarm_of([0.985 * GUESSING] * 5)) == 1
    assert alarm_of([0.97 * GUESSING] * 50) == []
    assert "ln(contrasted images) = 4.159" in alarm_of([GUESSING] * 5)[0]


def test_the_alarm_starts_over_after_a_lower_loss_and_after_sounding() -> None:
    assert alarm_of(([GUESSING] * 4 + [1.0]) * 10) == []
    assert len(alarm_of([GUESSING] * 14)) == 2


def test_the_alarm_is_silent_at_the_beginning() -> None:
    assert alarm_of([GUESSING] * 24, first_step=200) == []
    assert len(alarm_of([GUESSING] * 25, first_step=200)) == 1


def test_the_alarm_tells_collapse_from_a_stall() -> None:
    collapsed, stalled = alarm_of([GUESSING] * 5, cosine=0.999)[0], alarm_of([GUESSING] * 5, cosine=0.4)[0]
    assert "point the same way" in collapsed
    assert "natural images" in collapsed
    assert "point the same way" not in stalled
    for warning in (collapsed, stalled):
        assert "lower mask_ratio" in warning


def spikes_of(losses: list[float]) -> list[int]:
    """Entries that are warned of, in comparison with the four before."""
    alarm = SpikeAlarm(factor=2.0, entries=4)
    return [n for n, loss in enumerate(losses) if alarm.check(n, {"loss": loss})]


def test_a_loss_far_above_the_recent_ones_is_a_spike_and_said_once() -> None:
    assert spikes_of([4.0, 3.0, 2.0, 1.0, 5.1]) == [4]  # more than twice the median 2.5
    assert spikes_of([4.0, 3.0, 2.0, 1.0, 4.9]) == []
    assert spikes_of([1.0] * 6 + [3.0, 3.0, 1.0, 1.0, 1.0, 3.0]) == [6, 11]
    assert spikes_of([1.0] * 3 + [9.0]) == []  # too early to say
    assert spikes_of([math.nan] * 4 + [1.0] * 4 + [math.nan, 1.0, 9.0]) == [10]


def entries_with_warnings(waits: list[float], alarm: InputAlarm | None = None) -> list[int]:
    """Numbers of the entries, from 1, at which a run that waits so warns."""
    alarm = alarm or InputAlarm(num_workers=4, free_cores=11)
    return [n for n, wait in enumerate(waits, 1) if alarm.check(10 * n, {"data_wait": wait})]


def test_waiting_for_images_is_told_once_until_it_is_cured() -> None:
    assert entries_with_warnings([0.3] * 4) == []
    assert entries_with_warnings([0.2] * 9) == []
    assert entries_with_warnings([0.9, *[0.1] * 20]) == []  # workers that start
    assert entries_with_warnings(([0.3] * 4 + [0.1]) * 5) == []
    assert entries_with_warnings([0.3] * 30) == [5]
    assert entries_with_warnings([0.3] * 5 + [0.1] * 4 + [0.3] * 9) == [5]
    assert entries_with_warnings([0.3] * 5 + [0.1] * 5 + [0.3] * 9) == [5, 15]


def test_the_remedies_begin_with_cores_that_are_free() -> None:
    texts = [InputAlarm(4, free_cores, patience=1).check(10, {"data_wait": 0.456}) or "" for free_cores in (11, 0, -2)]
    for text in texts:
        assert "46% of the time (data_wait)" in text
        assert text.index("training.prepare") < text.index("num_views=4") < text.index("views_per_decode")
    assert "Raise num_workers=4 (cores without a process: 11); or make smaller" in texts[0]
    assert all("num_workers" not in text and "All cores are in use: make" in text for text in texts[1:])


def test_every_process_of_this_machine_and_every_worker_needs_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "usable_cores", lambda: 16)
    assert processes.cores_without_process(num_workers=4) == 11
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert processes.cores_without_process(num_workers=4) == 6
