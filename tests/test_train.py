"""Whole runs: on several processes, resumed, compiled, stopped, exported."""

import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    Fork,
    command,
    finish,
    fork,
    in_a_fork,
    load,
    log_of,
    series,
    start,
    train,
    variant,
    wait_for,
)

TWELVE = ["--max_steps=12", "--save_every=12", "--sample_every=12"]


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """A run of twelve steps on one process, with B = 8 in two micro-steps."""
    log_dir = tmp_path_factory.mktemp("straight") / "log"
    result = train(f"--data={text}", f"--log_dir={log_dir}", *TWELVE)
    return log_dir, result.stdout


def test_the_log_has_every_event_once(straight):
    log_dir, stdout = straight
    first = json.loads((log_dir / "log.jsonl").read_text().splitlines()[0])
    assert first["constants"]["n_embd"] == 32 and first["torch"] == torch.__version__
    losses, val = series(log_dir, "train_loss"), series(log_dir, "val_loss")
    assert list(losses) == list(range(12)) and list(val) == [0, 10, 12]
    assert losses[0] == pytest.approx(math.log(256), abs=0.1) and losses[11] < losses[0]
    assert val[12] < val[0]
    event = next(event for event in log_of(log_dir) if "train_loss" in event)
    assert set(event) == {"step", "train_loss", "lr", "grad_norm", "dt", "tokens_per_sec", "mfu"}
    assert event["tokens_per_sec"] == pytest.approx(512 / event["dt"])
    samples = [event for event in log_of(log_dir) if "sample" in event]
    assert [event["step"] for event in samples] == [12, 12]  # none from random weights
    assert all(event["sample"] in stdout for event in samples)
    control = re.compile(r"[^\t\n -~\xa0-\U0010ffff]")  # a random model writes all bytes
    assert not any(control.search(event["sample"]) for event in samples)
    assert log_of(log_dir)[-1]["step"] == 12


def test_a_checkpoint_holds_the_whole_run(straight):
    log_dir, stdout = straight
    names = {path.name for path in log_dir.iterdir()}
    assert names == {"ckpt_000012.pt", "log.jsonl", "train_gpt2.py"}
    assert "done: 12 steps, 6,144 tokens, " in stdout and stdout.rstrip().endswith(str(log_dir))
    checkpoint = load(log_dir / "ckpt_000012.pt")
    assert {"model", "optimizers", "step", "config"} <= checkpoint.keys()
    assert checkpoint["step"] == 12 and checkpoint["config"]["T"] == 32
    assert "transformer.h.0.attn.c_attn.weight" in checkpoint["model"]


def test_reported_losses_are_those_of_the_checkpoint(text, straight):
    """Computes the val loss from the files alone: the saved weights and the text's last tenth."""
    import numpy as np

    from train_gpt2 import GPT, GPTConfig

    log_dir, _ = straight
    checkpoint = load(log_dir / "ckpt_000012.pt")
    model = GPT(GPTConfig(**checkpoint["config"]["model"])).eval()
    model.load_state_dict(checkpoint["model"])
    val = np.frombuffer(text.read_bytes(), np.uint8)[-12000:].astype(int)
    windows = torch.tensor(np.stack([val[i * 32 : i * 32 + 33] for i in range(4 * 16)]))
    with torch.no_grad():
        loss = model(windows[:, :-1], windows[:, 1:]).item()
    assert series(log_dir, "val_loss")[12] == pytest.approx(loss, abs=1e-4)


def assert_same_series(one, other):
    """The same losses and norms of two runs, apart from rounding."""
    for name in ("train_loss", "grad_norm", "val_loss"):
        expected, found = series(one, name), series(other, name)
        assert found.keys() == expected.keys()
        for step in expected:
            assert found[step] == pytest.approx(expected[step], abs=2e-4), (name, step)


@pytest.mark.parametrize(
    "processes, B", [(1, 1), (1, 3), (1, 64), (2, 4), (3, 5), (5, 8), (7, 1), (7, 3)]
)
def test_the_same_losses_for_any_topology(straight, text, tmp_path, processes, B):
    """A step has 16 windows, whatever number of rows and processes they are spread over. The 374
    windows of the validation split are spread over them as well."""
    flags = f"--data={text}", "--max_steps=12", f"--B={B}"
    train(*flags, f"--log_dir={tmp_path}/log", processes=processes)
    assert_same_series(straight[0], tmp_path / "log")


@pytest.mark.parametrize("flags", [["--optimizer=adamw"], ["--dtype=float16"]])
def test_the_same_losses_on_three_processes(text, tmp_path, flags):
    """Also with the whole validation split, of 374 windows."""
    for processes, B in ((1, 8), (3, 5)):
        log_dir = f"--log_dir={tmp_path}/{processes}"
        more = "--max_steps=8", "--val_steps=100", f"--B={B}"
        train(f"--data={text}", log_dir, *more, *flags, processes=processes)
    if "--dtype=float16" in flags:
        for name in ("train_loss", "val_loss"):  # rounding differs more
            one, other = (series(tmp_path / n, name) for n in ("1", "3"))
            assert other == pytest.approx(one, abs=5e-3)
    else:
        assert_same_series(tmp_path / "1", tmp_path / "3")


def test_resume_at_the_end_evaluates_and_is_done(straight, text):
    log_dir, _ = straight
    before = log_of(log_dir)
    result = train(f"--data={text}", f"--log_dir={log_dir}", *TWELVE, "--init_from=resume")
    assert "done" in result.stdout and "val loss" in result.stdout
    assert log_of(log_dir) == before


def test_no_steps_write_nothing(straight, text):
    """Evaluating and sampling without training change nothing, even beside a training run."""
    log_dir, _ = straight
    before = {path.name: path.read_bytes() for path in log_dir.iterdir()}
    flags = "--max_steps=0", "--init_from=resume", "--n_samples=3", "--prompt=KING"
    with open(f"{log_dir}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a training run does
        flags += "--val_steps=1", "--sample_every=1", "--wandb_log=1"
        result = train(f"--data={text}", f"--log_dir={log_dir}", *flags)
    assert result.stdout.count("sample: KING") == 3 and "val loss" in result.stdout
    assert {path.name: path.read_bytes() for path in log_dir.iterdir()} == before


def test_copies_of_checkpoints_are_left_alone(straight, text, tmp_path):
    """They are neither resumed from nor removed. log_dir may be spelled in odd ways."""
    shutil.copytree(straight[0], tmp_path / "log")
    copies = [tmp_path / "log" / f"ckpt_{name}.pt" for name in ("best", "000012_good")]
    for path in copies:
        shutil.copy(straight[0] / "ckpt_000012.pt", path)
    flags = f"--data={text}", f"--log_dir={tmp_path}//log//", "--init_from=resume", "--keep=1"
    train(*flags, "--max_steps=14", "--save_every=1")
    result = train(*flags, "--max_steps=15", "--save_every=1")
    assert "at step 14" in result.stdout
    newest = tmp_path / "log" / "ckpt_000015.pt"
    assert set((tmp_path / "log").glob("*.pt")) == {newest, *copies}


def test_a_resumed_run_uses_the_constants_of_its_launch(straight, text, tmp_path):
    """The constants stored with the optimizer are not used."""
    shutil.copytree(straight[0], tmp_path / "log")
    train(
        f"--data={text}",
        f"--log_dir={tmp_path}/log",
        "--max_steps=13",
        "--init_from=resume",
        "--weight_decay=0.25",
        "--dropout=0.2",
        "--save_every=1",
    )
    checkpoint = load(tmp_path / "log" / "ckpt_000013.pt")
    groups = [group for opt in checkpoint["optimizers"] for group in opt["param_groups"]]
    assert {group["weight_decay"] for group in groups} == {0.25, 0.0}
    assert checkpoint["config"]["model"]["dropout"] == 0.2


def test_dropout_is_on_again_after_an_evaluation(straight, text, tmp_path):
    train(f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=1", "--dropout=0.5")
    assert series(tmp_path / "log", "val_loss")[0] == series(straight[0], "val_loss")[0]
    losses = [series(log_dir, "train_loss")[0] for log_dir in (straight[0], tmp_path / "log")]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_samples_change_nothing(text, tmp_path):
    """Dropout is on again after them, and draws what it would have drawn."""
    losses = []
    for every in (0, 1):
        log_dir = tmp_path / f"log-{every}"
        flags = f"--log_dir={log_dir}", "--max_steps=3", "--dropout=0.5", f"--sample_every={every}"
        train(f"--data={text}", *flags)
        losses.append(series(log_dir, "train_loss"))
    assert losses[0] == losses[1]


def test_dropout_differs_across_ranks(tmp_path):
    """On a text of one letter, where the ranks have the same data: their mean is not rank 0's."""
    (tmp_path / "a.txt").write_text("a" * 10_000)
    losses = []
    for processes in (1, 2):
        log_dir = tmp_path / f"log-{processes}"
        flags = f"--log_dir={log_dir}", "--max_steps=1", "--dropout=0.5", "--val_every=0"
        size = f"--total_batch_size={256 * processes}"
        train(f"--data={tmp_path}/a.txt", *flags, size, processes=processes)
        losses.append(series(log_dir, "train_loss")[0])
    assert abs(losses[0] - losses[1]) > 1e-5


def test_val_steps_end_with_the_val_split(text, tmp_path):
    """It is read once: 12,000 tokens are 374 windows, of which 23 steps take 368."""
    losses = []
    for val_steps in (23, 24, 40):
        log_dir = tmp_path / f"log-{val_steps}"
        flags = f"--log_dir={log_dir}", "--max_steps=1", f"--val_steps={val_steps}"
        train(f"--data={text}", *flags)
        losses.append(series(log_dir, "val_loss"))
    assert losses[0] != losses[1] == losses[2]


def test_large_gradients_are_clipped(text, tmp_path):
    """Gradients clipped far below AdamW's epsilon move nothing."""
    flags = (
        f"--data={text}",
        "--max_steps=3",
        "--optimizer=adamw",
        "--weight_decay=0",
        "--val_every=1",
    )
    runs = [
        Fork(*TINY, *flags, f"--grad_clip={clip}", f"--log_dir={tmp_path}/{clip}")
        for clip in ("1e-12", "0")
    ]
    assert [finish(run).returncode for run in runs] == [0, 0]
    clipped, free = (series(tmp_path / clip, "val_loss") for clip in ("1e-12", "0"))
    assert clipped[3] == pytest.approx(clipped[0], abs=1e-4)
    assert free[3] < free[0] - 0.01
    assert series(tmp_path / "1e-12", "grad_norm")[0] > 1  # the log has the norm before clipping


def test_a_compiled_run_has_the_same_losses(straight, text, tmp_path):
    """It trains, evaluates and samples. The checkpoint loads uncompiled; losses are the same."""
    flags = f"--data={text}", f"--log_dir={tmp_path}/log"
    save = "--save_every=5"
    train(*flags, "--max_steps=5", "--compile=1", "--sample_every=3", "--val_every=3", save)
    assert [event["step"] for event in log_of(tmp_path / "log") if "sample" in event] == [
        *(3, 3, 5, 5)
    ]
    assert (
        load(tmp_path / "log" / "ckpt_000005.pt")["model"].keys()
        == load(straight[0] / "ckpt_000012.pt")["model"].keys()
    )
    train(*flags, "--max_steps=12", "--init_from=resume")
    for step, loss in list(series(straight[0], "train_loss").items())[:5]:
        assert series(tmp_path / "log", "train_loss")[step] == pytest.approx(loss, abs=2e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_signal_saves_and_exits(text, tmp_path, number, processes):
    flags = (
        f"--data={text}",
        f"--log_dir={tmp_path}/log",
        "--max_steps=5000",
        "--save_every=0",
        "--B=4",
    )
    process = start(*flags, processes=processes) if processes > 1 else Fork(*TINY, *flags)
    log = tmp_path / "log" / "log.jsonl"
    wait_for(lambda: log.exists() and '"step": 5, "train_loss"' in log.read_text(), process)
    os.kill(process.pid, number)
    result = finish(process)
    if processes == 1:
        assert result.returncode == 0 and not result.stderr
    ours = [line for line in result.stderr.splitlines() if "train_gpt2.py" in line]
    assert not ours, result.stderr  # torchrun reports its own exit with a traceback
    (path,) = (tmp_path / "log").glob("*.pt")
    step = load(path)["step"]
    assert f"stopped at step {step}" in result.stdout
    assert list(series(tmp_path / "log", "train_loss")) == list(range(step))
    train(*flags, "--init_from=resume", f"--max_steps={step + 2}")
    assert list(series(tmp_path / "log", "train_loss")) == list(range(step + 2))


@pytest.mark.parametrize(
    "moment, flags",
    [
        # before the first step, while it compiles: there is nothing to save
        ("constants", ["--compile=1", "--val_every=0"]),
        ("train_loss", ["--val_every=1", "--val_steps=20", "--B=1"]),  # while it evaluates
        # while it saves
        (
            "train_loss",
            ["--save_every=1", "--n_embd=768", "--total_batch_size=128", "--optimizer=adamw"],
        ),
    ],
)
def test_a_stop_signal_during_other_work(text, tmp_path, moment, flags):
    """The current step, or the next one, is finished and saved. The same holds if it comes twice at
    once, as when Slurm sends it to all processes and torchrun sends it to its own again."""
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=5000", *flags
    process = start(*flags) if "--compile=1" in flags else Fork(*TINY, *flags)
    log = tmp_path / "log" / "log.jsonl"
    wait_for(lambda: log.exists() and f'"{moment}"' in log.read_text(), process)
    for _ in range(2):
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    paths = sorted((tmp_path / "log").glob("ckpt_*.pt"))
    step = load(paths[-1])["step"] if paths else 0
    assert (step == 0) == (moment == "constants")
    assert f"stopped at step {step}" in result.stdout and step <= 5
    assert list(series(tmp_path / "log", "train_loss")) == list(range(step))


def test_a_second_signal_leaves_at_once(text, tmp_path):
    """The first step takes a minute. The first signal lets it go on, the second ends the run."""
    large = "--total_batch_size=65536", "--B=1", "--n_embd=256", "--n_layer=8"
    log_dir = f"--log_dir={tmp_path}/log"
    process = Fork(*TINY, f"--data={text}", log_dir, *large, "--val_steps=1")
    log = tmp_path / "log" / "log.jsonl"
    wait_for(lambda: log.exists() and '"val_loss"' in log.read_text(), process)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    result = finish(process, 5)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert list((tmp_path / "log").glob("*.pt")) == []


def test_shards_end_in_a_folder_for_transformers(shards, tmp_path):
    """--data=folder trains on GPT-2's tokens, and --init_from can load the result."""
    from transformers import GPT2LMHeadModel

    from train_gpt2 import GPT, GPTConfig

    flags = f"--data={shards[0]}", f"--log_dir={tmp_path}/log"
    result = train(*flags, "--max_steps=3", "--prompt=Now is", "--sample_every=3", "--save_every=3")
    assert all(
        event["sample"].startswith("Now is")
        for event in log_of(tmp_path / "log")
        if "sample" in event
    )
    losses = series(tmp_path / "log", "train_loss")
    assert losses[0] == pytest.approx(math.log(50257), abs=0.1)
    checkpoint = load(tmp_path / "log" / "ckpt_000003.pt")
    assert checkpoint["model"]["lm_head.weight"].shape == (50304, 32)
    model = GPT(GPTConfig(**checkpoint["config"]["model"])).eval()
    model.load_state_dict(checkpoint["model"])
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "log" / "hf").eval()
    x = torch.randint(50257, (2, 32))
    with torch.no_grad():
        assert torch.allclose(theirs(x).logits, model(x), atol=1e-4)

    # --max_steps=0 evaluates, samples and writes nothing
    result = train(
        f"--data={shards[1]}",
        f"--log_dir={tmp_path}/eval",
        "--max_steps=0",
        f"--init_from={tmp_path}/log/hf",
        "--sample_every=1",
    )
    assert "sample: " in result.stdout and not (tmp_path / "eval").exists()
    found = float(re.search(r"val loss ([0-9.]+)", result.stdout)[1])
    expected = series(tmp_path / "log", "val_loss")[3]
    assert found == pytest.approx(expected, abs=0.01)  # a little less, without rows of padding


def test_bfloat16_learns_as_float32(text, tmp_path, straight):
    train(f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=12", "--dtype=bfloat16")
    assert series(tmp_path / "log", "val_loss")[12] == pytest.approx(
        series(straight[0], "val_loss")[12], abs=0.05
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(name):
    from train_gpt2 import GPT, GPTConfig, Muon, make_optimizers

    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=2, n_head=2, n_embd=16))
    optimizers = make_optimizers(model, name, 0.1)
    groups = [(opt, group) for opt in optimizers for group in opt.param_groups]
    named = {id(p): name for name, p in model.named_parameters()}
    assert sorted(named) == sorted(id(p) for _, group in groups for p in group["params"])
    for opt, group in groups:
        for p in group["params"]:
            matrix_of_a_block = p.dim() == 2 and ".h." in named[id(p)]
            assert group["weight_decay"] == (0.1 if p.dim() == 2 else 0.0), named[id(p)]
            assert isinstance(opt, Muon) == (name == "muon" and matrix_of_a_block)


@in_a_fork
def test_the_same_steps_as_transformers(shards, tmp_path):
    """20 steps of our launch, and of transformers' GPT-2 with torch's AdamW and transformers'
    schedule, from the same weights and with the same windows."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

    from train_gpt2 import TokenLoader, load_split

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "weights")
    flags = [f"--data={shards[0]}", f"--init_from={tmp_path / 'weights'}", "--optimizer=adamw"]
    flags += [
        "--max_lr=1e-3",
        "--min_lr=1e-4",
        "--max_steps=20",
        "--val_every=0",
        "--hella_every=0",
    ]
    train(*flags, f"--log_dir={tmp_path / 'run'}", "--B=6")

    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 5, 20, min_lr=1e-4)
    schedule.step()  # its warmup begins with a rate of 0
    split = load_split(str(shards[0]), "train", "gpt2")
    loader = TokenLoader(split, 16, 32, 0, 1, "cpu", 50257, seed=1337)
    logged = [event for event in log_of(tmp_path / "run") if "train_loss" in event]
    assert len(logged) == 20
    for step, event in enumerate(logged):
        x, y = loader.batch(range(16 * step, 16 * step + 16), 0)
        logits = model(x).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert event["train_loss"] == pytest.approx(loss.item(), abs=2e-5)
        assert event["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert event["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        optimizer.zero_grad()
        if step != 4:  # the last one of our warmup, which is where theirs is already
            schedule.step()


def test_newton_schulz_against_the_singular_value_decomposition():
    """The singular vectors stay those of the SVD; all singular values come near 1."""
    from train_gpt2 import newton_schulz

    torch.manual_seed(0)
    m = torch.randn(2, 16, 48)
    u, s, vt = torch.linalg.svd(m, full_matrices=False)
    found = u.mT @ newton_schulz(m) @ vt.mT  # in the basis of the singular vectors
    strengths = found.diagonal(dim1=-2, dim2=-1)
    assert (found - torch.diag_embed(strengths)).abs().max() < 1e-3
    assert 0.6 < strengths.min() and strengths.max() < 1.3 and s.max() / s.min() > 2


def test_the_command_line_needs_no_folder(text, tmp_path):
    """If launched from elsewhere, it puts the log in the current folder."""
    result = subprocess.run(
        command(f"--data={text}", "--max_steps=1"), cwd=tmp_path, capture_output=True
    )
    assert result.returncode == 0 and (tmp_path / "log" / "baby" / "log.jsonl").exists()


def one_by_one(p, grads, lr, weight_decay, momentum=0.95):
    """Muon for one matrix, in plain steps: the published update, with the SVD instead of
    Newton-Schulz."""
    average = torch.zeros_like(p)
    for grad in grads:
        average = momentum * average + (1 - momentum) * grad
        direction = momentum * average + (1 - momentum) * grad
        maps = direction.split(p.shape[1]) if len(p) == 3 * p.shape[1] else [direction]
        steps = []
        for m in maps:
            u, _, vt = torch.linalg.svd(m, full_matrices=False)
            steps.append(0.2 * max(m.shape) ** 0.5 * u @ vt)
        p = p * (1 - lr * weight_decay) - lr * torch.cat(steps)
    return p


def test_muon_moves_all_matrices_as_one_by_one():
    """c_attn counts as three maps. Newton-Schulz leaves singular values between 0.7 and 1.2."""
    from train_gpt2 import GPT, GPTConfig, make_optimizers

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=2, n_head=2, n_embd=16))
    _, muon = make_optimizers(model, "muon", 0.1)
    for group in muon.param_groups:
        group["lr"] = 0.02
    matrices = [p for group in muon.param_groups for p in group["params"]]
    assert len(matrices) == 8
    before = [p.detach().clone() for p in matrices]
    grads = [[torch.randn_like(p) for p in matrices] for _ in range(3)]
    for step in grads:
        for p, grad in zip(matrices, step, strict=True):
            p.grad = grad
        muon.step()
    for i, p in enumerate(matrices):
        expected = one_by_one(before[i], [step[i] for step in grads], 0.02, 0.1)
        moved = (expected - before[i]).norm()
        assert (p - expected).norm() < 0.3 * moved, i
        assert abs((p - before[i]).norm() / moved - 1) < 0.15, i


def test_weight_decay_of_muon_shrinks_the_matrices():
    """By lr * weight_decay of what they were; the rest of the step is the same without it."""
    from train_gpt2 import GPT, GPTConfig, make_optimizers

    before, after = [], []
    for weight_decay in (0.0, 0.5):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=2, n_embd=16))
        _, muon = make_optimizers(model, "muon", weight_decay)
        for group in muon.param_groups:
            group["lr"] = 0.1
        matrices = [p for group in muon.param_groups for p in group["params"]]
        before.append([p.detach().clone() for p in matrices])
        for p in matrices:
            p.grad = torch.randn_like(p)
        muon.step()
        after.append([p.detach() for p in matrices])
    for old, plain, decayed in zip(before[0], *after, strict=True):
        assert torch.allclose(plain - decayed, 0.1 * 0.5 * old, atol=1e-6)


def test_a_stop_in_an_evaluation_repeats_it(text, tmp_path):
    """It gives up within a window, saves and leaves. Resumed, the run evaluates at the same step;
    its log is that of a run that was never stopped."""
    flags = f"--data={text}", "--max_steps=6", "--val_every=3", "--save_every=0", "--n_embd=256"
    flags += "--n_layer=6", "--val_steps=40", "--B=1", "--total_batch_size=64"
    train(*flags, f"--log_dir={tmp_path}/calm")
    log_dir = tmp_path / "log"
    process = Fork(*TINY, *flags, f"--log_dir={log_dir}")
    wait_for(lambda: (log_dir / "log.jsonl").exists(), process)
    wait_for(lambda: '"step": 2, "train_loss"' in (log_dir / "log.jsonl").read_text(), process)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    result = finish(process, 5)
    assert result.returncode == 0 and "stopped at step 3" in result.stdout
    assert list(series(log_dir, "val_loss")) == [0]
    train(*flags, f"--log_dir={log_dir}", "--init_from=resume")
    for name in ("train_loss", "val_loss"):
        assert series(log_dir, name) == series(tmp_path / "calm", name)


def test_a_changed_architecture_trains_to_the_end(shards, tmp_path, monkeypatch):
    """Without learned positions: that there will be no hf/ is said at the start. HellaSwag and
    samples work as before."""
    import hellaswag

    example = {"ctx": "To be", "endings": ["or not", "or so", "as I", "if you"], "label": 0}
    (tmp_path / "hellaswag.jsonl").write_text(json.dumps(example) + "\n")
    examples = hellaswag.load_examples(tmp_path / "hellaswag.jsonl")
    monkeypatch.setattr(hellaswag, "load_examples", lambda: examples)
    script = variant(
        tmp_path / "train_gpt2.py",
        "train_gpt2.py",
        ("            wpe=nn.Embedding(config.block_size, config.n_embd),\n", ""),
        ("        x = tok_emb + pos_emb\n", "        x = tok_emb\n"),
        ("        pos_emb = self.transformer.wpe.weight[: idx.shape[1]]", "        # "),
    )
    flags = f"--data={shards[0]}", f"--log_dir={tmp_path}/log", "--max_steps=3", "--sample_every=3"
    result = fork(*TINY, *flags, "--hella_every=3", script=script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.index("no hf/ at the end") < result.stdout.index("step ")
    assert "done: 3 steps" in result.stdout and result.stdout.count("sample: ") == 2
    assert list(series(tmp_path / "log", "hellaswag")) == [0, 3]
    names = {path.name for path in (tmp_path / "log").iterdir()}
    assert names == {"log.jsonl", "ckpt_000003.pt", "train_gpt2.py"}
    assert (tmp_path / "log" / "train_gpt2.py").read_text() == script.read_text()


def test_the_script_is_kept_as_it_was_launched(text, tmp_path):
    """A resumed run that has edited it keeps the first copy, and adds its own."""
    script, log_dir = tmp_path / "train_gpt2.py", tmp_path / "log"
    source = (ROOT / "train_gpt2.py").read_text()
    flags = [*TINY, f"--data={text}", f"--log_dir={log_dir}", "--save_every=2"]
    for steps, edit in (("2", ""), ("4", ""), ("6", "# an idea\n")):
        script.write_text(source + edit)
        more = f"--max_steps={steps}", "--init_from=resume"
        assert fork(*flags, *more, script=script).returncode == 0
    copies = {path.name: path.read_text() for path in log_dir.glob("*.py")}
    assert copies == {"train_gpt2.py": source, "train_gpt2_000004.py": source + "# an idea\n"}


def test_a_group_has_its_own_learning_rate(text, tmp_path):
    """lr_scale multiplies the rate of the schedule: with 0, the embeddings stay as they are."""
    line = '{"params": embeddings, "lr_scale": 1.0'
    change = line, line.replace("1.0", "0.0")
    script = variant(tmp_path / "train_gpt2.py", "train_gpt2.py", change)
    flags = [*TINY, f"--data={text}", f"--log_dir={tmp_path}/log", "--save_every=1", "--keep=0"]
    assert fork(*flags, "--max_steps=2", script=script).returncode == 0
    first, second = (load(tmp_path / "log" / f"ckpt_00000{n}.pt")["model"] for n in (1, 2))
    unchanged = {name for name in first if torch.equal(first[name], second[name])}
    assert unchanged == {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
