"""Alarms on histories that are written down: when they begin, that they are raised once, what they
say."""

import math

import pytest

from webssl_jax.methods.dino.vitals import dino_vitals
from webssl_jax.methods.vitals import Alarm, Limit, Sign, Vitals
from webssl_jax.telemetry.alarms import HEALTHY_ROWS, PATIENCE, AlarmMonitor

# 1,024 prototypes, 128 crops
DINO = dino_vitals(1024, 128, 192, {"dino_local": 5.5, "dino_global": 1.4, "ibot": 3.5}, False)
HEALTHY = {
    "train/teacher_entropy": 5.0,
    "train/student_entropy": 5.5,
    "train/prototypes_used": 80,
    "train/feature_std": 0.8,
    "train/effective_rank": 60,
}
FRESH = {  # nothing is told from anything yet
    "train/teacher_entropy": 6.92,
    "train/student_entropy": 6.93,
    "train/prototypes_used": 30,
    "train/feature_std": 0.1,
    "train/effective_rank": 1.1,
}
ONE_HOT = HEALTHY | {"train/teacher_entropy": 0.1, "train/prototypes_used": 1}
UNIFORM = HEALTHY | {"train/teacher_entropy": 6.93, "train/student_entropy": 6.93}
ONE_POINT = HEALTHY | {"train/feature_std": 0.01, "train/effective_rank": 1.0}
WARMUP = 1000


def rows(*parts, every=10):
    """Rows of (figures, how many logged steps) one after the other."""
    figures = [figures for figures, count in parts for _ in range(count)]
    return [{"step": every * (i + 1)} | figures for i, figures in enumerate(figures)]


def monitor(history, vitals=DINO, warmup=WARMUP):
    """The monitor, and the step of every row that raised an alarm."""
    alarms, raised = AlarmMonitor(vitals, warmup), []
    for row in history:
        raised += [row["step"]] * len(alarms.update(row))
    return alarms, raised


@pytest.mark.parametrize(
    "sick, name, figure, knob",
    [
        (ONE_HOT, "the same few prototypes", "prototypes_used 1 (alarm under", "centering"),
        (UNIFORM, "no preference", "teacher_entropy 6.93 (alarm over", "teacher_temperature"),
        (ONE_POINT, "the same features", "effective_rank 1 (alarm under", "koleo_weight"),
    ],
    ids=["one-hot", "uniform", "one point"],
)
def test_each_collapse_is_said_once_with_figure_step_and_knob(sick, name, figure, knob):
    alarms, raised = monitor(rows((HEALTHY, 200), (sick, 300)))
    (episode,) = alarms.episodes
    assert raised == [episode.start] == [10 * (200 + PATIENCE)]
    assert episode.alarm.name.startswith(name) and alarms.active == [episode]
    assert episode.message.startswith(f"step {episode.start:,}: ALARM, {name}")
    assert figure in episode.message and f"{knob}" in episode.message


def test_a_healthy_run_and_its_fresh_start_are_silent():
    """The start lasts for the whole warm-up here, after some noise of the first steps."""
    noise = HEALTHY | {"train/feature_std": 0.3}
    alarms, raised = monitor(rows((noise, HEALTHY_ROWS - 1), (FRESH, 80), (HEALTHY, 300)))
    assert raised == [] and alarms.episodes == []


def test_who_has_not_left_the_start_when_the_warm_up_is_over_is_told_so():
    alarms, raised = monitor(rows((FRESH, 300)))
    assert raised == [WARMUP + 10] * 2
    assert {episode.alarm.name.split()[0] for episode in alarms.active} == {"no", "the"}


def test_a_collapse_within_the_warm_up_is_seen_once_the_run_was_well():
    _, raised = monitor(rows((HEALTHY, HEALTHY_ROWS), (UNIFORM, 20)))
    assert raised == [10 * (HEALTHY_ROWS + PATIENCE)]


def test_one_prototype_for_all_is_said_after_a_tenth_of_the_warm_up():
    _, raised = monitor(rows((ONE_HOT, 20)))
    assert raised == [WARMUP // 10 + 10]


def test_an_alarm_ends_by_a_margin_and_can_begin_again():
    """The limit is a share of 0.99 of ln 1024 = 6.931; it ends under 0.98."""
    between = UNIFORM | {"train/teacher_entropy": 0.985 * math.log(1024)}
    history = [(HEALTHY, 200), (UNIFORM, 10), (between, 30), (UNIFORM, 10)]
    alarms, raised = monitor(rows(*history))
    assert len(raised) == 1 and alarms.active
    alarms, raised = monitor(rows(*history, (HEALTHY, 10), (UNIFORM, 10)))
    first, second = alarms.episodes
    assert first.end == 10 * (250 + PATIENCE) and second.start == 10 * (260 + PATIENCE)
    assert alarms.active == [second] and raised == [first.start, second.start]


def test_fewer_sick_rows_than_patience_say_nothing():
    _, raised = monitor(rows(*[(HEALTHY, 50), (UNIFORM, PATIENCE - 1)] * 5))
    assert raised == []


def test_rows_without_figures_or_with_nan_neither_count_nor_interrupt():
    history = rows((HEALTHY, 200), (UNIFORM, 2))
    history += [{"step": 2025, "eval/knn/top1": 0.3}]
    history += [{"step": 2026} | UNIFORM | {"train/teacher_entropy": math.nan}]
    history += [{"step": 2030 + i} | UNIFORM for i in range(PATIENCE - 2)]
    assert monitor(history)[1] == [2030 + PATIENCE - 3]


def test_a_continued_run_says_nothing_twice():
    history = rows((HEALTHY, 200), (UNIFORM, 50))
    alarms = AlarmMonitor(DINO, WARMUP)
    alarms.update_all(history[:230])
    assert [alarms.update(row) for row in history[230:]] == [[]] * 20
    assert alarms.episodes == monitor(history)[0].episodes


@pytest.mark.parametrize("prototypes, crops", [(131_072, 6144), (65_536, 64), (64, 512)])
def test_limits_follow_what_the_batch_can_do(prototypes, crops):
    """With all entropies and counts at their least or most, whatever the sizes."""
    vitals = dino_vitals(prototypes, crops, 1536, {"dino_global": 1.0}, True)
    most = math.log(prototypes)
    one_hot = ONE_HOT | {"train/teacher_entropy": 0.02 * most}
    uniform = UNIFORM | dict.fromkeys(
        ("train/teacher_entropy", "train/student_entropy"), 0.999 * most
    )
    well = HEALTHY | {
        "train/teacher_entropy": 0.5 * most,
        "train/student_entropy": 0.8 * most,
        "train/prototypes_used": min(crops, prototypes) // 4,
    }
    assert monitor(rows((well, 300)), vitals)[1] == []
    for sick in (one_hot, uniform):
        assert len(monitor(rows((well, 100), (sick, 20)), vitals)[1]) == 1


def test_a_single_prototype_has_no_signs():
    assert dino_vitals(1, 128, 192, {"dino_global": 0.0}, False) == Vitals()


def test_a_sign_scales_between_least_and_most():
    sign = Sign("train/x", "x", most=9.0, least=1.0)
    assert (sign.share(1.0), sign.share(5.0), sign.value(0.25)) == (0.0, 0.5, 3.0)
    assert Sign("train/x", "x").share(7.0) == 7.0


def test_a_limit_on_both_sides_holds_on_both():
    alarm = Alarm("x", (Limit("train/x", below=0.1, above=0.9),), "it is odd", "nothing")
    vitals = Vitals((Sign("train/x", "x", 10.0),), (alarm,))
    for value, text in ((0.5, "under 1"), (9.5, "over 9")):
        alarms, steps = monitor(rows(({"train/x": 5.0}, 30), ({"train/x": value}, 10)), vitals)
        assert len(steps) == 1 and text in alarms.episodes[0].message
