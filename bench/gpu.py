"""Measures training on this machine's GPU, within ten minutes, and prints a table in Markdown.

python bench/gpu.py
python bench/gpu.py nanoGPT/model.py build-nanogpt/train_gpt2.py llm.c/train_gpt2.py

It runs the CUDA tests. Then it launches train_gpt2.py as anybody would, on GPT-2 (124M), and reads
its log and what it prints: at the default B and, if that is 64, at 128, with AdamW and Muon,
the first step with an empty and with a full cache of compiled kernels, an evaluation, HellaSwag and
samples, without cuDNN's attention, and on two cards if there are two. bench/speed.py times other
scripts. Only GPT-2's tokenizer is downloaded: the data is random, with the frequencies of words.
Nothing is written into the repository. --small is a rehearsal with a tiny model; without a GPU it
is the default.
"""

import argparse
import hashlib
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

sys.path.insert(0, str(ROOT))
from launch import STEPS_ONLY  # noqa: E402

import train_gpt2  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("peers", nargs="*", help="other scripts, as for bench/speed.py")
parser.add_argument("--small", action="store_true", help="a rehearsal: a tiny model, few steps")
parser.add_argument("--minutes", type=float, default=10, help="what is left goes to the peers")
args = parser.parse_args()
cuda = train_gpt2.device == "cuda"
small = args.small or not cuda
memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 0.0  # GiB

shape, T, warmup, steps, n_examples = {}, 1024, 5, 30, 2000
if small:
    shape = dict(n_layer=2, n_head=2, n_embd=32, B=8, dtype="float32")
    T, warmup, steps, n_examples = 32, 2, 6, 40
rows = []  # of the table: a name, then one value for AdamW and one for Muon, or one for both


def say(text):
    print(f"[{time.monotonic() - started:3.0f} s] {text}", file=sys.stderr, flush=True)


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


def prepare():
    """Puts the scripts, shards and made-up HellaSwag examples into the temporary folder."""
    for name in ("train_gpt2.py", "hellaswag.py"):
        shutil.copy(ROOT / name, TEMP)
    words = re.findall(r"[A-Za-z]+", (ROOT / "input.txt").read_text())
    chance = random.Random(0)
    with open(TEMP / "hellaswag_val.jsonl", "w") as file:
        for n in range(n_examples):  # about as long as the real ones
            texts = [" ".join(chance.choices(words, k=chance.randint(20, 60)))]
            texts += [" ".join(chance.choices(words, k=chance.randint(5, 30))) for _ in range(4)]
            example = {"ctx": texts[0], "endings": texts[1:], "label": n % 4}
            file.write(json.dumps(example) + "\n")
    sha256 = hashlib.sha256((TEMP / "hellaswag_val.jsonl").read_bytes()).hexdigest()
    script = (TEMP / "hellaswag.py").read_text()
    script = re.sub(r"(?m)^SHA256 = .*", f'SHA256 = "{sha256}"', script)
    (TEMP / "hellaswag.py").write_text(script)
    (TEMP / "shards").mkdir()
    for name, n in (("train", 2**22 + 1), ("val", 2**20 + 1)):
        np.save(TEMP / "shards" / f"random_{name}_000000.npy", random_tokens(n, seed=n))


class Launch:
    """Runs train_gpt2.py to its end, and notes when each line was printed."""

    def __init__(self, what, processes=1, env=None, may_fail=False, **flags):
        say(what)
        shutil.rmtree(TEMP / "log", ignore_errors=True)
        defaults = dict(data="shards", log_dir="log", T=T, log_every=1, **STEPS_ONLY)
        flags = defaults | shape | flags
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, "-u", *(launcher if processes > 1 else [])]
        command += ["train_gpt2.py", "gpt2", *(f"--{k}={v}" for k, v in flags.items())]
        began = time.monotonic()
        lines = []
        with open(TEMP / "errors.txt", "w+") as errors:
            process = subprocess.Popen(
                command, cwd=TEMP, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, **(env or {})},
            )  # fmt: skip
            for line in process.stdout:
                lines.append((time.monotonic() - began, line.strip()))
            failed = process.wait() != 0
            errors.seek(0)
            text = "\n".join(line for _, line in lines) + errors.read()
        self.out_of_memory = failed and bool(re.search("out of memory|ALLOC_FAILED", text))
        if failed and not (self.out_of_memory and may_fail):
            sys.exit(f"{' '.join(command)} failed:\n{text}")
        if failed:
            return
        self.rows = int(re.search(r"a step: \d+ x (\d+) x", text)[1])
        log = (TEMP / "log" / "log.jsonl").read_text().splitlines()
        trained = [json.loads(line) for line in log if "train_loss" in line][warmup:]
        self.ms = [1000 * event["dt"] for event in trained]
        self.tokens_per_sec = statistics.median(e["tokens_per_sec"] for e in trained)
        self.mfu = trained[-1]["mfu"] and statistics.median(e["mfu"] for e in trained)
        peak = re.search(r"[\d.]+ GiB(?= of GPU memory)", text)
        self.peak = peak.group() if peak else "not counted"
        self.first_step = next(at for at, line in lines if "| loss" in line)
        self.took = {}  # seconds before a line of this kind, since the line above it
        for (before, _), (at, line) in zip(lines, lines[1:], strict=False):
            for kind in ("val loss", "HellaSwag", "sample"):
                if f"| {kind}" in line:
                    self.took.setdefault(kind, at - before)


say("the CUDA tests")
command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", "-p", "no:cacheprovider", "tests"]
tests = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
if tests.returncode != 0:
    print(tests.stdout + tests.stderr, file=sys.stderr)
summary = tests.stdout.strip().rpartition("\n")[2].strip("= ")
rows.append(["CUDA tests", summary or "not run: pip install -r tests/requirements.txt"])
prepare()

# the first launch of all: nothing is compiled yet
tokens = 2 * 8 * T if small else 65536
how = dict(max_steps=warmup + steps, warmup_steps=10, total_batch_size=tokens)
cold = Launch("AdamW, nothing compiled yet", **how | {"max_steps": warmup + 3})
# steps of 0.5M tokens, as GPT-2's, or of fewer where they would take more than three seconds
while not small and tokens < 524288 and 2 * tokens / cold.tokens_per_sec < 3:
    tokens *= 2
how["total_batch_size"] = tokens
adamw = Launch("AdamW", **how)
muon = Launch("Muon", optimizer="muon", **how)
both = (adamw, muon)
rows.append([f"tokens/s, B={adamw.rows}", *(f"{run.tokens_per_sec:,.0f}" for run in both)])
if adamw.mfu:
    rows.append(["share of the peak FLOP/s", *(f"{run.mfu:.1%}" for run in both)])
rows.append([f"ms a step of {tokens:,} tokens", *(f"{statistics.median(r.ms):,.0f}" for r in both)])
rows.append(["ms, fastest and slowest", *(f"{min(r.ms):,.0f}, {max(r.ms):,.0f}" for r in both)])
rows.append(["peak memory", *(run.peak for run in both)])
rows.append(["s to the first step, nothing compiled yet", f"{cold.first_step:.1f}"])
rows.append(["s to the first step, compiled before", *(f"{run.first_step:.1f}" for run in both)])

events = dict(max_steps=warmup + 1, val_every=warmup, hella_every=warmup, sample_every=warmup)
evaluated = Launch("an evaluation, HellaSwag and samples", **how | events)
for kind, what in (
    ("val loss", f"s for an evaluation on {20 * tokens:,} tokens, or all there are"),
    ("HellaSwag", f"s for HellaSwag on {n_examples:,} examples"),
    ("sample", "s for 2 samples of 128 tokens"),
):
    if kind in evaluated.took:
        rows.append([what, f"{evaluated.took[kind]:.1f}"])
    else:
        rows.append([what, "not measured: the tokenizer is missing"])

if cuda:
    plain = TEMP / "without_cudnn"
    plain.mkdir()
    (plain / "sitecustomize.py").write_text(
        "import torch\ntorch.backends.cuda.enable_cudnn_sdp(False)\n"
    )
    flash = Launch("without cuDNN's attention", env={"PYTHONPATH": str(plain)}, **how)
    rows.append(["tokens/s without cuDNN's attention", f"{flash.tokens_per_sec:,.0f}"])
    if adamw.rows == 64:
        largest = Launch("B=128", may_fail=True, **how | {"B": 128})
        fits = not largest.out_of_memory
        found = f"{largest.tokens_per_sec:,.0f}, {largest.peak}" if fits else "out of memory"
        rows.append(["tokens/s, B=128", found])
if cuda and torch.cuda.device_count() > 1:
    two = Launch("two GPUs", processes=2, **how)
    ratio = two.tokens_per_sec / adamw.tokens_per_sec
    rows.append(["tokens/s on two GPUs", f"{two.tokens_per_sec:,.0f}, {ratio:.2f} times one"])

# other scripts get the time that is left
peers = ""
if args.peers:
    say("other scripts")
    command = [sys.executable, str(ROOT / "bench" / "speed.py"), *args.peers]
    command += ["--rounds=1", "--steps=2"] if small else ["--shape=gpt2", f"--B={adamw.rows}"]
    if not small:
        command += ["--rounds=2", "--steps=20", "--compile"]
    left = max(60, 60 * args.minutes - (time.monotonic() - started))
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=left)
        peers = result.stdout + (result.stderr if result.returncode else "")
    except subprocess.TimeoutExpired:
        peers = f"The other scripts took more than the {left:.0f} s that were left."

machine = torch.cuda.get_device_name() if cuda else f"no GPU, {train_gpt2.device}"
versions = f"torch {torch.__version__}, Python {platform.python_version()}"
if cuda:
    versions += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    versions += f", driver {driver()}, {memory:.0f} GiB"
print(f"{machine}: {versions}\n")
what = "A tiny model, a rehearsal" if small else "GPT-2 (124M)"
print(f"{what}, T={T}, medians of {steps} steps after {warmup}.\n")
print("| | AdamW | Muon |\n|---|---|---|")
for name, *values in rows:
    print("|", " | ".join([name, *values, ""][:3]), "|")
if peers:
    print(f"\nCompared with others, steps without accumulation:\n\n```\n{peers.strip()}\n```")
print(f"\nMeasured in {(time.monotonic() - started) / 60:.1f} minutes.")
folder.cleanup()
sys.exit(tests.returncode)
