"""Launches train_gpt2.py as anybody would, for the other scripts of this folder."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# only steps: no evaluations, samples or checkpoints
STEPS_ONLY = dict.fromkeys(("val_every", "hella_every", "sample_every", "save_every"), 0)


def launch(flags):
    """Runs it to its end -> what it printed, and the events of its log. Exits if it fails."""
    command = [sys.executable, str(ROOT / "train_gpt2.py"), "gpt2"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(result.stdout + result.stderr)
    lines = Path(flags["log_dir"], "log.jsonl").read_text().splitlines()
    return result.stdout, [json.loads(line) for line in lines[1:]]
