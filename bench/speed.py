"""Times training steps of train_gpt2.py and, in turns, those of other scripts.

python bench/speed.py                                     the small GPT, on this machine
python bench/speed.py --shape=gpt2 --B=64 --compile       GPT-2 (124M), on a GPU
python bench/speed.py nanoGPT/model.py build-nanogpt/train_gpt2.py llm.c/train_gpt2.py

Ours is launched as anybody would, and its log says how long a step took. Of the other scripts, this
one takes the model and the optimizer, and makes the same steps with them: their own scripts need
their own data. Each measurement is a process of its own. A round measures each script once; the
figures are medians over the rounds. All use --dtype, by default that of our script on this device;
with --peers_dtype=default, each of the others uses the dtype of its own training.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import peers  # noqa: E402
from launch import STEPS_ONLY, launch  # noqa: E402

import train_gpt2 as ours  # noqa: E402

# n_layer, n_head, n_embd, T, B, vocab_size
SHAPES = {"small": (4, 4, 128, 64, 32, 256), "gpt2": (12, 12, 768, 1024, 1, 50257)}
WARMUP = 3  # steps that are not counted

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("peers", nargs="*", help="nanoGPT's model.py, the others' train_gpt2.py")
parser.add_argument("--shape", choices=SHAPES, default="small")
parser.add_argument("--B", type=int)
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--steps", type=int, default=20, help="in each round")
parser.add_argument("--device", default=ours.device)
parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
parser.add_argument("--peers_dtype", choices=["same", "default"], default="same")
parser.add_argument("--compile", action="store_true")
parser.add_argument("--child", help=argparse.SUPPRESS)  # the process that measures this script

args = parser.parse_args()
n_layer, n_head, n_embd, T, B, vocab_size = SHAPES[args.shape]
B = args.B or B
dtype = ours.default_dtype(args.device) if args.dtype == "auto" else args.dtype
cuda = args.device == "cuda"


def measure_ours(optimizer, folder):
    """Launches train_gpt2.py -> seconds of its steps, GiB of GPU memory at the peak."""
    data = folder / "tokens.txt"
    if args.shape == "gpt2":
        data = folder / "shards"
        data.mkdir(exist_ok=True)
    tokens = np.random.default_rng(0).integers(0, vocab_size, 40 * B * (T + 1))
    if args.shape == "gpt2":
        for split in ("train", "val"):
            np.save(data / f"{split}.npy", tokens.astype(np.uint16))
    else:
        data.write_bytes(tokens.astype(np.uint8).tobytes())
    flags = dict(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, T=T, B=B, total_batch_size=B * T,
        optimizer=optimizer, device=args.device, dtype=dtype, compile=args.compile, data=data,
        encoding="bytes" if args.shape == "small" else "gpt2", log_dir=folder / "log",
        max_steps=WARMUP + args.steps, log_every=1, **STEPS_ONLY,
    )  # fmt: skip
    printed, events = launch(flags)
    shutil.rmtree(folder / "log")  # with the model in it, half a gigabyte for GPT-2
    seconds = [event["dt"] for event in events if "dt" in event][WARMUP:]
    memory = [part for part in printed.split(", ") if part.endswith("GiB of GPU memory")]
    return seconds, float(memory[0].split()[0]) if memory else 0.0


def dtype_of(peer):
    """The dtype that a script's own training uses on this device."""
    if peer == "nanoGPT":
        return ("bfloat16" if torch.cuda.is_bf16_supported() else "float16") if cuda else "float32"
    return "bfloat16" if peer == "build-nanogpt" else "float32"


def clock():
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_peer(path):
    """Makes steps with another script's model and optimizer -> as measure_ours."""
    module = peers.definitions(path)
    peer_dtype = dtype_of(module.__name__) if args.peers_dtype == "default" else dtype
    if cuda:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    x, y = torch.randint(vocab_size, (2, B, T), device=args.device)
    rows = 128 * math.ceil(vocab_size / 128)  # as these scripts pad it
    with contextlib.redirect_stdout(None):  # some count their parameters
        config = module.GPTConfig(
            n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=rows, block_size=T
        )
        model = module.GPT(config).to(args.device)
        optimizer = peers.make_optimizer(module, model, args.device)
    forward = torch.compile(model) if args.compile else model
    autocast = contextlib.nullcontext()
    if peer_dtype != "float32":
        autocast = torch.autocast(args.device, getattr(torch, peer_dtype))
    scaler = torch.amp.GradScaler(args.device, enabled=peer_dtype == "float16")
    seconds = []
    for _ in range(WARMUP + args.steps):
        start = clock()
        with autocast:
            _, loss = forward(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0).item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(clock() - start)
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return module.__name__, peer_dtype, seconds[WARMUP:], memory


if args.child:
    print(json.dumps(measure_peer(args.child)))
    sys.exit()

found = {}  # {name: [dtype, medians, memory]}
with tempfile.TemporaryDirectory(prefix="speed-") as folder:
    for _ in range(args.rounds):
        for optimizer in ("adamw", "muon"):
            seconds, memory = measure_ours(optimizer, Path(folder))
            found.setdefault(f"ours, {optimizer}", []).append((dtype, seconds, memory))
        for path in args.peers:
            child = [sys.executable, __file__, *sys.argv[1:], f"--child={path}"]
            result = subprocess.run(child, capture_output=True, text=True, env={**os.environ})
            if result.returncode != 0:
                print(f"{path}: {result.stderr.strip().splitlines()[-1]}")
                continue
            name, peer_dtype, seconds, memory = json.loads(result.stdout.splitlines()[-1])
            found.setdefault(name, []).append((peer_dtype, seconds, memory))

machine = torch.cuda.get_device_name() if cuda else args.device
print(
    f"{machine}, torch {torch.__version__}, {B} x {T} tokens a step, "
    f"{'compiled' if args.compile else 'not compiled'}, {args.rounds} rounds of {args.steps} steps"
)
if cuda:
    print(f"cuDNN {torch.backends.cudnn.version()}")
first = [statistics.median(seconds) for _, seconds, _ in found["ours, adamw"]]
for name, rounds in found.items():
    medians = [statistics.median(seconds) for _, seconds, _ in rounds]
    ratio = statistics.median(theirs / ours for theirs, ours in zip(medians, first, strict=False))
    median = statistics.median(medians)
    memory = f", {rounds[0][2]:.1f} GiB" if cuda else ""
    print(
        f"{name:14s} {rounds[0][0]:8s} {1000 * median:8.1f} ms a step, "
        f"{B * T / median:9,.0f} tokens/s, {ratio:.2f} times the first{memory}"
    )
