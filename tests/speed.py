"""Times training steps: ours in its parts, and whole, in turns with those of other scripts.

python tests/speed.py                                     the small GPT, on this machine
python tests/speed.py --shape=gpt2 --B=64 --compile       GPT-2 (124M), on a GPU
python tests/speed.py nanoGPT/model.py build-nanogpt/train_gpt2.py llm.c/train_gpt2.py

Each script brings its own model and optimizer, and gets the same random tokens. Medians over the
rounds; in each round every script makes --steps steps.
"""

import argparse
import statistics
import sys
import time
import types
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt2 as ours  # noqa: E402

SHAPES = {"baby": (4, 4, 128, 64, 32, 256), "gpt2": (12, 12, 768, 1024, 1, 50304)}

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("peers", nargs="*", help="nanoGPT's model.py, the others' train_gpt2.py")
parser.add_argument("--shape", choices=SHAPES, default="baby")
parser.add_argument("--B", type=int)
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--device", default=ours.device)
parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=ours.dtype)
parser.add_argument("--compile", action="store_true")
args = parser.parse_args()

n_layer, n_head, n_embd, T, B, vocab_size = SHAPES[args.shape]
B = args.B or B
cuda = args.device == "cuda"
autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
torch.set_float32_matmul_precision("high" if cuda else "highest")
x, y = torch.randint(vocab_size, (2, B, T), device=args.device)


def clock():
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def load(path):
    """A module of another's definitions, without what it runs when it is imported."""
    source = Path(path).read_text().partition("\nimport tiktoken\n")[0]
    source = source.replace("\nfrom hellaswag import", "\n# ")  # it would be ours
    module = types.ModuleType(Path(path).resolve().parent.name)
    sys.modules[module.__name__] = module  # for its dataclasses
    exec(compile(source, path, "exec"), module.__dict__)
    # what the scripts set when they run
    module.__dict__.update(master_process=False, FLASH=1, print0=lambda *_: None)
    return module


def build(path):
    """A model, its optimizer, and a function of both that makes the loss."""
    shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    if path in ("adamw", "muon"):
        model = ours.GPT(ours.GPTConfig(T, vocab_size, **shape)).to(args.device)
        optimizer = ours.make_optimizer(model, path, 0.1, (0.9, 0.95), 0.95)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
        return f"ours, {path}", model, optimizer, lambda model: model(x, y)
    module = load(path)
    model = module.GPT(module.GPTConfig(block_size=T, vocab_size=vocab_size, **shape))
    model = model.to(args.device)
    how = {"weight_decay": 0.1, "learning_rate": 1e-4, "device_type": args.device}
    names = module.GPT.configure_optimizers.__code__.co_varnames
    how.update({k: v for k, v in {"betas": (0.9, 0.95), "zero_stage": 0}.items() if k in names})
    return module.__name__, model, model.configure_optimizers(**how), lambda model: model(x, y)[1]


def step(model, raw, optimizer, loss_of):
    """One update -> seconds for forward, backward, clipping, the optimizer."""
    times = [clock()]
    with autocast:
        loss = loss_of(model)
    times.append(clock())
    loss.backward()
    times.append(clock())
    clip_grad_norm_(raw.parameters(), 1.0)
    times.append(clock())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    times.append(clock())
    return [after - before for before, after in zip(times, times[1:], strict=False)]


runs, seconds, parts, memory = {}, {}, {}, {}
for path in ["adamw", "muon", *args.peers]:
    name, raw, optimizer, loss_of = build(path)
    model = torch.compile(raw) if args.compile else raw
    runs[name] = model, raw, optimizer, loss_of
    seconds[name], parts[name], memory[name] = [], [], 0.0
    for _ in range(2):  # warm-up
        step(*runs[name])
for _ in range(args.rounds):
    for name, run in runs.items():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = clock()
        parts[name] += [step(*run) for _ in range(args.steps)]
        seconds[name].append((clock() - start) / args.steps)
        memory[name] = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0

gpu = torch.cuda.get_device_name() if cuda else "cpu"
print(f"{gpu}, torch {torch.__version__}, {args.dtype}, compile {args.compile}, {B} x {T} tokens")
if cuda:
    print(f"cuDNN {torch.backends.cudnn.version()}; memory holds all the models at once")
for name in runs:
    median = statistics.median(seconds[name])
    ratio = statistics.median(
        b / a for a, b in zip(seconds["ours, adamw"], seconds[name], strict=True)
    )
    forward, backward, clip, update = (
        statistics.median(times) * 1e3 for times in zip(*parts[name], strict=True)
    )
    print(
        f"{name:14s} {median * 1e3:8.1f} ms {B * T / median:10,.0f} tokens/s, "
        f"{ratio:.2f} times ours with AdamW | forward {forward:.1f} backward {backward:.1f} "
        f"clip {clip:.1f} optimizer {update:.1f}" + (f" | {memory[name]:.1f} GiB" if cuda else "")
    )
