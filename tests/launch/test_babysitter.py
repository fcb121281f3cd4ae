"""The babysitter against a stand-in gcloud: what happens to slices and trainings, and that nothing
is left that costs money."""

import random
import re
import subprocess

import pytest

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.launch import gcloud
from webssl_jax.launch.cost import Meter

HOUR = 3600.0
ACTIVE = {
    "state": "ACTIVE",
    "accelerator": "v5litepod-16",
    "nodes": ["run"],
    "created": "0",
    "active_at": 0.0,
    "seen": 0.0,
    "dies_at": None,
    "job": None,
}


def _nothing_left(world):
    return world.read()["resources"] == {}


def test_a_week_of_preemptions_ends_with_a_finished_run_and_nothing_that_costs_money(world):
    """Two slices, taken away every few hours; stock-outs, long queues, answers that get lost, a
    reboot, a crash of one machine, a preemption notice and a delete that fails."""
    rng = random.Random(0)
    world.change(
        work=130 * HOUR,
        lives=[rng.uniform(2, 14) * HOUR for _ in range(20)],
        queue=[rng.uniform(0.05, 3) * HOUR for _ in range(100)],
        create_errors=["", "There is no more capacity in the zone z", "", "", "Stockout"],
        exits=[[30 * HOUR, 75, False], [55 * HOUR, 1, True]],
        reboots=[80 * HOUR],
        describe_errors=0.02,
        ssh_errors=0.004,
        delete_errors=2,
    )
    sitter = world.babysitter(count=2, poll_seconds=1800, max_hours=400)
    assert sitter.run() == 0, world.text
    after = world.read()
    assert after["saved"] == 130 * HOUR and after["resources"] == {}
    assert after["preemptions"] >= 10 and world.now() > 7 * 24 * HOUR
    assert sitter.counts["failures"] == 2  # the crash and the reboot
    assert sitter.counts["restarts asked for by the training"] == 1
    # It counts no less than there was, and at most two looks more for each set of slices.
    hours = sitter._hours()
    assert after["billed"] / HOUR <= hours <= after["billed"] / HOUR + 1.0 * after["asked"]
    assert "nothing costs money any more" in world.said[-1]


def test_the_cost_is_said_before_anything_is_created(world):
    world.change(work=HOUR)
    world.babysitter(max_hours=10).run()
    created = next(i for i, line in enumerate(world.said) if "queued-resources create" in line)
    line = "cost: v5e-16 spot = 16 chips x $2 an hour = $32.00 an hour; the budget of 10 hours is "
    assert any(said == line + "at most $320.00" for said in world.said[:created])


@pytest.mark.parametrize("saves", [True, False])
def test_a_spent_budget_stops_the_training_in_time_to_save_and_deletes(world, saves):
    world.change(work=100 * HOUR, exits=[] if saves else [[2 * HOUR, 75, True]])
    assert world.babysitter(max_hours=5).run() == 3
    after = world.read()
    assert after["resources"] == {} and after["billed"] <= 5 * HOUR
    if saves:
        assert after["saved"] > 4 * HOUR and after["saved"] % 1800  # not one of the half-hourly
    assert "continues from the last checkpoint" in world.text


def test_time_in_the_queue_is_not_counted(world):
    world.change(work=2 * HOUR, queue=[100 * HOUR])
    assert world.babysitter(max_hours=5, poll_seconds=3600).run() == 0


def test_bad_input_ends_at_once_with_the_machines_own_lines(world):
    world.change(work=10 * HOUR, exits=[[60, 2, False]])
    assert world.babysitter().run() == 2
    assert _nothing_left(world) and world.read()["starts"] == 1
    assert "the last line of run-w-0" in world.text


def test_a_crash_is_retried_a_bounded_number_of_times(world):
    world.change(work=10 * HOUR, exits=[[60, 1, False]] * 9)
    assert world.babysitter(retries=3).run() == 1
    assert _nothing_left(world) and world.read()["starts"] == 4


def test_a_storage_that_fails_for_a_while_is_waited_for(world):
    """The training saves or cannot save, and asks to be started again: after longer pauses."""
    world.change(work=HOUR, exits=[[60, 75, False]] * 8)
    sitter = world.babysitter(poll_seconds=60, retries=1)
    assert sitter.run() == 0 and _nothing_left(world)
    assert world.read()["starts"] == 9 and sitter.counts["failures"] == 0
    pauses = [int(p) for p in re.findall(r"starting it again in (\d+) s", world.text)]
    assert pauses == [60, 120, 240, 480, 600, 600, 600]


def test_a_training_that_asks_for_a_restart_for_ever_is_given_up(world):
    world.change(work=10 * HOUR, exits=[[60, 75, False]] * 99)
    assert world.babysitter(poll_seconds=60).run() == 1 and _nothing_left(world)
    assert world.read()["starts"] == 13 and "13 restarts in a row" in world.text
    assert "the last line of run-w-0" in world.text


def test_a_crash_after_hours_counts_as_the_first(world):
    world.change(work=30 * HOUR, exits=[[h * HOUR, 134, False] for h in (3, 6, 9, 12, 15, 18)])
    assert world.babysitter(retries=1).run() == 0


def test_machines_that_did_not_end_with_their_peer_are_ended_and_started_again(world):
    world.change(work=2 * HOUR, exits=[[HOUR, 1, True]])
    assert world.babysitter(grace_seconds=600).run() == 0
    kills = [call for call in world.calls("ssh") if any("stop KILL" in word for word in call)]
    assert len(kills) == 1 and world.read()["starts"] == 2


def test_machines_that_answer_no_more_are_replaced(world):
    world.change(work=3 * HOUR, silent_after=HOUR)
    sitter = world.babysitter()
    assert sitter.run() == 0
    assert sitter.counts["slices replaced"] == 1 and world.read()["asked"] == 2


def test_machines_whose_ssh_never_returns_are_replaced(world):
    world.change(work=3 * HOUR, hangs_after=HOUR)
    sitter = world.babysitter()
    assert sitter.run() == 0
    assert sitter.counts["slices replaced"] == 1 and world.read()["asked"] == 2
    assert "1 of 2 machines answer (queued-resources ssh run: no answer in 300 sec" in world.text


def test_a_command_that_never_returns_is_ended_and_what_it_printed_is_kept(
    world_on_path, monkeypatch
):
    world_on_path.change(
        queue=[0.0], hangs_after=0.0, asked=1, resources={"run": ACTIVE | {"active_at": -1.0}}
    )
    cloud = gcloud.Gcloud("z", "p", say=world_on_path.say)
    text = cloud.ssh("run", "bash host.sh logs 1", seconds=3)
    assert text == "run-w-0: the last line of run-w-0\n"
    assert cloud.trouble == "queued-resources ssh run: no answer in 3 seconds"

    def late(command, seconds):
        raise subprocess.TimeoutExpired(command, seconds)

    monkeypatch.setattr(gcloud, "execute", late)
    with pytest.raises(gcloud.GcloudError, match="no answer in 600 seconds") as caught:
        cloud.describe("run")
    assert caught.value.transient


def test_silence_is_not_in_a_row_with_silence_before_hours_of_work(world):
    """The first two sets of machines fall silent; an hour of work lies between."""
    world.change(work=9 * HOUR)
    sitter = world.babysitter(retries=1)
    sleep = world.sleep

    def sleep_and_fall_silent(seconds):
        sleep(seconds)
        quiet = any(h < world.now() / HOUR < h + 1 for h in (3, 7))
        world.change(ssh_errors=1.0 if quiet else 0.0)

    world.sleep = sleep_and_fall_silent
    assert sitter.run() == 0, world.text
    assert sitter.counts["slices replaced"] == 2 and sitter.counts["failures"] == 2


def test_a_machine_that_was_started_anew_gets_its_mounts_before_the_training(world):
    world.change(work=2 * HOUR, reboots=[HOUR])
    assert world.babysitter(mounts=[("b", "/mnt/a b")]).run() == 0
    sent = [word for call in world.calls("ssh") for word in call if word.startswith("--command=")]
    sent = [re.sub(r".*host\.sh ", "", word, flags=re.DOTALL) for word in sent]
    steps = [words.split()[0] for words in sent if not words.startswith(("status", "logs"))]
    assert steps == ["install", "mount", "start"] * 2
    assert sent.count("mount b '/mnt/a b'") == 2


def test_a_request_that_fails_for_a_while_is_repeated_more_and_more_slowly(world):
    errors = [
        "HTTPError 503: try again",
        "UNAVAILABLE: the endpoint",
        "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepod' has been exceeded",
        "Request timed out",
    ]
    world.change(work=HOUR, create_errors=errors * 3)
    sitter = world.babysitter(retries=0, poll_seconds=10)
    assert sitter.run() == 0, world.text
    assert sitter.counts["failures"] == 0 and world.read()["asked"] == 13
    assert world.now() > 300 + HOUR + 3600  # ten minutes between the later ones


def test_a_budget_that_ends_while_gcloud_fails_still_lets_the_training_save(world):
    world.change(work=100 * HOUR, down=[4.1 * HOUR, 4.7 * HOUR])
    assert world.babysitter(max_hours=5, poll_seconds=300).run() == 3
    after = world.read()
    assert after["resources"] == {} and after["billed"] <= 5 * HOUR
    assert after["saved"] > 4.5 * HOUR and after["saved"] % 1800


def test_a_request_that_is_refused_for_good_ends_with_gclouds_words(world):
    world.change(create_errors=["PERMISSION_DENIED: you may not"] * 9)
    assert world.babysitter(retries=2).run() == 1
    assert "PERMISSION_DENIED" in world.text and world.read()["asked"] == 3


def test_stock_outs_are_waited_for(world):
    world.change(work=HOUR, create_errors=["There is no more capacity in zone z"] * 20)
    assert world.babysitter(retries=1).run() == 0
    assert world.read()["asked"] == 21


def test_ctrl_c_says_what_is_still_there_and_the_command_that_deletes_it(world):
    world.change(work=10 * HOUR)
    world.interrupt_at = 2 * HOUR
    assert world.babysitter().run() == cli.EXIT_INTERRUPTED
    assert world.read()["resources"]["run"]["state"] == "ACTIVE"
    last = world.said[-1]
    assert "STILL THERE: run is ACTIVE, 16 chips, and costs $32.00 an hour" in last
    assert last.endswith(
        "gcloud compute tpus queued-resources delete run --force --zone=z --project=p --quiet"
    )


def test_another_babysitter_takes_over_a_running_training_and_does_not_start_it_again(world):
    world.change(work=10 * HOUR)
    world.interrupt_at = 2 * HOUR
    world.babysitter().run()
    assert world.babysitter().run() == 0
    assert world.read()["starts"] == 1 and world.read()["asked"] == 1 and _nothing_left(world)


@pytest.mark.parametrize("kept", [False, True])
def test_another_babysitter_that_knows_what_was_spent_keeps_the_budget(world, tmp_path, kept):
    """kept: in a file, else as it is told."""
    file = tmp_path / "run" / "meter.json" if kept else None
    world.change(work=100 * HOUR)
    world.interrupt_at = 12 * HOUR
    first = Meter(world.now(), file=file)
    assert world.babysitter(max_hours=20, meter=first).run() == cli.EXIT_INTERRUPTED
    spent = float(re.search(r"--spent-hours (\S+) within the same budget", world.said[-1])[1])
    assert 10 < spent <= 12
    known = Meter(world.now(), file=file) if kept else Meter(world.now(), spent)
    assert world.babysitter(max_hours=20, meter=known).run() == 3
    # a poll may pass between the two looks of which each sitter knows one
    assert world.read()["billed"] <= 20 * HOUR and world.read()["saved"] > 18 * HOUR
    with pytest.raises(UserError, match="a budget of 12 hours is gone before.*more than 12.5"):
        world.babysitter(max_hours=12, meter=Meter(world.now(), 12))


def test_what_ended_before_the_babysitter_came_is_tried_once_more(world):
    """As after mended records: the same command is to be started, not judged by its past."""
    world.change(work=10 * HOUR, exits=[[60, 2, False]])
    assert world.babysitter(keep=True).run() == 2
    assert world.babysitter().run() == 0


def test_resume_brings_a_preempted_run_back_and_returns_while_it_runs(world):
    world.change(work=10 * HOUR, lives=[HOUR])
    world.babysitter(max_hours=None, until_running=True).run()
    world.sleep(2 * HOUR)
    assert world.babysitter(max_hours=None, until_running=True).run() == 0
    after = world.read()
    assert after["starts"] == 2 and after["resources"]["run"]["job"]["state"] == "running"


def test_resume_deletes_nothing_even_when_it_gives_up(world):
    world.change(work=10 * HOUR, ssh_errors=1.0)
    assert world.babysitter(max_hours=None, until_running=True, retries=0).run() == 1
    assert "STILL THERE: run is ACTIVE" in world.said[-1] and not _nothing_left(world)


def test_a_delete_that_never_works_is_told_as_what_still_costs(world):
    world.change(work=HOUR, delete_errors=1000)
    assert world.babysitter().run() == 1
    assert "STILL THERE: run is ACTIVE" in world.said[-1]
    assert "nothing costs money" not in world.text


def test_another_training_on_the_slices_is_left_alone(world):
    world.change(work=10 * HOUR)
    world.babysitter(max_hours=None, until_running=True).run()
    other = world.babysitter()
    other._job.digest = "another"
    with pytest.raises(UserError, match="runs another command"):
        other.run()
    assert world.read()["resources"]["run"]["job"]["state"] == "running"


def test_slices_of_another_shape_under_the_same_name_are_left_alone(world):
    world.change(work=10 * HOUR)
    world.babysitter(max_hours=None, until_running=True).run()
    with pytest.raises(UserError, match="is 1 x v5litepod-16, not 1 x v5litepod-32"):
        world.babysitter(slice="v5e-32").run()
    assert not _nothing_left(world)


def test_a_budget_too_small_to_save_in_is_refused(world):
    with pytest.raises(UserError, match="is gone before the training can save"):
        world.babysitter(max_hours=0.1)
