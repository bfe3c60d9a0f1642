"""
Random damage: flipped bits, cut-off ends and extra bytes in shards, checkpoints and log.jsonl, and
command lines with nonsense in them. Whatever the damage, a run either ends with the same weights as
without it, or with one line that says what is wrong. It never ends in a traceback, crash or hang.
(Only a token of a shard that becomes another token goes unnoticed: shards have no checksums.)

    python tests/fuzz.py --rounds=5000 --seed=1

Runs are forks of this process, which has imported everything once: five to ten runs a second.
"""

import argparse
import collections
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from conftest import ROOT, TINY, fork, load, log_of, write_bin
from storm import different_tensors

import train_gpt2

SMALL = [*TINY, "--n_layer=1", "--n_embd=8", "--n_samples=0", "--T=16", "--B=4", "--keep=0"]
SMALL += ["--total_batch_size=64", "--val_steps=1", "--save_every=2", "--val_every=0"]


def damage(path, chance):
    """One to three flips, cuts or additions, at random places of a file."""
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        kind = chance.random()
        if kind < 0.6 and content:
            where = chance.randrange(len(content))
            if chance.random() < 0.3:  # damage the headers more often
                where = chance.randrange(min(200, len(content)))
            content[where] ^= 1 << chance.randrange(8)
        elif kind < 0.8:
            del content[chance.randrange(len(content) + 1) :]
        else:
            content += chance.randbytes(chance.choice([1, 2, 100, 5000]))
    path.write_bytes(content)


class Fuzz:
    def __init__(self, folder, seed):
        self.folder, self.chance = folder, random.Random(seed)
        self.text = folder / "play.txt"
        self.text.write_bytes((ROOT / "input.txt").read_bytes()[:20_000])
        self.shards = folder / "shards"
        self.shards.mkdir()
        tokens = np.random.default_rng(0).integers(0, 50257, 6000).astype(np.uint16)
        np.save(self.shards / "val_0.npy", tokens[:1000])
        np.save(self.shards / "train_1.npy", tokens[1000:3000])
        write_bin(self.shards / "train_2.bin", tokens[3000:])
        self.straight, self.resumable = {}, {}
        for data in (self.text, self.shards):  # a run of six updates, and one killed after four
            log_dir = folder / f"log-{data.name}"
            flags = [*SMALL, f"--data={data}", f"--log_dir={log_dir}"]
            result = fork(*flags, "--max_steps=6")
            assert result.returncode == 0, result.stderr
            self.straight[data] = load(log_dir / "ckpt_000006.pt")
            (log_dir / "ckpt_000006.pt").unlink()
            self.resumable[data] = log_dir

    def resume(self, data, damaged):
        """Damages a file of a resumable run or of its data. -> status, stdout, stderr, log_dir"""
        log_dir, source = self.folder / "log", self.folder / "data"
        for old in (log_dir, source):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(self.resumable[data], log_dir)
        if data.is_dir():
            shutil.copytree(data, source)
        for path in damaged(log_dir, source):
            damage(path, self.chance)
        flags = [f"--data={source if data.is_dir() else data}", f"--log_dir={log_dir}"]
        result = fork(*SMALL, *flags, "--max_steps=6", "--init_from=resume", timeout=60)
        return result.returncode, result.stdout, result.stderr, log_dir

    def ends_alike(self, data, log_dir):
        found = load(log_dir / "ckpt_000006.pt")
        expected = self.straight[data]
        return not any(different_tensors(found[k], expected[k]) for k in ("model", "optimizers"))

    def checkpoint(self):
        def damaged(log_dir, _):
            paths = sorted(log_dir.glob("ckpt_*.pt"))
            self.all = self.chance.random() < 0.2
            return paths if self.all else paths[-1:]

        status, out, err, log_dir = self.resume(self.text, damaged)
        if status == 0:
            steps = [event["step"] for event in log_of(log_dir) if "train_loss" in event]
            assert self.ends_alike(self.text, log_dir), "other weights"
            assert steps == list(range(6)), "steps lost or twice"
        else:
            assert self.all, f"a whole checkpoint was not used: {out} {err}"
        return status, err

    def log(self):
        status, out, err, log_dir = self.resume(self.text, lambda log, _: [log / "log.jsonl"])
        assert status == 0 and self.ends_alike(self.text, log_dir), "a damaged log stops the run"
        lines = (log_dir / "log.jsonl").read_bytes().splitlines()
        logged = [
            line.startswith(b'{"step": %d, "train_loss"' % step)
            for line in lines
            for step in (4, 5)
        ]
        assert sum(logged) <= 2, "a step is logged twice"
        return status, err

    def shard(self):
        def damaged(_, source):
            return [self.chance.choice(list(source.iterdir()))]

        status, out, err, log_dir = self.resume(self.shards, damaged)
        # a token may change to another one unnoticed: only names and lengths are checked
        return status, err

    def command_line(self):
        """Nonsense values for names that exist, and flags with some characters changed."""
        chance = self.chance
        names = sorted(train_gpt2.constants)
        nonsense = "abc -1 1.5.1 0x10 1_000 nan inf -inf 1e999 1e-999 true None [] = --".split()
        nonsense += ["", " 1", "\u0663", "\udcff", "é" * 300, "9" * 5000]
        flag = f"--{chance.choice(names)}={chance.choice([*nonsense, '0', '0.0', '1e-3', '1'])}"
        if chance.random() < 0.3:
            characters = list(flag)
            for _ in range(chance.randrange(1, 4)):
                characters[chance.randrange(len(characters))] = chance.choice("-=abB1.é \t_")
            flag = "".join(characters)
        name = flag.removeprefix("--").partition("=")[0]
        flags = [] if name in ("data", "log_dir") else [f"--log_dir={self.folder / 'log'}"]
        flags += [] if name == "data" else [f"--data={self.text}"]
        small = [each for each in [*SMALL, "--max_steps=1"] if not each.startswith(f"--{name}=")]
        self.last = flag
        result = fork(*small, *flags, flag, timeout=60, cwd=self.folder)
        return result.returncode, result.stderr

    def round(self):
        kinds = [self.checkpoint, self.log, self.shard, self.command_line]
        kind = self.chance.choices(kinds, [3, 2, 3, 2])[0]
        self.last = kind.__name__
        status, err = kind()
        assert status in (0, 1), f"exit status {status}: {err}"
        lines = [line for line in err.splitlines() if line.strip() and "model shards: " not in line]
        assert len(lines) == status, err  # apart from transformers' progress bar
        return kind.__name__, status


def fuzz(folder, rounds, seed=0):
    """Returns how often each kind of damage led to each exit status."""
    fuzz, found = Fuzz(folder, seed), collections.Counter()
    for i in range(rounds):
        try:
            found[fuzz.round()] += 1
        except (AssertionError, subprocess.TimeoutExpired) as error:
            raise AssertionError(f"round {i} of seed {seed}, {fuzz.last!r:.200}: {error}") from None
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        for (kind, status), n in sorted(fuzz(Path(folder), args.rounds, args.seed).items()):
            print(f"{kind}, exit status {status}: {n}")
        print(f"{args.rounds / (time.monotonic() - began):.1f} a second")
