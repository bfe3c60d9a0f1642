"""
The Slurm job of docs/clusters.md on a real cluster: two nodes of Slurm on this machine, with CPUs
instead of GPUs. The job is requeued, loses the daemon of a node, and reaches its time limit. Each
time it has to continue by itself, and at the end no step may be missing or logged twice.

    apt install slurmctld slurmd slurm-client munge
    python tests/slurm.py                   # as root, ten minutes
    python tests/slurm.py requeue           # or daemon, or limit: one of the three
"""

import argparse
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, free_port, log_of

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=30
SchedulerParameters=sched_interval=5
NodeName=a NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=b NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=a,b Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """munged, slurmctld and two slurmd, until the end of a with statement."""

    def __init__(self, folder):
        self.folder = folder
        self.daemons = {}

    def __enter__(self):
        folder = self.folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        conf = CONF.format(
            folder=folder, host=socket.gethostname(), ports=[free_port() for _ in range(3)]
        )
        (folder / "slurm.conf").write_text(conf)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        munge = ["--key-file=munge.key", "--socket=munge.socket", "--pid-file=munge.pid"]
        munge += ["--log-file=munge.log", "--seed-file=munge.seed"]
        munge = [option.replace("=", f"={folder}/") for option in munge]
        self.start("munged", "munged", "--foreground", "--force", *munge)
        time.sleep(1)
        self.start("slurmctld", "slurmctld", "-D")
        self.start("a", "slurmd", "-D", "-N", "a")
        self.start("b", "slurmd", "-D", "-N", "b")
        wait(lambda: self.ask("sinfo", "-h", "-o", "%T").strip() == "idle", 60, "no idle nodes")
        return self

    def __exit__(self, *error):
        subprocess.run(["scancel", "--full", "--user=root"], capture_output=True)
        time.sleep(2)
        for name in ("a", "b", "slurmctld", "munged"):
            self.daemons[name].kill()

    def start(self, name, *command):
        log = open(self.folder / f"{name}.out", "a")
        self.daemons[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def ask(self, *command):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, (command, result.stdout, result.stderr)
        return result.stdout

    def job(self, number):
        """The state of a job, and how often it was restarted."""
        told = self.ask("scontrol", "show", "job", number)
        state, restarts = (re.search(rf"{k}=(\S+)", told)[1] for k in ("JobState", "Restarts"))
        return state, int(restarts)


def wait(condition, seconds, problem):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            sys.exit(problem)
        time.sleep(0.5)


def script(home, steps, minutes):
    """The job of docs/clusters.md, for a small GPT on one core of each node."""
    page = (ROOT / "docs" / "clusters.md").read_text()
    (job,) = re.findall(r"^```sh\n(#!.*?)^```$", page, re.MULTILINE | re.DOTALL)
    flags = f"--device=cpu --max_steps={steps} --log_every=1 --val_every=0 --sample_every=0"
    changes = {
        "--gpus-per-node=8 ": "",
        "--cpus-per-task=32": "--cpus-per-task=1",
        "--time=12:00:00": f"--time={minutes}",
        "USR1@120": "USR1@20",
        "--nproc_per_node=8": "--nproc_per_node=1",
        '"$first:29500"': f"127.0.0.1:{free_port()}",  # both nodes are this machine
        "train_gpt2.py gpt2": f"{ROOT}/train_gpt2.py baby {flags}",
    }
    for old, new in changes.items():
        assert old in job, old
        job = job.replace(old, new)
    (home / "job.sbatch").write_text(job)


def submit(cluster, home, steps, minutes=60):
    script(home, steps, minutes)
    told = cluster.ask("sbatch", "--parsable", f"--chdir={home}", "--output=out", "job.sbatch")
    return told.strip()


def steps_so_far(home):
    try:
        return sum("train_loss" in event for event in log_of(home / "log" / "baby"))
    except FileNotFoundError:
        return 0


def finish(cluster, number, home, steps, restarts):
    """Waits for the end of a job, and checks its log."""
    ends = ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL")
    wait(lambda: cluster.job(number)[0] in ends, 900, "the job does not end")
    state, found = cluster.job(number)
    logged = [event["step"] for event in log_of(home / "log" / "baby") if "train_loss" in event]
    for line in (home / "out").read_text().splitlines():
        if re.match(r"recipe|resuming|starting|no checkpoint|done|saved|\d+ x ", line):
            print("   ", line[:120])
    assert state == "COMPLETED" and found >= restarts, (state, found)
    assert logged == list(range(steps)), "steps are missing, or logged twice"
    print(f"  {state} after {found} restarts: steps 0 to {steps - 1}, each logged once", flush=True)


def requeue(cluster, home):
    """An operator or a job of higher priority puts the job back into the queue."""
    number = submit(cluster, home, steps=400)
    wait(lambda: steps_so_far(home) > 100, 120, "the job does not train")
    cluster.ask("scontrol", "requeue", number)
    finish(cluster, number, home, steps=400, restarts=1)


def daemon(cluster, home):
    """A node's daemon is killed: Slurm takes the node for dead, and the job waits for it."""
    number = submit(cluster, home, steps=2000)
    wait(lambda: steps_so_far(home) > 100, 120, "the job does not train")
    cluster.daemons["b"].send_signal(signal.SIGKILL)
    cluster.daemons["b"].wait()
    wait(
        lambda: "down" in cluster.ask("sinfo", "-h", "-N", "-n", "b", "-o", "%T"),
        120,
        "Slurm does not notice",
    )
    cluster.start("b", "slurmd", "-D", "-N", "b")
    finish(cluster, number, home, steps=2000, restarts=1)


def limit(cluster, home):
    """The job needs longer than its time limit of a minute."""
    number = submit(cluster, home, steps=2000, minutes=1)
    finish(cluster, number, home, steps=2000, restarts=1)


if __name__ == "__main__":
    scenes = {"requeue": requeue, "daemon": daemon, "limit": limit}
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("scenes", nargs="*", help="requeue, daemon, limit")
    args = parser.parse_args()
    missing = [name for name in ("munged", "slurmctld", "slurmd") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        sys.exit(f"this needs root, and Slurm; missing are: {', '.join(missing) or 'none'}")
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder)) as cluster:
        for name in args.scenes or scenes:
            home = Path(folder) / f"home-{name}"
            home.mkdir()
            shutil.copy(ROOT / "input.txt", home)
            began = time.monotonic()
            print(f"{name}: {scenes[name].__doc__}", flush=True)
            scenes[name](cluster, home)
            print(f"  {time.monotonic() - began:.0f} s")
