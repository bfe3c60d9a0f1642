"""What goes wrong around a run: folders, checkpoints, terminals, memory."""

import json
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
    fork,
    kill,
    load,
    log_of,
    mistake,
    run,
    series,
    train,
    wait_for,
    world,
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
    assert "ckpt_000004.pt" in result.stdout and "resuming at step 2" in result.stdout
    assert not os.path.exists("pwned")
    for path in (tmp_path / "log").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:5000])
    before = log_of(tmp_path / "log")
    assert "no checkpoint" in mistake(*flags, "--init_from=resume")
    assert log_of(tmp_path / "log") == before


def test_a_killed_save_leaves_no_file_for_ever(text, tmp_path):
    """The next save writes over what a kill has left."""
    flags = [f"--data={text}", f"--log_dir={tmp_path}/log", "--save_every=2"]
    train(*flags, "--max_steps=2")
    (tmp_path / "log" / "ckpt.pt.tmp").write_bytes(b"half a checkpoint")
    train(*flags, "--max_steps=4", "--init_from=resume")
    assert not list((tmp_path / "log").glob("*.tmp"))


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


def test_zero_turns_events_off(text, tmp_path):
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


def test_folders_without_weights_are_named(text, tmp_path):
    """They are not looked for on the hub."""
    (tmp_path / "empty").mkdir()
    flags = f"--data={text}", f"--log_dir={tmp_path}/log"
    line = mistake(*flags, f"--init_from={tmp_path}/none")
    assert line.rstrip() == f"{tmp_path}/none: there is no such folder"
    for source in (tmp_path / "empty", text):
        assert f"{source}: neither a run" in mistake(*flags, f"--init_from={source}")
    assert "no such file or folder" in mistake(f"--data={tmp_path}/none.txt", flags[1])


def test_constants_that_change_are_logged(text, tmp_path):
    """Where a resumed run has others, its log says so at that step."""
    flags = [f"--data={text}", f"--log_dir={tmp_path}/log"]
    train(*flags, "--max_steps=2")
    train(*flags, "--max_steps=2", "--init_from=resume")
    assert not any("changed" in event for event in log_of(tmp_path / "log"))
    train(*flags, "--max_steps=4", "--max_lr=2e-3", "--init_from=resume")
    [changed] = [event for event in log_of(tmp_path / "log") if "changed" in event]
    assert changed["step"] == 2
    (tmp_path / "log" / "log.jsonl").unlink()
    train(*flags, "--max_steps=6", "--init_from=resume")
    first = (tmp_path / "log" / "log.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["constants"]["max_steps"] == 6
    assert changed["changed"] == {"max_steps": 4, "max_lr": 2e-3, "init_from": "resume"}


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
def test_cuda_trains(text, tmp_path, flags):
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


def test_weights_without_a_finite_loss_are_not_saved(text, tmp_path):
    """The last update is finite, but it makes the weights so large that the loss is not."""
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=1", "--val_every=0"
    assert "step 1: loss" in mistake(
        *flags, "--optimizer=adamw", "--max_lr=1e17", "--warmup_steps=0"
    )
    assert not list((tmp_path / "log").glob("*.pt"))


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
    now = [line for line in now if b'"changed"' not in line]  # max_steps is now 6
    assert now[: len(lines)] == lines
    for step in (4, 5):
        assert sum(line.startswith(b'{"step": %d, "train_loss"' % step) for line in now) == 1
    # that of the old last step, which is measured no more
    assert sum(line.startswith(b'{"step": 4, "val_loss"') for line in now) == 1


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


def files(folder):
    """{name: contents} of all files below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_resume_where_the_checkpoints_are_gone(shards, tmp_path):
    """The log and hf/ of the finished run move aside; they are not overwritten."""
    flags = f"--data={shards[0]}", f"--log_dir={tmp_path}/log", "--max_steps=2", "--hella_every=0"
    train(*flags)
    (tmp_path / "log" / "ckpt_000002.pt").unlink()
    before = files(tmp_path / "log")
    assert "hf/model.safetensors" in before and "log.jsonl" in before
    assert "no checkpoint" in train(*flags, "--init_from=resume", "--seed=2").stdout
    assert files(tmp_path / "log-1") == before
    assert (tmp_path / "log" / "ckpt_000002.pt").exists()


def test_a_folder_of_other_things_is_used(text, tmp_path):
    """It is not renamed. Of two runs in it, only what the first has written moves aside, and not
    the folders of other runs."""
    folder = tmp_path / "proj"
    (folder / "gpt2").mkdir(parents=True)
    mine = {"notes.txt": b"mine", "train_gpt2.py": b"mine, too", "gpt2/log.jsonl": b"a run"}
    for name, content in mine.items():
        (folder / name).write_bytes(content)
    flags = f"--data={text}", f"--log_dir={folder}", "--max_steps=1"
    train(*flags)
    assert not (tmp_path / "proj-1").exists()
    assert mine.items() <= files(folder).items()
    train(*flags)
    assert set(files(tmp_path / "proj-1")) == {
        *("log.jsonl", "ckpt_000001.pt", "train_gpt2.py", "train_gpt2_000000.py")
    }
    for name in ("notes.txt", "gpt2/log.jsonl"):
        assert files(folder)[name] == mine[name]


def test_checkpoints_without_a_log_are_not_mixed_with_new_ones(text, tmp_path):
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=2"
    train(*flags)
    (tmp_path / "log" / "log.jsonl").unlink()
    before = files(tmp_path / "log")
    train(*flags, "--seed=2", "--keep=1")
    assert files(tmp_path / "log-1")["ckpt_000002.pt"] == before["ckpt_000002.pt"]


def test_a_link_as_log_dir(text, tmp_path):
    """An older run stays on the disk that the link leads to."""
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    for _ in range(2):
        train(f"--data={text}", f"--log_dir={tmp_path}/link", "--max_steps=1")
    assert (tmp_path / "link").is_symlink()
    for name in ("run", "run-1"):
        assert (tmp_path / "disk" / name / "ckpt_000001.pt").exists()


def test_the_current_folder_as_log_dir(text, tmp_path):
    (tmp_path / "here").mkdir()
    flags = [*TINY, f"--data={text}", "--log_dir=.", "--max_steps=1"]
    for _ in range(2):
        assert fork(*flags, cwd=tmp_path / "here").returncode == 0
    for name in ("here", "here-1"):
        assert (tmp_path / name / "ckpt_000001.pt").exists()


def test_the_script_s_own_folder_as_log_dir(text):
    before = (ROOT / "train_gpt2.py").stat()
    assert "a folder of its own" in mistake(f"--data={text}", f"--log_dir={ROOT}")
    assert (ROOT / "train_gpt2.py").stat() == before


def test_the_home_folder_in_paths(text, tmp_path):
    (tmp_path / "my.txt").write_bytes(text.read_bytes())
    flags = [*TINY, "--data=~/my.txt", "--log_dir=~/runs/a", "--max_steps=1"]
    assert fork(*flags, env={"HOME": str(tmp_path)}, cwd=tmp_path).returncode == 0
    assert (tmp_path / "runs" / "a" / "ckpt_000001.pt").exists()
    more = "--init_from=~/runs/a", "--log_dir=b"
    assert fork(*flags, *more, env={"HOME": str(tmp_path)}, cwd=tmp_path).returncode == 0
    assert not (tmp_path / "~").exists()


def test_the_log_is_json(text, tmp_path):
    """Also where a number is not finite: NaN and Infinity are not JSON."""

    def refuse(constant):
        raise ValueError(constant)

    flags = [f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=4", "--save_every=2"]
    train(*flags, "--max_steps=2")
    path = tmp_path / "log" / "ckpt_000002.pt"
    checkpoint = load(path)
    checkpoint["model"]["transformer.ln_f.weight"].fill_(float("nan"))
    torch.save(checkpoint, path)
    result = run(*flags, "--init_from=resume", "--val_every=2")
    assert result.returncode == 1 and "step 2: loss nan" in result.stderr
    lines = (tmp_path / "log" / "log.jsonl").read_text().splitlines()
    events = [json.loads(line, parse_constant=refuse) for line in lines]
    assert events[-1] == {"step": 2, "val_loss": None}
    assert sorted((tmp_path / "log").glob("*.pt")) == [path]


@pytest.mark.skipif(sys.platform != "linux", reason="limits on Linux")
def test_no_space_for_a_log_line(text, tmp_path):
    """A warning; training goes on until something has to be saved."""
    (tmp_path / "full.py").write_text(FULL)
    python, *rest = command(f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=20")
    result = subprocess.run(
        # the prompt is in the log's first line
        [python, f"{tmp_path}/full.py", "100000", *rest, "--n_embd=8", f"--prompt={'x' * 97000}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "log.jsonl: [Errno 27] File too large" in result.stdout
    assert "step    19/20 | loss" in result.stdout and "step    20/20 | val loss" in result.stdout


def test_what_has_changed_is_said_when_a_run_is_extended(text, tmp_path):
    """The constants and the learning rate. The last evaluation stays in the log."""
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--val_every=10", "--warmup_steps=0"
    train(*flags, "--max_steps=12")
    last = series(tmp_path / "log", "val_loss")[12]
    said = train(*flags, "--max_steps=24", "--init_from=resume", "--max_lr=4e-3").stdout
    assert "max_steps was 12, is 24" in said and "max_lr was 0.008, is 0.004" in said
    assert "learning rate at step 12 was 5.00e-04, is 2.25e-03" in said
    assert series(tmp_path / "log", "val_loss").keys() == {0, 10, 12, 20, 24}
    assert series(tmp_path / "log", "val_loss")[12] == last
    said = train(*flags, "--max_steps=24", "--init_from=resume", "--max_lr=4e-3").stdout
    assert "changed since" not in said and "learning rate" not in said


def test_an_output_that_cannot_show_a_character(text, tmp_path):
    """As on Windows, where output to a file has 256 characters."""
    (tmp_path / "accents.txt").write_text("\u0416\u4e2d\u00e9 " * 4000, encoding="utf-8")
    flags = f"--data={tmp_path}/accents.txt", f"--log_dir={tmp_path}/log", "--max_steps=20"
    result = train(*flags, "--sample_every=20", env={"PYTHONIOENCODING": "cp1252"})
    assert result.stdout.count("sample: ") == 2 and "done: 20 steps" in result.stdout


def test_several_processes_on_mps(text, tmp_path, monkeypatch):
    """Its one line names what works."""
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    flags = [*TINY, f"--data={text}", f"--log_dir={tmp_path}/log", "--device=mps"]
    result = fork(*flags, env=next(world(2)))
    assert result.returncode == 1 and "use --device=cpu" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_compile_without_a_compiler(text, tmp_path):
    """The last line names --compile=false."""
    paths = [path for path in sys.path if "site-packages" in path]
    env = {"PATH": str(tmp_path), "CC": "", "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join(paths)
    result = run(f"--data={text}", f"--log_dir={tmp_path}/log", "--compile=1", env=env)
    assert result.returncode == 1
    assert "--compile=false" in result.stderr.splitlines()[-1] and "Traceback" in result.stderr


def test_a_second_run_in_one_python_process(text, tmp_path):
    """As by %run in a notebook: the lock is free again, and so is Ctrl-C."""
    script = str(ROOT / "train_gpt2.py")
    (tmp_path / "notebook.py").write_text(
        "import runpy, signal, sys\n"
        f"sys.argv = ['train_gpt2.py', *{TINY!r}, *sys.argv[1:]]\n"
        "before = signal.getsignal(signal.SIGINT)\n"
        "for _ in range(2):\n"
        f"    kept = runpy.run_path({script!r}, run_name='__main__')\n"
        "    assert signal.getsignal(signal.SIGINT) is before\n"
    )
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=1"
    result = subprocess.run(
        [sys.executable, tmp_path / "notebook.py", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "log-1" / "ckpt_000001.pt").exists()
