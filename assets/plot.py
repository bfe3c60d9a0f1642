"""
Draws runs in one picture: their losses, and HellaSwag if they have it.

    pip install matplotlib
    python assets/plot.py log/gpt2 log/gpt2-1 --out=loss.png

Lines are training losses, dots are validation losses. Dashed lines show what OpenAI's models reach:
GPT-2 (124M) on FineWeb-Edu's validation shard and on HellaSwag, GPT-3 (124M) on HellaSwag.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def read_log(log_dir):
    """Returns the constants of a run, and its events. Exits if there are none yet."""
    objects = []
    try:
        for line in Path(log_dir, "log.jsonl").read_text(errors="replace").splitlines():
            try:
                objects.append(json.loads(line))
            except ValueError:  # cut off, if the run was killed while it wrote
                print(f"{log_dir}: this line is not JSON: {line[:80]}", file=sys.stderr)
        constants, *events = objects
        return constants["constants"], events
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{log_dir}: no log of a run: {error}")


def draw(axes, events, name, **style):
    """Draws one series of the log, say val_loss, over the steps."""
    points = [(event["step"], event[name]) for event in events if event.get(name) is not None]
    axes.plot([step for step, _ in points], [value for _, value in points], **style)


def draw_reference(axes, value, label):
    axes.axhline(value, color="gray", linestyle="--", linewidth=1)
    axes.annotate(
        label,
        (0, value),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        color="gray",
    )


parser = argparse.ArgumentParser(usage=__doc__)
parser.add_argument("log_dirs", nargs="+", metavar="log_dir")
parser.add_argument("--out", default="loss.png")
args = parser.parse_args()

runs = {log_dir: read_log(log_dir) for log_dir in args.log_dirs}
with_hellaswag = any("hellaswag" in event for _, events in runs.values() for event in events)
n_plots = 2 if with_hellaswag else 1
figure, (plots,) = plt.subplots(1, n_plots, figsize=(7 * n_plots, 4.5), squeeze=False)

losses = []
# log/muon and log/adamw are muon and adamw, but old/muon and log/muon keep their folders
common = os.path.commonpath([Path(log_dir).absolute().parent for log_dir in runs])
for i, (log_dir, (_, events)) in enumerate(runs.items()):
    label = os.path.relpath(log_dir, common)
    style = dict(color=f"C{i}", marker="o", markersize=4, label=label)
    losses += [e["train_loss"] for e in events if e.get("train_loss") is not None]
    draw(plots[0], events, "train_loss", color=f"C{i}", linewidth=0.8)
    draw(plots[0], events, "val_loss", **style, linestyle="")
    if with_hellaswag:
        draw(plots[1], events, "hellaswag", **style)

# the high losses of the first steps would leave no room for the others
losses.sort()
if losses:
    plots[0].set_ylim(top=losses[int(0.96 * len(losses))])
# GPT-2's loss on FineWeb-Edu's validation shard: only for runs on those shards
if any("fineweb" in str(c["data"]).lower() for c, _ in runs.values()):
    draw_reference(plots[0], 3.29, "GPT-2 (124M) on FineWeb-Edu")
if with_hellaswag:
    draw_reference(plots[1], 0.2955, "GPT-2 (124M)")
    draw_reference(plots[1], 0.337, "GPT-3 (124M)")

for axes, title in zip(plots, ("loss", "HellaSwag, acc_norm"), strict=False):
    axes.set(xlabel="step", title=title)
    axes.legend()
figure.savefig(args.out, dpi=120, bbox_inches="tight")
print(args.out)
