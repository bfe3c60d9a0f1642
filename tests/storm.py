"""
A storm of kills: one run is left alone, another is killed (-9) again and again, at random moments,
and resumed each time. In the end, both must have the same weights, optimizer state and steps.

    python tests/storm.py --kills=100 --processes=2
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import (
    ROOT,
    TINY,
    Fork,
    assert_same_tensors,
    finish,
    fork_ranks,
    load,
    log_of,
    series,
    start,
)


def processes_of(log_dir):
    """Returns {pid: command line} of torchrun and its workers, which have groups of their own."""
    ps = subprocess.run(["ps", "-Aww", "-o", "pid=,args="], capture_output=True, text=True)
    rows = [line.split(None, 1) for line in ps.stdout.splitlines()]
    return {int(pid): args for pid, args in rows if f"--log_dir={log_dir}" in args}


def ranks_of(log_dir):
    """The pids of a run under torchrun, without that of torchrun itself."""
    return [pid for pid, a in processes_of(log_dir).items() if "torch.distributed.run" not in a]


def kill_all(process, log_dir):
    process.send_signal(signal.SIGKILL)
    while pids := processes_of(log_dir):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.poll()  # a zombie is still listed


def steps_logged(log_dir):
    try:
        return (Path(log_dir) / "log.jsonl").read_bytes().count(b'"train_loss"')
    except FileNotFoundError:  # not there yet, or just moved aside by a new run
        return 0


def different_tensors(a, b):
    """Counts the tensors in two nested dicts that differ in any bit."""
    if isinstance(a, dict):
        return sum(different_tensors(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return int(not torch.equal(a, b))
    assert_same_tensors(a, b)
    return 0


def begin(*flags, processes):
    """Forks one process (starts in 0.5 s), or starts several by torchrun (5 s)."""
    return Fork(*TINY, *flags) if processes == 1 else start(*flags, processes=processes)


def storm(folder, kills, processes=1, seed=0, flags=()):
    """Returns {"kills", "tensors that differ", "steps lost", "steps twice"}; prints each kill."""
    (folder / "play.txt").write_bytes((ROOT / "input.txt").read_bytes()[:120_000])
    flags = [f"--data={folder}/play.txt", f"--max_steps={50 * kills}", "--save_every=3", *flags]
    flags += ["--dropout=0.1", "--B=4", "--total_batch_size=256", "--val_every=100", "--keep=2"]
    calm, stormy = folder / "calm", folder / "stormy"
    undisturbed = fork_ranks(processes, *flags, f"--log_dir={calm}")
    chance, done = random.Random(seed), 0
    while done < kills:
        resume = ["--init_from=resume"] if list(stormy.glob("*.pt")) else []
        process = begin(*flags, f"--log_dir={stormy}", *resume, processes=processes)
        if chance.random() < 0.2:  # at any moment, also during the start
            time.sleep(chance.uniform(0, 0.5 if processes == 1 else 5))
        else:
            before = steps_logged(stormy)
            while steps_logged(stormy) in (before, 0) and process.poll() is None:
                time.sleep(0.002)
            time.sleep(chance.expovariate(5))
        if process.poll() is not None:
            print(finish(process))
            break
        kill_all(process, stormy)
        process.communicate()
        done += 1
        print(f"kill {done}: {steps_logged(stormy)} steps", flush=True)
    resume = f"--log_dir={stormy}", "--init_from=resume"
    last = finish(begin(*flags, *resume, processes=processes), 600)
    assert last.returncode == 0, last
    assert not any(finish(rank, 600).returncode for rank in undisturbed)
    a, b = (load(run / f"ckpt_{50 * kills:06d}.pt") for run in (calm, stormy))
    for checkpoint in (a, b):
        del checkpoint["config"], checkpoint["log_size"], checkpoint["run_id"]
    steps = [event["step"] for event in log_of(stormy) if "train_loss" in event]
    for name in ("train_loss", "grad_norm", "val_loss"):
        assert series(calm, name) == series(stormy, name), name
    assert len(list(stormy.glob("*.pt"))) == 2
    return {
        "kills": done,
        "tensors that differ": different_tensors(a, b),
        "steps lost": len(set(range(50 * kills)) - set(steps)),
        "steps twice": len(steps) - len(set(steps)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        result = storm(Path(folder), args.kills, args.processes, args.seed, flags)
    print(json.dumps(result))
    sys.exit(any(result[key] for key in result if key != "kills") or result["kills"] < args.kills)
