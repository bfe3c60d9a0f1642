"""--name=value on the command line, and mistakes in constants."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, finish, mistake, start, train

CONTRACT = """data log_dir init_from seed B T n_layer n_head n_embd dropout total_batch_size
optimizer max_lr min_lr warmup_steps max_steps weight_decay grad_clip val_tokens log_every val_every
hella_every sample_every save_every keep compile dtype device wandb_log wandb_project""".split()


def test_help_lists_every_constant():
    result = finish(start("--help", f"--data={ROOT}/input.txt", tiny=False))
    assert result.returncode == 0 and not result.stderr
    listed = dict(re.findall(r"^--(\w+)=(.*)$", result.stdout, re.MULTILINE))
    assert set(CONTRACT) <= listed.keys()
    assert listed["n_layer"] == "4"  # a text file: the baby


def test_help_shows_what_a_launch_would_use(tmp_path):
    result = finish(start("--help", f"--data={tmp_path}", "--max_lr=1e-3", tiny=False))
    assert "--n_layer=12" in result.stdout  # a folder: GPT-2
    assert "--max_lr=0.001" in result.stdout


def test_the_defaults_follow_the_data_of_the_launch(tmp_path):
    """Also where another folder was written into the script."""
    script = (ROOT / "train_gpt2.py").read_text()
    edited = re.sub(r"^data = .*", f"data = {str(tmp_path)!r}", script, count=1, flags=re.MULTILINE)
    (tmp_path / "train_gpt2.py").write_text(edited)
    flags = tmp_path / "train_gpt2.py", f"--data={ROOT}/input.txt", "--help"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.check_output([sys.executable, *flags], env=env, text=True)
    assert "--log_dir='log/baby'" in shown and "--n_layer=4" in shown


def test_every_constant_can_be_overridden(tmp_path):
    listed = dict(
        re.findall(r"^--(\w+)=(.*)$", finish(start("--help", tiny=False)).stdout, re.MULTILINE)
    )
    other = {"True": "0", "False": "true"}
    flags = [
        f"--{name}=" + (other.get(value) or ("elsewhere" if value[0] == "'" else value + "1"))
        for name, value in listed.items()
    ]
    shown = dict(
        re.findall(
            r"^--(\w+)=(.*)$", finish(start("--help", *flags, tiny=False)).stdout, re.MULTILINE
        )
    )
    assert shown.keys() == listed.keys()
    assert [name for name in listed if shown[name] == listed[name]] == []


MISTAKES = {
    "--typo=1": "no such constant",
    "--n_laier=3": "--n_layer=",
    "--B=abc": "integer",
    "--B=1.5": "integer",
    "--B=-4": "integer",
    "--B": "--B=",
    "B=4": "--B=",
    "--compile=maybe": "true or false",
    "--max_lr=fast": "number",
    "--dtype=bf16": "bfloat16",
    "--optimizer=adam": "adamw",
    "--device=tpu": "cpu",
    "--n_head=3": "n_head=3",
    "--T=0": "T=0",
    "--n_embd=0": "n_embd=0",
    "--B=0": "B=0",
    "--seed=1" + 20 * "0": "integer",
    "--timeout=1e3": "integer",
    "--max_lr=inf": "number",
    "--init_from=resume": "no checkpoint",
    "--init_from=resum": "not scratch, resume",
    "--dropout=1.5": "dropout",
    "--max_lr=-1": "number >= 0",
    "--data=nowhere": "nowhere: not found",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_mistakes_are_named(flag, text, tmp_path):
    assert MISTAKES[flag] in mistake(f"--data={text}", flag, f"--log_dir={tmp_path}/log")
    assert not (tmp_path / "log").exists()


def test_batch_size_that_does_not_divide(text, tmp_path):
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--total_batch_size=384"  # 12 windows
    line = mistake(*flags)
    assert "384" in line and "--B=6" in line
    train(*flags, "--B=6", "--max_steps=1")
    assert "--total_batch_size=256" in mistake(*flags[:2], "--total_batch_size=100")


def test_more_processes_than_gpus(text, tmp_path):
    import torch

    if not torch.accelerator.is_available():
        pytest.skip("needs a GPU")
    n = torch.accelerator.device_count()
    line = mistake(
        f"--data={text}",
        f"--log_dir={tmp_path}/log",
        "--device=cuda",
        env={"LOCAL_RANK": str(n), "LOCAL_WORLD_SIZE": str(n + 1)},
    )
    assert f"{n + 1} processes" in line and f"{n} GPUs" in line


def test_warmup_longer_than_the_run(text, tmp_path):
    train(f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=3", "--warmup_steps=10")


def test_schedule():
    from train_gpt2 import get_lr

    lrs = [get_lr(step, 1.0, 0.1, 10, 110) for step in range(111)]
    assert lrs[0] == pytest.approx(0.1) and lrs[9] == lrs[10] == pytest.approx(1.0)
    assert lrs[60] == pytest.approx(0.55) and lrs[110] == pytest.approx(0.1)
    assert lrs[10:] == sorted(lrs[10:], reverse=True)
    assert get_lr(500, 1.0, 0.1, 10, 110) == pytest.approx(0.1)


def test_the_files_keep_to_the_design():
    lines = (ROOT / "train_gpt2.py").read_text().splitlines()
    assert len(lines) <= 660
    assert max(map(len, lines)) <= 100
    text = (ROOT / "input.txt").read_text(encoding="ascii")
    assert 1_000_000 < len(text) < 1_200_000
    for speech in text.rstrip("\n").split("\n\n"):
        assert re.fullmatch(r"[A-Z][A-Z ,.-]*:\n[^\[\]\n][^\[\]]*", speech), speech
