"""What goes wrong around a run: folders, checkpoints, terminals, memory."""

import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    Fork,
    assert_same_tensors,
    command,
    kill,
    load,
    log_of,
    mistake,
    run,
    series,
    train,
    wait_for,
)


def test_an_earlier_run_is_moved_aside(text, tmp_path):
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=2"
    train(*flags)
    first = (tmp_path / "log" / "log.jsonl").read_bytes()
    assert f"{tmp_path}/log-1" in train(*flags, "--seed=2").stdout
    second = (tmp_path / "log" / "log.jsonl").read_bytes()
    assert f"{tmp_path}/log-2" in train(*flags, "--seed=3").stdout
    assert (tmp_path / "log-1" / "log.jsonl").read_bytes() == first
    assert (tmp_path / "log-2" / "log.jsonl").read_bytes() == second
    assert (tmp_path / "log-2" / "ckpt_000002.pt").exists()


def test_resume_where_there_is_nothing_yet(text, tmp_path):
    """The run starts from scratch and says so. What an earlier one left moves aside."""
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--init_from=resume", "--max_steps=2"
    assert "no checkpoint" in train(*flags, "--save_every=0").stdout
    first = log_of(tmp_path / "log")
    assert "no checkpoint" in train(*flags, "--save_every=2").stdout
    for before, after in zip(first, log_of(tmp_path / "log"), strict=True):
        assert before.get("train_loss") == after.get("train_loss")
    assert log_of(tmp_path / "log-1") == first
    assert "resuming at step 2" in train(*flags, "--save_every=2").stdout
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"log", "log-1"}


def test_a_second_live_run_refuses(text, tmp_path):
    flags = f"--data={text}", f"--log_dir={tmp_path}/log"
    process = Fork(*TINY, *flags, "--max_steps=100000", "--save_every=5")
    wait_for((tmp_path / "log" / "ckpt_000005.pt").exists, process)
    for init_from in ("scratch", "resume"):
        assert "another run" in mistake(*flags, "--max_steps=5", f"--init_from={init_from}")
    assert process.poll() is None
    kill(process)
    train(
        *flags, "--init_from=resume", f"--max_steps={max(series(tmp_path / 'log', 'train_loss'))}"
    )
    assert not (tmp_path / "log-1").exists()


def test_a_file_system_without_locks(text, tmp_path):
    (tmp_path / "fcntl.py").write_text(
        "LOCK_EX = LOCK_NB = LOCK_UN = 0\ndef flock(*_):\n    raise OSError(37, 'No locks')\n"
    )
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=2"
    assert "can't be locked" in train(*flags, env={"PYTHONPATH": str(tmp_path)}).stdout
    assert list(series(tmp_path / "log", "train_loss")) == [0, 1]


def test_log_dir_that_cannot_be_written(text, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(f"--data={text}", f"--log_dir={tmp_path}/file/log")
    assert result.returncode == 1 and f"{tmp_path}/file/log" in result.stderr.splitlines()[-1]


def test_data_that_has_changed(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "val.npy", rng.integers(0, 50257, 3000, dtype=np.uint16))
    np.save(tmp_path / "train.npy", rng.integers(0, 50257, 20000, dtype=np.uint16))
    flags = f"--data={tmp_path}", f"--log_dir={tmp_path}/log", "--max_steps=2", "--save_every=2"
    train(*flags)
    np.save(tmp_path / "train.npy", rng.integers(0, 50257, 20001, dtype=np.uint16))
    line = mistake(*flags, "--init_from=resume")
    assert "train.npy had 20000 tokens, has 20001" in line and "--init_from=" in line
    np.save(tmp_path / "train.npy", rng.integers(0, 50257, 20000, dtype=np.uint16))
    train(*flags, "--init_from=resume")
    (tmp_path / "train.npy").rename(tmp_path / "train_0.npy")
    assert "train_0.npy had 0 tokens, has 20000" in mistake(*flags, "--init_from=resume")


def test_checkpoint_of_another_run(text, tmp_path):
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=2", "--save_every=2"
    train(*flags)
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "log").iterdir())
    other = "--n_layer=1 --seed=2 --T=16 --total_batch_size=256 --n_head=4 --n_embd=64".split()
    other += ["--optimizer=adamw", "--encoding=gpt2"]
    line = mistake(*flags, "--init_from=resume", *other)
    for change in (
        "n_layer was 2, is 1",
        "seed was 1337, is 2",
        "T was 32, is 16",
        "total_batch_size was 512",
        "n_head was 2, is 4",
        "n_embd was 32, is 64",
        "optimizer was muon, is adamw",
        "encoding was bytes, is gpt2",
    ):
        assert change in line
    assert "val_steps" not in line
    assert before == sorted((path.name, path.read_bytes()) for path in (tmp_path / "log").iterdir())


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_damaged_or_hostile_checkpoint_is_not_used(text, tmp_path):
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=4"
    train(*flags, "--save_every=2")
    newest = tmp_path / "log" / "ckpt_000004.pt"
    torch.save({"model": Malicious()}, newest)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(newest, weights_only=True)
    result = train(*flags, "--init_from=resume")
    assert (
        "ckpt_000004.pt" in result.stdout
        and "resuming at step 2" in result.stdout
    )
    assert not os.path.exists("pwned")
    for path in (tmp_path / "log").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:5000])
    before = log_of(tmp_path / "log")
    assert "no checkpoint" in mistake(*flags, "--init_from=resume")
    assert log_of(tmp_path / "log") == before


def test_only_the_newest_are_kept(text, tmp_path):
    """Those of every 5000th step stay, too: a run that went wrong slowly can go back to one."""
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--save_every=2", "--keep=2"
    train(*flags, "--max_steps=5")
    old = tmp_path / "log" / "ckpt_000004.pt"
    for step in (5000, 5001, 10000):
        checkpoint = load(old)
        checkpoint["step"] = step
        torch.save(checkpoint, tmp_path / "log" / f"ckpt_{step:06d}.pt")
    train(*flags, "--max_steps=10003", "--init_from=resume")
    steps = sorted(int(path.stem[5:]) for path in (tmp_path / "log").glob("*.pt"))
    assert steps == [5000, 10000, 10002, 10003]


def test_a_damaged_checkpoint_does_not_crowd_out_good_ones(text, tmp_path):
    """A file that does not load, with a later step in its name, does not count as kept."""
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--keep=1", "--save_every=2"
    train(*flags, "--max_steps=2")
    (tmp_path / "log" / "ckpt_000009.pt").write_bytes(b"damaged")
    train(*flags, "--max_steps=4", "--init_from=resume")
    assert {path.name for path in (tmp_path / "log").glob("*.pt")} == {
        "ckpt_000004.pt",
        "ckpt_000009.pt",
    }


def test_never_is_never(text, tmp_path):
    """With ..._every=0, nothing happens at the end either."""
    never = [f"--{what}_every=0" for what in ("log", "val", "hella", "sample", "save")]
    result = train(f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=2", *never)
    assert "done: 2 steps" in result.stdout and log_of(tmp_path / "log") == []
    assert {path.name for path in (tmp_path / "log").iterdir()} == {"log.jsonl", "train_gpt2.py"}


def test_tokenizer_that_cannot_be_fetched(shards, tmp_path):
    """The run says at the start that there are no samples, and trains."""
    result = train(
        f"--data={shards[0]}",
        f"--log_dir={tmp_path}/log",
        "--max_steps=1",
        "--sample_every=1",
        env={"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "HTTPS_PROXY": "http://127.0.0.1:9"},
    )
    assert "no samples" in result.stdout and "Traceback" not in result.stderr
    assert list(series(tmp_path / "log", "train_loss")) == [0]


def test_init_from_nowhere(text, tmp_path):
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=1"
    train(*flags)
    before = sorted(tmp_path.rglob("*"))
    assert "nowhere" in mistake(*flags, f"--init_from={tmp_path}/nowhere").lower()
    assert sorted(tmp_path.rglob("*")) == before  # the earlier run is still in place


def test_context_longer_than_the_pretrained(shards, tmp_path):
    from train_gpt2 import GPT, GPTConfig, save_pretrained

    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=8))
    save_pretrained(model, tmp_path / "hf")
    flags = (
        f"--data={shards[0]}",
        f"--log_dir={tmp_path}/log",
        f"--init_from={tmp_path}/hf",
        "--max_steps=1",
    )
    line = mistake(*flags)
    assert "T=32" in line and "16" in line
    train(*flags, "--T=16", "--B=16")


def test_a_clock_that_jumps(text, tmp_path):
    """time.time() jumps back and forth by years; the reported times are still right."""
    (tmp_path / "sitecustomize.py").write_text(
        "import random, time\ntime.time = lambda: random.uniform(0, 4e9)\n"
    )
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=5"
    began = time.perf_counter()
    train(*flags, env={"PYTHONPATH": str(tmp_path)})
    seconds = time.perf_counter() - began
    assert 0 < sum(series(tmp_path / "log", "dt").values()) < seconds
    assert all(rate > 0 for rate in series(tmp_path / "log", "tokens_per_sec").values())


LIMITED = """
import os, resource, runpy, sys, torch
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), used + (3 << 30)))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="limits on Linux")
def test_out_of_memory(shards, tmp_path):
    """The logits take 3.3 GB, and then comes the loss, but only 3 GB are available."""
    (tmp_path / "limited.py").write_text(LIMITED)
    flags = command(f"--data={shards[0]}", "--B=512", "--total_batch_size=16384", "--val_every=0")
    result = subprocess.run(
        [flags[0], f"{tmp_path}/limited.py", *flags[1:], f"--log_dir={tmp_path}/log"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 1
    assert "for less memory, lower --B=512" in result.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_out_of_memory(text, tmp_path):
    result = run(
        f"--data={text}",
        f"--log_dir={tmp_path}/log",
        "--device=cuda",
        "--B=131072",
        "--T=1",
        "--total_batch_size=131072",
        "--n_embd=65536",
        "--n_layer=1",
        "--val_every=0",
    )
    assert result.returncode == 1 and "for less memory, lower --B=131072" in result.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "flags", [["--dtype=bfloat16", "--compile=1"], ["--dtype=float32"], ["--dtype=float16"]]
)
def test_cuda(text, tmp_path, flags):
    train(f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=20", "--device=cuda", *flags)
    losses = series(tmp_path / "log", "train_loss")
    assert losses[19] < losses[0] - 0.3


FULL = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)  # instead of a full disk
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits on Linux")
def test_no_space_for_a_checkpoint(text, tmp_path):
    """It warns while it trains and fails at the end. Earlier checkpoints are still there."""
    flags = [f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=6", "--save_every=2"]
    train(*flags, "--max_steps=2")
    saved = (tmp_path / "log" / "ckpt_000002.pt").read_bytes()
    (tmp_path / "full.py").write_text(FULL)
    python, *rest = command(*flags, "--init_from=resume")
    result = subprocess.run(
        [python, f"{tmp_path}/full.py", f"{len(saved) // 2}", *rest],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 1
    assert "warning: " in result.stdout and "ckpt_000004.pt can't be saved" in result.stdout
    assert "File too large" in result.stderr
    names = {path.name for path in (tmp_path / "log").iterdir()}
    assert names == {"log.jsonl", "train_gpt2.py", "ckpt_000002.pt"}
    assert (tmp_path / "log" / "ckpt_000002.pt").read_bytes() == saved
    train(*flags, "--init_from=resume")  # works once there is room
    assert list(series(tmp_path / "log", "train_loss")) == list(range(6))


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_that_are_not_numbers(text, tmp_path, processes):
    """All ranks stop before the update and save nothing."""
    flags = [f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=4", "--B=4"]
    train(*flags, "--max_steps=2", "--save_every=2")
    path = tmp_path / "log" / "ckpt_000002.pt"
    checkpoint = load(path)
    checkpoint["model"]["transformer.h.1.mlp.c_fc.weight"][0, 0] = float("nan")
    torch.save(checkpoint, path)
    result = run(*flags, "--init_from=resume", "--val_every=0", processes=processes)
    assert result.returncode == 1
    # don't count lines: if Python's output is unbuffered, two ranks can write into one line
    assert result.stderr.count("step 2: loss nan") == processes, result.stderr
    assert list((tmp_path / "log").glob("*.pt")) == [path]


def test_flipped_bits_in_a_checkpoint(text, tmp_path):
    """A bit in the middle of a tensor is flipped, which torch.load would not notice."""
    flags = [f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=4", "--save_every=2"]
    train(*flags)
    path = tmp_path / "log" / "ckpt_000004.pt"
    expected = load(path)["model"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    result = train(*flags, "--init_from=resume")
    assert "wrong checksum" in result.stdout and "at step 2" in result.stdout
    assert_same_tensors(load(path)["model"], expected)


def test_a_damaged_log_is_kept(text, tmp_path):
    """Lines that are no longer JSON don't stop a run and are kept."""
    flags = [f"--data={text}", f"--log_dir={tmp_path}/log", "--save_every=2"]
    train(*flags, "--max_steps=4")
    log = tmp_path / "log" / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lines[2] = b'{"st\xff\x00p": ' + lines[2][10:]
    log.write_bytes(b"".join(lines) + b'{"ste')
    train(*flags, "--max_steps=6", "--init_from=resume")
    now = log.read_bytes().splitlines(keepends=True)
    assert now[: len(lines)] == lines
    for step in (4, 5):
        assert sum(line.startswith(b'{"step": %d, "train_loss"' % step) for line in now) == 1
    # that of the old last step, which is measured no more
    assert sum(line.startswith(b'{"step": 4, "val_loss"') for line in now) == 1


WANDB = ["--max_steps=2", "--wandb_log=1"]


def test_steps_that_were_not_logged(text, tmp_path):
    """A checkpoint knows its place in the log, even if the run that saved it wrote no line."""
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--save_every=2"
    never = [f"--{what}_every=0" for what in ("log", "val", "sample")]
    train(*flags, "--max_steps=4")
    (tmp_path / "log" / "ckpt_000004.pt").unlink()
    train(*flags, "--max_steps=4", "--init_from=resume", *never)
    for _ in range(2):
        train(*flags, "--max_steps=6", "--init_from=resume")
        (tmp_path / "log" / "ckpt_000006.pt").unlink()
    assert list(series(tmp_path / "log", "train_loss")) == [0, 1, 4, 5]


def test_wandb_that_is_not_installed(text, tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "wandb.py").write_text("raise ImportError(\"No module named 'wandb'\")")
    path = {"PYTHONPATH": str(tmp_path / "path")}
    result = run(f"--data={text}", f"--log_dir={tmp_path}/log", *WANDB, env=path)
    assert result.returncode == 1 and "No module named 'wandb'" in result.stderr


def test_wandb_without_a_login(text, tmp_path):
    """A warning; the run goes on offline."""
    flags = [f"--data={text}", f"--log_dir={tmp_path}/log", *WANDB]
    home = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "netrc")}
    result = train(*flags, env={**home, "WANDB_DIR": str(tmp_path)})
    assert "warning: Weights & Biases" in result.stdout and "wandb login" in result.stdout
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(series(tmp_path / "log", "train_loss")) == 2
