"""Times training steps of train_gpt2.py and, in turns, those of other scripts.

python tests/speed.py                                     the small GPT, on this machine
python tests/speed.py --shape=gpt2 --B=64 --compile       GPT-2 (124M), on a GPU
python tests/speed.py nanoGPT/model.py build-nanogpt/train_gpt2.py llm.c/train_gpt2.py

Each script brings its own model and optimizer; the tokens, the clipping and the loss scaling of
float16 are the same for all. In each round, every script makes --steps steps; the figures are
medians over the rounds. All use --dtype, which is our default if not given. With
--peers_dtype=default, each of the others uses the dtype of its own training on this device.
"""

import argparse
import contextlib
import math
import statistics
import sys
import time
import types
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt2 as ours  # noqa: E402

# n_layer, n_head, n_embd, T, B, vocab_size
SHAPES = {"small": (4, 4, 128, 64, 32, 256), "gpt2": (12, 12, 768, 1024, 1, 50257)}

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("peers", nargs="*", help="nanoGPT's model.py, the others' train_gpt2.py")
parser.add_argument("--shape", choices=SHAPES, default="small")
parser.add_argument("--B", type=int)
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--steps", type=int, default=10, help="in each round")
parser.add_argument("--device", default=ours.device)
parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
parser.add_argument("--peers_dtype", choices=["same", "default"], default="same")
parser.add_argument("--compile", action="store_true")
args = parser.parse_args()

n_layer, n_head, n_embd, T, B, vocab_size = SHAPES[args.shape]
B = args.B or B
shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size, block_size=T)
our_dtype = ours.default_dtype(args.device) if args.dtype == "auto" else args.dtype
cuda = args.device == "cuda"
if cuda:
    torch.set_float32_matmul_precision("high")
x, y = torch.randint(vocab_size, (2, B, T), device=args.device)


def clock():
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def default_dtype(peer):
    """The dtype that a script's own training uses on this device."""
    if peer == "nanoGPT":  # no autocast on a CPU; on a GPU, whether bfloat16 is native or emulated
        gpu = "bfloat16" if cuda and torch.cuda.is_bf16_supported() else "float16"
        return gpu if cuda else "float32"
    if peer == "build-nanogpt":
        return "bfloat16"
    if peer == "llm.c":
        return "float32"
    sys.exit(f"{peer}: its default dtype is not known here; leave out --peers_dtype=default")


def load(path):
    """A module with another script's definitions, without the code that runs on import."""
    source = Path(path).read_text().partition("\nimport tiktoken\n")[0]
    source = source.replace("\nfrom hellaswag import", "\n# ")  # would import ours
    module = types.ModuleType(Path(path).resolve().parent.name)
    sys.modules[module.__name__] = module  # for its dataclasses
    # globals that the scripts set when they run; FLASH turns on llm.c's fused attention
    source += "\nmaster_process = False\nFLASH = 1\ndef print0(*_):\n    pass\n"
    exec(compile(source, path, "exec"), module.__dict__)
    return module


class Script:
    """A model, its optimizers, and the seconds that its steps have taken."""

    def __init__(self, path):
        if path in ("adamw", "muon"):
            self.name, self.dtype = f"ours, {path}", our_dtype
            self.kind = path
            module = ours
        else:
            module = load(path)
            self.name, self.dtype = module.__name__, our_dtype
            if args.peers_dtype == "default":
                self.dtype = default_dtype(self.name)
        with contextlib.redirect_stdout(None):  # some count their parameters
            self.build(module)
        self.autocast = torch.autocast(
            args.device, getattr(torch, self.dtype), enabled=self.dtype != "float32"
        )
        self.scaler = torch.amp.GradScaler(args.device, enabled=self.dtype == "float16")
        self.forward = torch.compile(self.model) if args.compile else self.model
        self.seconds = []
        self.peak = 0.0  # GiB
        self.run(3)  # warm-up

    def build(self, module):
        self.model = module.GPT(module.GPTConfig(**shape)).to(args.device)
        if module is ours:
            self.optimizers = ours.make_optimizers(self.model, self.kind, 0.1)
        else:
            how = {"weight_decay": 0.1, "learning_rate": 1e-4, "device_type": args.device}
            known = module.GPT.configure_optimizers.__code__.co_varnames
            for name, value in (("betas", (0.9, 0.95)), ("zero_stage", 0)):
                if name in known:
                    how[name] = value
            self.optimizers = [self.model.configure_optimizers(**how)]
        for opt in self.optimizers:
            for group in opt.param_groups:
                group["lr"] = 1e-4

    def step(self):
        with self.autocast:
            loss = self.forward(x, y)
            if isinstance(loss, tuple):
                loss = loss[1]  # the others return their logits, too
        self.scaler.scale(loss).backward()
        for opt in self.optimizers:
            self.scaler.unscale_(opt)
        norm = clip_grad_norm_(self.model.parameters(), 1.0).item()
        if math.isfinite(norm):
            with self.autocast:
                for opt in self.optimizers:
                    self.scaler.step(opt)
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)

    def run(self, steps):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = clock()
        for _ in range(steps):
            self.step()
        seconds = (clock() - start) / steps
        if cuda:
            self.peak = torch.cuda.max_memory_allocated() / 2**30
        return seconds


scripts = []
for path in ["adamw", "muon", *args.peers]:
    try:
        scripts.append(Script(path))
    except torch.OutOfMemoryError:
        print(f"{path}: out of memory at B={B}")
for _ in range(args.rounds):
    for script in scripts:
        script.seconds.append(script.run(args.steps))

machine = torch.cuda.get_device_name() if cuda else args.device
print(
    f"{machine}, torch {torch.__version__}, {B} x {T} tokens a step, "
    f"{'compiled' if args.compile else 'not compiled'}, {args.rounds} rounds of {args.steps} steps"
)
if cuda:
    print(f"cuDNN {torch.backends.cudnn.version()}; memory is measured with all models loaded")
for script in scripts:
    seconds = statistics.median(script.seconds)
    ratio = statistics.median(
        theirs / first for theirs, first in zip(script.seconds, scripts[0].seconds, strict=True)
    )
    memory = f", {script.peak:.1f} GiB" if cuda else ""
    print(
        f"{script.name:14s} {script.dtype:8s} {1000 * seconds:8.1f} ms a step, "
        f"{B * T / seconds:9,.0f} tokens/s, {ratio:.2f} times the first{memory}"
    )
