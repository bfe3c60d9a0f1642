"""--name=value on the command line, and mistakes in constants."""

import re

import pytest
from conftest import ROOT, finish, fork, mistake, start, train

CONTRACT = """data log_dir init_from seed B T n_layer n_head n_embd dropout total_batch_size
optimizer max_lr min_lr warmup_steps max_steps weight_decay grad_clip val_steps log_every
val_every hella_every sample_every save_every keep compile dtype device wandb_log wandb_project
prompt""".split()


def test_help_lists_every_constant():
    result = finish(start("--help", f"--data={ROOT}/input.txt", tiny=False))
    assert result.returncode == 0 and not result.stderr
    listed = dict(re.findall(r"^--(\w+)=(.*)$", result.stdout, re.MULTILINE))
    assert set(CONTRACT) <= listed.keys()
    assert listed["n_layer"] == "4"  # a text file: the baby


def test_help_shows_what_a_launch_would_use(tmp_path):
    result = fork("--help", f"--data={tmp_path}", "--max_lr=1e-3")
    assert "--n_layer=12" in result.stdout  # a folder: GPT-2
    assert "--max_lr=0.001" in result.stdout


def test_a_text_and_weights_are_fine_tuned():
    """These get the third block of constants. A text alone gets the second."""
    for flag, shown in (
        ("--init_from=gpt2", "--max_lr=3e-05"),
        ("--encoding=gpt2", "--max_lr=3e-05"),  # how such a run is resumed
        ("--init_from=resume", "--max_lr=0.008"),
        ("--encoding=bytes", "--max_lr=0.008"),
    ):
        result = fork("--help", f"--data={ROOT}/input.txt", flag)
        assert shown in result.stdout


def test_every_constant_can_be_overridden():
    """Flags also override the block for a text file."""
    data = f"--data={ROOT}/input.txt"
    shown = fork("--help", data).stdout
    listed = dict(re.findall(r"^--(\w+)=(.*)$", shown, re.MULTILINE))
    other = {"True": "0", "False": "true", "'muon'": "adamw", "'auto'": "float16"}
    other |= {"'bytes'": "gpt2", "'cpu'": "mps", "'cuda'": "cpu"}
    flags = [
        f"--{name}=" + (other.get(value) or ("elsewhere" if value[0] == "'" else value + "1"))
        for name, value in listed.items()
    ]
    changed = fork("--help", *flags).stdout
    changed = dict(re.findall(r"^--(\w+)=(.*)$", changed, re.MULTILINE))
    assert changed.keys() == listed.keys()
    assert changed["max_lr"] == listed["max_lr"] + "1"  # not that of another block
    assert [name for name in listed if changed[name] == listed[name]] == []


MISTAKES = {
    "--typo=1": "no such constant",
    "--n_laier=3": "--n_layer=",
    "--B=abc": "expected int",
    "--B=1.5": "expected int",
    "--B": "--B=",
    "B=4": "--B=",
    "--compile=maybe": "bool",
    "--max_lr=fast": "expected float",
    "--dtype=bf16": "bfloat16",
    "--optimizer=adam": "adamw",
    "--n_head=3": "n_head=3",
    "--B=-4": "expected int",
    "--B=0": "B=0",
    "--n_embd=0": "n_embd=0",
    "--T=0": "T=0",
    "--max_lr=-1": "expected float",
    "--timeout=1.5": "expected int",
    "--max_lr=inf": "expected float",
    "--init_from=nowhere": "nowhere",
    "--data=nowhere": "--data=nowhere",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_mistakes_are_named(flag, text, tmp_path):
    assert MISTAKES[flag] in mistake(f"--data={text}", flag, f"--log_dir={tmp_path}/log")
    assert not list(tmp_path.glob("log/*"))


def test_a_batch_that_does_not_divide_is_lowered(text, tmp_path):
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=1"
    said = train(*flags, "--total_batch_size=384").stdout  # 12 windows
    assert "lowered --B=8 to 6" in said
    assert "multiple of T" in mistake(*flags, "--total_batch_size=100")


@pytest.mark.parametrize(
    "world_size, B, expected",
    [(1, 64, 64), (8, 64, 64), (16, 64, 32), (64, 64, 8), (512, 64, 1), (1, 1000, 512), (1, 5, 4)],
)
def test_a_batch_for_every_number_of_gpus(world_size, B, expected):
    """Among them is the README's two-node launch: 16 x 64 x 1024 tokens are more than 2**19."""
    from train_gpt2 import fit_batch

    assert fit_batch(B, 1024, 2**19, world_size) == expected


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


@pytest.mark.parametrize(
    "device, native, expected",
    [
        ("cuda", True, "bfloat16"),  # A100, H100, RTX 3090 and newer
        ("cuda", False, "float16"),  # T4 and V100, which only emulate bfloat16
        ("cpu", True, "bfloat16"),
        ("cpu", False, "float32"),
        ("mps", True, "float32"),
    ],
)
def test_default_dtype(monkeypatch, device, native, expected):
    import torch

    from train_gpt2 import default_dtype

    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert default_dtype(device) == expected


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 5090", 209),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_peak_of_a_gpu(name, tflops):
    from train_gpt2 import get_peak_flops

    assert get_peak_flops(name) == (tflops and tflops * 1e12)


def test_schedule():
    from train_gpt2 import get_lr

    lrs = [get_lr(step, 1.0, 0.1, 10, 110) for step in range(111)]
    assert lrs[0] == pytest.approx(0.1) and lrs[9] == lrs[10] == pytest.approx(1.0)
    assert lrs[60] == pytest.approx(0.55) and lrs[110] == pytest.approx(0.1)
    assert lrs[10:] == sorted(lrs[10:], reverse=True)
    assert get_lr(500, 1.0, 0.1, 10, 110) == pytest.approx(0.1)


def test_the_files_keep_to_the_design():
    lines = (ROOT / "train_gpt2.py").read_text().splitlines()
    assert len(lines) <= 870
    assert max(map(len, lines)) <= 100
    text = (ROOT / "input.txt").read_text(encoding="ascii")
    assert 1_000_000 < len(text) < 1_200_000
    for speech in text.rstrip("\n").split("\n\n"):
        assert re.fullmatch(r"[A-Z][A-Z ,.-]*:\n[^\[\]\n][^\[\]]*", speech), speech
