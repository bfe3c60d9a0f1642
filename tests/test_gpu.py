"""What a GPU needs, as far as we can test it without one: graphs, FLOPs, float16, bench/gpu.py."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    assert_same_state,
    assert_same_tensors,
    in_a_fork,
    load,
    log_of,
    mistake,
    series,
    train,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt2
from train_gpt2 import GPT, GPTConfig, get_flops_per_token, rows_that_fit

# runs the script with a compiler that keeps the graphs as they are; counts them at the end
COUNTING = """
import json, os, runpy, sys
from functools import partial
import torch
torch.compile = partial(torch.compile, backend="eager")
counts, sys.argv = sys.argv[1], sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
from torch._dynamo.utils import counters
with open(f"{counts}.{os.environ.get('RANK', 0)}", "w") as file:
    graphs = counters["stats"]["unique_graphs"]
    json.dump({"graphs": graphs, "breaks": counters["graph_break"]}, file)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_one_graph_to_train_and_one_to_evaluate(text, tmp_path, processes):
    """There is no graph break, and nothing is compiled again when steps, evaluations, samples and
    seeds alternate. The same holds in DDP."""
    (tmp_path / "counting.py").write_text(COUNTING)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    flags = [*TINY, f"--data={text}", f"--log_dir={tmp_path}/log", "--compile=1", "--dropout=0.1"]
    flags += ["--max_steps=9", "--val_every=3", "--sample_every=2", "--val_steps=2"]
    result = subprocess.run(
        [*launcher, tmp_path / "counting.py", tmp_path / "counts", ROOT / "train_gpt2.py", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert len(series(tmp_path / "log", "val_loss")) == 4
    for rank in range(processes):
        counts = json.loads((tmp_path / f"counts.{rank}").read_text())
        assert counts == {"graphs": 2, "breaks": {}}


@pytest.mark.parametrize("shape", [(12, 12, 768), (24, 16, 1024)])
@in_a_fork
def test_flops_per_token(shape):
    """Compares the formula behind mfu with a count of all products, forward and backward.

    Both count attention's products in full, though a causal kernel can skip half. The formula
    also counts vectors (biases, LayerNorms) as if they were rows of a matrix. That is the only
    difference: 0.1%."""
    n_layer, n_head, n_embd = shape
    B, T = 2, 1024
    with FakeTensorMode():  # has shapes, but no numbers
        model = GPT(GPTConfig(T, 50257, n_layer, n_head, n_embd))
        idx = torch.zeros(B, T, dtype=torch.long)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(idx, idx).backward()
    formula = get_flops_per_token(model, T)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert counter.get_total_flops() == B * T * (formula - 6 * vectors)
    assert 6 * vectors < 0.002 * formula


# GiB that a compiled step of 64, 32 and 16 sequences takes, from traces of its kernels (also in
# float16, with a T4's attention): the bytes alive at the peak, the weights, gradients and AdamW's
PEAK = {64: 24.7 + 1.9, 32: 12.5 + 1.9, 16: 6.4 + 1.9, 8: 3.4 + 1.9}
EAGER_PEAK = {64: 59.0, 32: 30.5, 16: 16.0, 8: 9.0}


@pytest.mark.parametrize("compile, peaks", [(True, PEAK), (False, EAGER_PEAK)])
@pytest.mark.parametrize("card", [80, 48, 24, 16])
def test_the_default_batch_fits_each_card(monkeypatch, compile, peaks, card):
    """With a tenth to spare, and twice as many sequences would not, or are more than 64."""
    monkeypatch.setattr(train_gpt2, "compile", compile)
    with torch.device("meta"):
        model = GPT(GPTConfig())
    gib = card * 0.98  # what such a card says it has
    rows = rows_that_fit(model, 1024, "bfloat16", gib * 2**30)
    assert peaks[rows] < 0.9 * gib
    assert rows == 64 or peaks[2 * rows] > 0.85 * gib


def test_the_default_batch_of_larger_models_and_longer_sequences(monkeypatch):
    monkeypatch.setattr(train_gpt2, "compile", True)
    rows = []
    for shape, T in (((24, 16, 1024), 1024), ((48, 25, 1600), 1024), ((12, 12, 768), 4096)):
        with torch.device("meta"):
            model = GPT(GPTConfig(T, 50257, *shape))
        rows.append(rows_that_fit(model, T, "bfloat16", 78 * 2**30))
    assert rows == [64, 16, 32]
    numbers = {"float32": 16, "float16": 32}
    for dtype, rows in numbers.items():  # of twice the size, so half as many fit into 24 GB
        with torch.device("meta"):
            assert rows_that_fit(GPT(GPTConfig()), 1024, dtype, 23.5 * 2**30) == rows
    assert rows_that_fit(model, 1024, "bfloat16", 2**30) == 1  # none fits: torch will say so
    assert rows_that_fit(model, 1024, "float32") == 8 or torch.cuda.is_available()


# float16 ---------------------------------------------------------------------
@pytest.fixture(scope="module")
def float16_run(text, tmp_path_factory):
    """A run of 20 steps: its folder, and flags to continue a copy of it."""
    log_dir = tmp_path_factory.mktemp("float16") / "log"
    flags = [f"--data={text}", "--dtype=float16", "--save_every=5", "--keep=0"]
    train(*flags, f"--log_dir={log_dir}", "--max_steps=20")
    return log_dir, flags


def copy_until(log_dir, to, step, scale=None, weights=None):
    """A copy of a run up to a step, with another scale or weights planted in its checkpoint."""
    to.mkdir()
    shutil.copy(log_dir / "log.jsonl", to)
    name = f"ckpt_{step:06d}.pt"
    checkpoint = load(log_dir / name)
    if scale is not None:
        checkpoint["scaler"]["scale"] = scale
    for tensor, value in (weights or {}).items():
        checkpoint["model"][f"transformer.{tensor}"].fill_(value)
    torch.save(checkpoint, to / name)
    return to


def test_float16_learns_as_float32(text, float16_run, tmp_path):
    log_dir, _ = float16_run
    train(f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=20")
    expected = series(tmp_path / "log", "train_loss")
    losses = series(log_dir, "train_loss")
    assert losses != expected, "not float16"
    assert losses == pytest.approx(expected, abs=0.01)
    assert losses[19] < losses[0] - 0.3


def test_float16_resumes_exactly(float16_run, tmp_path):
    """The scale and its count of steps are resumed, too; an overflow has changed the scale."""
    log_dir, flags = float16_run
    whole = copy_until(log_dir, tmp_path / "whole", 5, scale=2.0**24)
    train(*flags, f"--log_dir={whole}", "--max_steps=20", "--init_from=resume")
    half = copy_until(whole, tmp_path / "half", 15)
    before = load(half / "ckpt_000015.pt")["scaler"]
    assert before["scale"] < 2.0**24 and before["_growth_tracker"] > 0
    train(*flags, f"--log_dir={half}", "--max_steps=20", "--init_from=resume")
    assert_same_state(whole / "ckpt_000020.pt", half / "ckpt_000020.pt")
    after = load(half / "ckpt_000020.pt")["scaler"]
    assert after == load(whole / "ckpt_000020.pt")["scaler"]
    assert after["_growth_tracker"] == before["_growth_tracker"] + 5


def test_an_overflow_is_skipped(float16_run, tmp_path):
    """Each step that overflows halves the scale and changes nothing else, and training goes on. The
    same holds on two processes: losses are means over both, so an update on one would show."""
    log_dir, flags = float16_run
    losses = []
    # each of two processes has half the rows, and so twice the gradient from each row: at half
    # the scale, they overflow at the same steps as one process
    for processes, scale in ((1, 2.0**24), (2, 2.0**23)):
        planted = copy_until(log_dir, tmp_path / f"log-{processes}", 10, scale=scale)
        how = {"processes": processes} if processes > 1 else {}
        more = [f"--log_dir={planted}", "--init_from=resume", "--save_every=1", "--max_steps=20"]
        train(*flags, *more, **how)
        norms = series(planted, "grad_norm")
        skipped = [step for step in norms if norms[step] is None]  # infinities, in JSON
        assert skipped == list(range(10, 10 + len(skipped))) and 2 <= len(skipped) <= 6

        before = load(planted / "ckpt_000010.pt")
        for step in range(10, 20):
            after = load(planted / f"ckpt_{step + 1:06d}.pt")
            states = [[opt["state"] for opt in c["optimizers"]] for c in (before, after)]
            if step in skipped:
                assert after["scaler"]["scale"] == before["scaler"]["scale"] / 2
                assert_same_tensors(after["model"], before["model"])
                assert_same_tensors(*states)
            else:
                weights = [c["model"]["lm_head.weight"] for c in (before, after)]
                assert not torch.equal(*weights)
            before = after
        losses.append(series(planted, "train_loss"))
    assert losses[1] == pytest.approx(losses[0], abs=0.005)


def test_overflows_without_end_stop_the_run(float16_run, tmp_path):
    """Weights whose loss is finite, but whose gradients overflow at any scale: it falls from 4
    to 1. Then one line names the step."""
    log_dir, flags = float16_run
    weights = {"h.1.mlp.c_fc.bias": 3e4, "h.1.mlp.c_proj.weight": 0, "ln_f.weight": 100}
    planted = copy_until(log_dir, tmp_path / "log", 10, scale=4.0, weights=weights)
    line = mistake(*flags, f"--log_dir={planted}", "--init_from=resume", "--max_steps=20")
    assert line.startswith("step 12: loss") and "gradient norm" in line and "lower" in line
    assert [event["step"] for event in log_of(planted)][-2:] == [10, 11]


def test_a_loss_that_is_not_finite_stops_float16_at_once(float16_run, tmp_path):
    """A smaller scale would not help. The checkpoint before it is named, and nothing is saved."""
    log_dir, flags = float16_run
    planted = copy_until(log_dir, tmp_path / "log", 10, weights={"ln_f.weight": math.inf})
    shutil.copy(log_dir / "ckpt_000005.pt", planted)
    more = f"--log_dir={planted}", "--init_from=resume", "--max_steps=20", "--val_every=0"
    line = mistake(*flags, *more, "--save_every=1")
    assert line.startswith("step 10: loss nan") and f"resume from {planted}/ckpt_000005.pt" in line
    assert len(list(planted.glob("*.pt"))) == 2


def test_resume_in_float16_after_another_dtype(text, tmp_path):
    """The earlier run had no scale, as on another card."""
    flags = [f"--data={text}", f"--log_dir={tmp_path}/log"]
    train(*flags, "--max_steps=5")
    train(*flags, "--max_steps=10", "--init_from=resume", "--dtype=float16")
    train(*flags, "--max_steps=15", "--init_from=resume", "--dtype=float32")
    assert len(series(tmp_path / "log", "train_loss")) == 15


PEER = """
import torch
import train_gpt2
from train_gpt2 import GPTConfig
class GPT(train_gpt2.GPT):
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)
    def forward(self, x, y):
        return None, super().forward(x, y)
"""


def test_bench_gpu_runs_on_a_small_model(tmp_path):
    """bench/gpu.py prints its table, times another script, and leaves the repository as it is."""

    def files():
        caches = {".git", ".pytest_cache", ".ruff_cache", "__pycache__"}  # pytest may write these
        return {path for path in ROOT.rglob("*") if caches.isdisjoint(path.parts)}

    before = files()
    (tmp_path / "nanoGPT").mkdir()
    (tmp_path / "nanoGPT" / "model.py").write_text(PEER)
    result = subprocess.run(
        [sys.executable, ROOT / "bench" / "gpu.py", "--small", tmp_path / "nanoGPT" / "model.py"],
        capture_output=True,
        text=True,
        timeout=300,  # under a minute on an idle machine
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    values = {name: more for name, *more in table}
    for name in ("tokens/s, B=8", "s to the first step, compiled before"):
        assert len(values[name]) == 2  # AdamW, Muon
        assert all(float(value.replace(",", "")) > 0 for value in values[name])
    for name in ("s for an evaluation", "s for HellaSwag", "s for 2 samples"):
        (line,) = [line for line in lines if line.startswith(f"| {name}")]
        assert float(line.split("|")[2]) > 0, line
    assert any(line.startswith("| CUDA tests") for line in lines)
    speeds = [line for line in lines if "times the first" in line]
    assert [line[:13].rstrip() for line in speeds] == ["ours, adamw", "ours, muon", "nanoGPT"]
    assert files() == before
