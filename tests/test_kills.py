"""Nothing is lost: kills, ranks that die or hang, restarts, many nodes, and random damage."""

import collections
import os
import random
import signal
import time

import fuzz
import pytest
from conftest import (
    assert_same_state,
    finish,
    fork_ranks,
    free_port,
    kill,
    series,
    start,
    train,
    wait_for,
    world,
)
from storm import processes_of, ranks_of, storm

CALM = {"tensors that differ": 0, "steps lost": 0, "steps twice": 0}
RUN = ["--max_steps=40", "--save_every=5", "--B=4", "--total_batch_size=256", "--dropout=0.1"]


@pytest.mark.parametrize("processes, kills", [(1, 15), (2, 5)])
def test_a_storm_of_kills_changes_nothing(tmp_path, processes, kills):
    flags = ["--optimizer=muon"] if processes == 1 else ["--optimizer=adamw"]
    found = storm(tmp_path, kills, processes, seed=kills, flags=flags)
    assert found == {"kills": kills, **CALM}


def test_random_damage_ends_well_or_in_one_line(tmp_path):
    found = fuzz.fuzz(tmp_path, 200)
    kinds = collections.Counter()
    for (kind, _), n in found.items():
        kinds[kind] += n
    assert sum(kinds.values()) == 200 and min(kinds[k] for k in kinds) > 20 and len(kinds) == 4
    assert found["checkpoint", 0] and found["checkpoint", 1] and found["shard", 1]


def test_torchrun_restarts_where_a_rank_was_killed(text, tmp_path):
    """A rank is killed three times. Even the first start has --init_from=resume."""
    flags = [f"--data={text}", *RUN, "--max_steps=300", "--init_from=resume"]
    undisturbed = fork_ranks(2, *flags, f"--log_dir={tmp_path}/a")
    log_dir, chance = tmp_path / "b", random.Random(0)
    restarts = ["--standalone", "--max-restarts=3"]
    process = start(*flags, f"--log_dir={log_dir}", processes=2, torchrun=restarts)
    for step in (20, 90, 170):
        wait_for(lambda step=step: (log_dir / f"ckpt_{step:06d}.pt").exists(), process)
        time.sleep(chance.uniform(0, 0.3))
        os.kill(chance.choice(ranks_of(log_dir)), signal.SIGKILL)
    result = finish(process)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("resuming") == 3
    assert [finish(rank).returncode for rank in undisturbed] == [0, 0]
    assert_same_state(tmp_path / "a" / "ckpt_000300.pt", log_dir / "ckpt_000300.pt")
    assert list(series(log_dir, "train_loss")) == list(range(300))


def test_without_restarts_the_others_leave_too(text, tmp_path):
    flags = [f"--data={text}", f"--log_dir={tmp_path}/log", *RUN, "--max_steps=5000"]
    process = start(*flags, processes=2)
    wait_for((tmp_path / "log" / "ckpt_000005.pt").exists, process)
    os.kill(ranks_of(tmp_path / "log")[1], signal.SIGKILL)
    assert finish(process, 60).returncode == 1
    assert not processes_of(tmp_path / "log")


def test_a_hanging_rank_ends_the_run_in_time(text, tmp_path):
    """The others give up after the timeout. The run can then be resumed."""
    flags = [f"--data={text}", f"--log_dir={tmp_path}/log", *RUN, "--max_steps=5000"]
    # not by torchrun, which would wait for 30 s before it kills the rank that hangs
    first, last = (start(*flags, "--timeout=3", env=env) for env in world(2))
    wait_for((tmp_path / "log" / "ckpt_000005.pt").exists, first)
    last.send_signal(signal.SIGSTOP)
    try:
        result = finish(first, 20)
    finally:
        kill(last)
    assert result.returncode == 1 and "imed out" in result.stderr, result.stderr
    steps = max(series(tmp_path / "log", "train_loss"))
    train(*flags[:2], *RUN[1:], f"--max_steps={steps + 2}", "--init_from=resume")
    assert list(series(tmp_path / "log", "train_loss")) == list(range(steps + 2))


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """The run in one process."""
    log_dir = tmp_path_factory.mktemp("straight") / "log"
    train(f"--data={text}", f"--log_dir={log_dir}", *RUN, "--dropout=0")
    return log_dir


@pytest.mark.parametrize("processes", [1, 2])
def test_two_nodes_train_as_one(text, tmp_path, straight, processes):
    """Two agents run on this machine, each with its log_dir. The second one's stays empty."""
    flags = [f"--data={text}", *RUN, "--dropout=0"]
    flags += [f"--B={4 // processes}"]
    address = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    nodes = [
        start(
            *flags,
            f"--log_dir={tmp_path}/{rank}",
            processes=processes,
            torchrun=[*address, f"--node_rank={rank}"],
        )
        for rank in (0, 1)
    ]
    results = [finish(node) for node in nodes]
    assert [result.returncode for result in results] == [0, 0], results
    assert "step    10" in results[0].stdout and not results[1].stdout
    assert not (tmp_path / "1").exists()
    for name in ("train_loss", "val_loss", "grad_norm"):
        found, expected = series(tmp_path / "0", name), series(straight, name)
        assert found == pytest.approx(expected, abs=2e-4)


def test_a_node_that_does_not_see_the_checkpoints(text, tmp_path):
    """Two nodes have a log_dir each. When resumed, they say that they differ, and exit."""
    flags = [f"--data={text}", *RUN, "--max_steps=10"]
    train(*flags, f"--log_dir={tmp_path}/0")
    flags += ["--init_from=resume"]
    nodes = [
        start(*flags, f"--log_dir={tmp_path}/{rank}", env=env)
        for rank, env in enumerate(world(2, nodes=2))
    ]
    results = [finish(node, 60) for node in nodes]
    assert [result.returncode for result in results] == [1, 1]
    # the first is rank 0, and either may leave before it hears of the other
    assert "step=0 on this rank, but 10 on rank 0" in results[1].stderr
    assert "do all see" in results[1].stderr


def test_resume_on_other_numbers_of_processes(text, tmp_path, straight):
    """Two processes run to step 10, three to 20, one to 30, five to the end, on the straight
    run's tokens."""
    log_dir = tmp_path / "log"
    flags = [f"--data={text}", *RUN, "--dropout=0", "--keep=0", f"--log_dir={log_dir}"]
    for step, processes in ((10, 2), (20, 3), (30, 1)):
        ranks = fork_ranks(processes, *flags, "--init_from=resume")
        wait_for((log_dir / f"ckpt_{step:06d}.pt").exists, ranks[0])
        for rank in ranks:
            kill(rank)
        for path in log_dir.glob("ckpt_*.pt"):
            if path.name > f"ckpt_{step:06d}.pt":
                path.unlink()
    # by torchrun, since that also shows whether all five exit well
    last = finish(start(*flags, "--init_from=resume", "--B=2", processes=5))
    assert last.returncode == 0, last.stdout + last.stderr
    found, expected = (series(run, "train_loss") for run in (tmp_path / "log", straight))
    assert list(found) == list(range(40))
    assert found == pytest.approx(expected, abs=1e-3)
