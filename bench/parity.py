"""Is this the same training as in the lecture? Trains one small model twice and compares each step.

python bench/parity.py build-nanogpt/train_gpt2.py
python bench/parity.py nanoGPT/model.py --alike --dtype=bfloat16

Once by launching train_gpt2.py, whose log is read; and once by the other script's own model,
optimizer and schedule (its definitions: nothing of it is copied or run here), which start with the
same weights and get the same windows. Prints the largest differences of loss, gradient norm and
learning rate. Everything is on the CPU, with AdamW.

nanoGPT differs from GPT-2 and the lecture in two points: its GELU is exact, not the tanh form, and
its warmup is a step longer. --alike gives it GPT-2's GELU and our schedule, to compare the rest.
"""

import argparse
import contextlib
import functools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import peers  # noqa: E402
from launch import STEPS_ONLY, launch  # noqa: E402

import train_gpt2 as ours  # noqa: E402

SHAPE = dict(n_layer=3, n_head=4, n_embd=64)
T, B, MICRO_STEPS = 64, 4, 2


def ours_alone(folder, steps, dtype):
    """Trains with train_gpt2.py -> the events of its log."""
    flags = SHAPE | dict(
        T=T, B=B, total_batch_size=B * T * MICRO_STEPS, max_steps=steps, warmup_steps=steps // 5,
        data=folder / "shards", init_from=folder / "weights", log_dir=folder / "log", dtype=dtype,
        device="cpu", compile=False, log_every=1, **STEPS_ONLY,
    )  # fmt: skip
    _, events = launch(flags)
    return events


def windows(folder, steps):
    """The inputs and targets of each micro-step of each step, (B, T)."""
    shards = ours.load_split(str(folder / "shards"), "train", "gpt2")
    loader = ours.TokenLoader(shards, B, T, 0, 1, "cpu", 50257, ours.constants["seed"])
    n = B * MICRO_STEPS
    for step in range(steps):
        yield [loader.batch(range(step * n, (step + 1) * n), i) for i in range(MICRO_STEPS)]


def peer(path, folder, steps, dtype, alike):
    """Trains with another script's model, optimizer and schedule -> events of the same form."""
    module = peers.definitions(path)
    constants = ours.constants | {"warmup_steps": steps // 5, "max_steps": steps}
    # nanoGPT's names
    constants |= {"warmup_iters": steps // 5, "lr_decay_iters": steps}
    constants["learning_rate"] = constants["max_lr"]
    get_lr = peers.schedule(path, constants)

    with contextlib.redirect_stdout(None):  # some count their parameters
        model = module.GPT(module.GPTConfig(vocab_size=50257, block_size=T, **SHAPE))
        weights = ours.from_pretrained(folder / "weights").state_dict()
        for name in ("transformer.wte.weight", "lm_head.weight"):
            weights[name] = weights[name][:50257]
        missing = model.load_state_dict(weights, strict=False).missing_keys
        assert all(name.endswith("attn.bias") for name in missing), missing  # masks
        optimizer = peers.make_optimizer(module, model, "cpu")
    if alike:
        for layer in model.modules():
            if isinstance(layer, torch.nn.GELU):
                layer.approximate = "tanh"
        schedule = ("max_lr", "min_lr", "warmup_steps", "max_steps")
        get_lr = functools.partial(ours.get_lr, **{name: constants[name] for name in schedule})
    autocast = contextlib.nullcontext()
    if dtype != "float32":
        autocast = torch.autocast("cpu", getattr(torch, dtype))

    for step, batches in enumerate(windows(folder, steps)):
        optimizer.zero_grad()
        loss_accum = 0.0
        for x, y in batches:
            with autocast:
                _, loss = model(x.contiguous(), y)
            (loss / MICRO_STEPS).backward()
            loss_accum += loss.item() / MICRO_STEPS
        norm = clip_grad_norm_(model.parameters(), 1.0).item()
        lr = get_lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        yield {"train_loss": loss_accum, "grad_norm": norm, "lr": lr}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("peer", help="build-nanogpt's train_gpt2.py or nanoGPT's model.py")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--alike", action="store_true", help="GPT-2's GELU and our schedule")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="parity-") as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        tokens = ours.read_text(str(ROOT / "input.txt"), "gpt2")
        np.save(folder / "shards" / "train.npy", tokens)
        ours.save_pretrained(ours.GPT(ours.GPTConfig(block_size=T, **SHAPE)), folder / "weights")
        mine = ours_alone(folder, args.steps, args.dtype)
        theirs = list(peer(args.peer, folder, args.steps, args.dtype, args.alike))
    assert len(mine) == len(theirs) == args.steps
    print(
        f"{args.peer}: {args.steps} steps of {B * T * MICRO_STEPS} tokens, {args.dtype}"
        + ", GPT-2's GELU and our schedule for both" * args.alike
    )
    print(f"loss {mine[0]['train_loss']:.4f} at first, {mine[-1]['train_loss']:.4f} at last")
    for event, text in (("train_loss", "loss"), ("grad_norm", "gradient norm"), ("lr", "rate")):
        difference = max(abs(a[event] - b[event]) for a, b in zip(mine, theirs, strict=True))
        print(f"largest difference of the {text}: {difference:.1e}")
