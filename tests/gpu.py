"""Measures training on this machine's GPU, within ten minutes, and prints a table in Markdown.

python tests/gpu.py
python tests/gpu.py nanoGPT/model.py build-nanogpt/train_gpt2.py llm.c/train_gpt2.py

It runs the CUDA tests. It trains GPT-2 (124M) with train_gpt2.py at the largest B that fits, with
AdamW and with Muon. It times the first step, with an empty and a full cache of compiled kernels,
then an evaluation, HellaSwag and samples, and, by tests/speed.py, other scripts if any are given.
Nothing is downloaded: the tokens are random, with the frequencies of words. Nothing is written into
the repository. --small is a rehearsal with a tiny model; without a GPU it is the default.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
started = time.monotonic()
folder = tempfile.TemporaryDirectory(prefix="gpu-")  # removed at the end
TEMP = Path(folder.name)
# set before this process or a child imports torch: compiled kernels get a cache of their own
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(TEMP / "cache")
os.environ["TRITON_CACHE_DIR"] = str(TEMP / "cache" / "triton")
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
sys.dont_write_bytecode = True

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.attention import sdpa_kernel  # noqa: E402

sys.path.insert(0, str(ROOT))
import hellaswag  # noqa: E402
import train_gpt2  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("peers", nargs="*", help="other scripts, as for tests/speed.py")
parser.add_argument("--small", action="store_true", help="a rehearsal: a tiny model, few steps")
parser.add_argument("--minutes", type=float, default=10, help="the peers get the time that is left")
args = parser.parse_args()
device = train_gpt2.device
cuda = device == "cuda"
small = args.small or not cuda
memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 0.0  # GiB

if small:
    shape = dict(n_layer=2, n_head=2, n_embd=32)
    T, warmup, steps, n_examples, sample_tokens, eval_batches = 32, 2, 6, 20, 8, 2
    candidates = [8]
else:
    shape = dict(n_layer=12, n_head=12, n_embd=768)
    T, warmup, steps, n_examples, sample_tokens, eval_batches = 1024, 6, 60, 1000, 128, 16
    # skip what can't possibly fit: a sequence takes about half a GiB
    candidates = [B for B in (64, 32, 16, 8, 4, 2, 1) if 0.35 * B < memory]

rows = []  # of the table: a name, then one value for AdamW and one for Muon, or one for both


def say(text):
    print(f"[{time.monotonic() - started:3.0f} s] {text}", file=sys.stderr, flush=True)


def clock():
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def driver():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return output.split()[0]


def random_tokens(n, seed):
    """Token ids with the frequencies of words: the k-th most frequent in proportion to 1/k."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, 50257)
    ranks = rng.choice(50256, n, p=frequency / frequency.sum())
    return np.random.default_rng(0).permutation(50256)[ranks].astype(np.uint16)


class Run:
    """Runs train_gpt2.py to its end."""

    def __init__(self, name, optimizer, B, total_batch_size, max_steps):
        say(f"train_gpt2.py, {optimizer}, B={B}, {max_steps} steps of {total_batch_size:,} tokens")
        log_dir = TEMP / name
        flags = shape | dict(
            T=T, B=B, total_batch_size=total_batch_size, max_steps=max_steps, optimizer=optimizer,
            data=TEMP / "shards", log_dir=log_dir, warmup_steps=10, val_every=0, hella_every=0,
            sample_every=0, save_every=0, log_every=1,
        )
        command = [sys.executable, str(ROOT / "train_gpt2.py"), "gpt2"]
        command += [f"--{name}={value}" for name, value in flags.items()]
        self.total_batch_size = total_batch_size
        self.first_step = 0.0  # seconds from the launch to the end of the first step
        log = log_dir / "log.jsonl"
        start = time.monotonic()
        with open(TEMP / "output.txt", "w+") as output:
            process = subprocess.Popen(command, cwd=TEMP, stdout=output, stderr=output)
            while process.poll() is None:
                time.sleep(0.02)
                if not self.first_step and log.exists() and "train_loss" in log.read_text():
                    self.first_step = time.monotonic() - start
            output.seek(0)
            text = output.read()

        failed = process.returncode != 0
        self.out_of_memory = failed and bool(re.search("out of memory|ALLOC_FAILED", text))
        if failed and not self.out_of_memory:
            sys.exit(f"train_gpt2.py failed:\n{text}")
        if not failed:
            events = [json.loads(line) for line in log.read_text().splitlines()[1:]]
            self.dt = [event["dt"] for event in events]
            self.mfu = [event["mfu"] for event in events]
            peak = re.search(r"[\d.]+ GiB(?= of GPU memory)", text)
            self.peak = peak.group() if peak else "not counted"
        shutil.rmtree(log_dir, ignore_errors=True)  # with the model that it has saved


# the CUDA tests
say("the CUDA tests")
command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", "-p", "no:cacheprovider", "tests"]
tests = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
if tests.returncode != 0:
    print(tests.stdout + tests.stderr, file=sys.stderr)
rows.append(["CUDA tests", tests.stdout.strip().splitlines()[-1].strip("= ")])

# the first start at the largest B that fits: nothing is compiled yet
(TEMP / "shards").mkdir()
for name, n in (("train", 2**21 + 1), ("val", 2**20 + 1)):
    np.save(TEMP / "shards" / f"random_{name}_000000.npy", random_tokens(n, seed=n))
for B in candidates:
    shutil.rmtree(TEMP / "cache", ignore_errors=True)
    cold = Run("cold", "adamw", B, B * T, warmup + 4)
    if not cold.out_of_memory:
        break
else:
    sys.exit(f"out of memory at B={B}")

# as many micro-steps a step as the default has, fewer if the steps would take minutes
micro_step = statistics.median(cold.dt[warmup:])
micro_steps = 524288 // (B * T)
while not small and micro_steps > 1 and micro_steps * micro_step * (warmup + steps) > 80:
    micro_steps //= 2
if small:
    micro_steps = 2
adamw, muon = (
    Run("warm", optimizer, B, micro_steps * B * T, warmup + steps)
    for optimizer in ("adamw", "muon")
)
measured = [run.dt[warmup:] for run in (adamw, muon)]
medians = [statistics.median(dt) for dt in measured]
tokens = adamw.total_batch_size
rows.append(["tokens/s", *(f"{tokens / dt:,.0f}" for dt in medians)])
if adamw.mfu[-1]:
    mfu = [statistics.median(run.mfu[warmup:]) for run in (adamw, muon)]
    rows.append(["share of the peak FLOP/s", *(f"{value:.1%}" for value in mfu)])
rows.append([f"ms a step of {tokens:,} tokens", *(f"{1000 * dt:,.0f}" for dt in medians)])
rows.append(["ms, fastest and slowest step", *(
    f"{1000 * min(dt):,.0f}, {1000 * max(dt):,.0f}" for dt in measured)])
rows.append(["peak memory", adamw.peak, muon.peak])
rows.append(["s to the first step, nothing compiled yet", f"{cold.first_step:.1f}"])
rows.append(["s to the first step, compiled before", *(
    f"{run.first_step:.1f}" for run in (adamw, muon))])

# what interrupts training once in a while, timed by calling the same functions
say("an evaluation, HellaSwag and samples")
if cuda:
    torch.set_float32_matmul_precision("high")
dtype = train_gpt2.default_dtype(device)
autocast = torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")
raw_model = train_gpt2.GPT(train_gpt2.GPTConfig(T, **shape)).to(device)
model = torch.compile(raw_model) if train_gpt2.compile else raw_model
shards = train_gpt2.load_split(str(TEMP / "shards"), "val", "gpt2")
loader = train_gpt2.TokenLoader(shards, B, T, 0, 1, device, 50257)
with autocast:
    train_gpt2.evaluate(model, loader, range(B))  # compiles it
    start = clock()
    train_gpt2.evaluate(model, loader, range(eval_batches * B))
    seconds = (clock() - start) / eval_batches
all_tokens = train_gpt2.val_steps * train_gpt2.total_batch_size
rows.append([f"s for an evaluation on {all_tokens:,} tokens (from {eval_batches} batches)",
             f"{seconds * all_tokens / (B * T):.1f}"])

rng = random.Random(0)
examples = []
for n in range(n_examples):
    n_context, lengths = rng.randint(10, 90), [rng.randint(5, 40) for _ in range(4)]
    tokens = random_tokens(n_context + max(lengths), seed=n).tolist()
    rows_of_tokens = [tokens[:n_context] + tokens[-length:] for length in lengths]
    # no row is longer than the context of the model
    rows_of_tokens = [row[:T] for row in rows_of_tokens]
    examples.append(hellaswag.Example(rows_of_tokens, min(n_context, T - 1), n % 4))
with autocast, sdpa_kernel(train_gpt2.ANY_LENGTH):
    hellaswag.evaluate(raw_model, examples[:10], B * T)
    start = clock()
    hellaswag.evaluate(raw_model, examples, B * T)
    rows.append([f"s for HellaSwag on {n_examples:,} examples", f"{clock() - start:.1f}"])

    prompt = torch.tensor([random_tokens(8, seed=0).tolist()] * train_gpt2.n_samples, device=device)
    raw_model.eval().generate(prompt, 2, train_gpt2.temperature, train_gpt2.top_k)
    start = clock()
    raw_model.generate(prompt, sample_tokens, train_gpt2.temperature, train_gpt2.top_k)
    rows.append([f"s for {train_gpt2.n_samples} samples of {sample_tokens} tokens",
                 f"{clock() - start:.1f}"])
del model, raw_model
if cuda:
    torch.cuda.empty_cache()

# other scripts get the time that is left
peers = ""
if args.peers:
    say("other scripts")
    command = [sys.executable, str(ROOT / "tests" / "speed.py"), *args.peers]
    if small:
        command += ["--rounds=1", "--steps=2"]
    else:
        command += ["--shape=gpt2", f"--B={B}", "--rounds=5", "--steps=5"]
    if train_gpt2.compile:
        command.append("--compile")
    left = max(60, 60 * args.minutes - (time.monotonic() - started))
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=left)
        peers = result.stdout + (result.stderr if result.returncode else "")
    except subprocess.TimeoutExpired:
        peers = f"The other scripts took more than the {left:.0f} s that were left."

machine = torch.cuda.get_device_name() if cuda else f"no GPU, {device}"
versions = f"torch {torch.__version__}, Python {platform.python_version()}"
if cuda:
    versions += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    versions += f", driver {driver()}, {memory:.0f} GiB"
compiled = "compiled" if train_gpt2.compile else "not compiled"
print(f"{machine}: {versions}\n")
what = "A tiny model, a rehearsal" if small else "GPT-2 (124M)"
print(f"{what}, {dtype}, {compiled}, B={B}, T={T}, {micro_steps} micro-steps a step; "
      f"medians of {steps} steps after {warmup}.\n")
print("| | AdamW | Muon |\n|---|---|---|")
for name, *values in rows:
    print("|", " | ".join([name, *values, ""][:3]), "|")
if peers:
    print(f"\nCompared with others, steps without accumulation:\n\n```\n{peers.strip()}\n```")
print(f"\nMeasured in {(time.monotonic() - started) / 60:.1f} minutes.")
folder.cleanup()
sys.exit(tests.returncode)
