"""Recipes, edits of the constants, --name=value, and mistakes in all of them."""

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, Fork, finish, fork, mistake, start, train, variant, world

CONTRACT = """data log_dir init_from seed B T n_layer n_head n_embd dropout total_batch_size
optimizer max_lr min_lr warmup_steps max_steps weight_decay momentum grad_clip val_steps log_every
val_every hella_every sample_every save_every keep compile dtype device wandb_log wandb_project
prompt n_samples sample_tokens temperature top_k encoding timeout""".split()
SOURCE = (ROOT / "train_gpt2.py").read_text()
RECIPES = ["gpt2", "baby", "finetune", "sample"]


def help_of(*argv, script=ROOT / "train_gpt2.py"):
    """Runs the script with -h -> {name: value} as it shows them."""
    out = io.StringIO()
    before = sys.argv
    sys.argv = [str(script), *argv, "-h"]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before
    assert ended.value.code is None, ended.value.code
    return dict(re.findall(r"^  --(\w+) ('.*?'|\S+)", out.getvalue(), re.MULTILINE))


# another value for each constant, with which a tiny run still works
OTHER = dict(
    data="other.txt", encoding="bytes", log_dir="elsewhere", init_from="resume",
    seed=7, n_layer=1, n_head=1, n_embd=24, dropout=0.25, total_batch_size=3072, B=3, T=16,
    optimizer="adamw", max_lr=2e-3, min_lr=1e-6, warmup_steps=3, max_steps=2, weight_decay=0.2,
    beta1=0.8, beta2=0.9, momentum=0.85, grad_clip=0.5, log_every=2, val_every=2, val_steps=3,
    hella_every=0, sample_every=0, save_every=2, keep=2, prompt="x", n_samples=1, sample_tokens=4,
    temperature=0.7, top_k=5, device="cpu", dtype="float32", compile=False, timeout=60,
    wandb_log=False, wandb_project="other",
)  # fmt: skip


def edited(folder, recipe, changes):
    """A copy of the script, edited where a person would: in the recipe, or else at the top."""
    text = SOURCE
    for name, value in changes.items():
        start = text.index(f'"{recipe}": dict(')
        end = text.index(")", start)
        in_recipe = re.compile(rf"\b{name}=(?:\"[^\"]*\"|[^,)]+)")
        if in_recipe.search(text, start, end):
            found = in_recipe.search(text, start)
            text = text[: found.start()] + f"{name}={value!r}" + text[found.end() :]
        else:
            at_the_top = re.compile(rf"^{name} = (?:\"[^\"]*\"|.*?)(?=  #|$)", re.MULTILINE)
            found = at_the_top.search(text)
            text = text[: found.start()] + f"{name} = {value!r}" + text[found.end() :]
    path = folder / "train_gpt2.py"
    path.write_text(text)
    return path


def test_help_lists_every_constant_with_its_value_and_its_comment():
    result = finish(start("-h", "baby", tiny=False))
    assert result.returncode == 0 and not result.stderr
    listed = dict(re.findall(r"^  --(\w+) ('.*?'|\S+)", result.stdout, re.MULTILINE))
    assert set(CONTRACT) <= listed.keys() == OTHER.keys()
    assert listed["n_layer"] == "4" and help_of("gpt2")["n_layer"] == "12"
    plain = " ".join(result.stdout.split())
    top = SOURCE.partition("recipes = {")[0]
    comments = re.findall(r"^\w+ = .*?  # (.*)", top, re.MULTILINE)
    assert len(comments) > 30 and all(comment in plain for comment in comments)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_edit_is_a_flag(tmp_path, recipe):
    """Each constant, edited alone in the file, launches what its flag launches."""
    before = help_of(recipe)
    assert before.keys() == OTHER.keys()
    for name, value in OTHER.items():
        by_flag = help_of(recipe, f"--{name}={value}")
        assert help_of(recipe, script=edited(tmp_path, recipe, {name: value})) == by_flag, name
        changed = {other for other in before if by_flag[other] != before[other]}
        assert changed <= {name}
        assert changed or str(before[name]).strip("'") == str(value), name


@pytest.mark.parametrize("recipe", ["gpt2", "baby", "finetune"])
def test_edits_are_logged_as_flags(tmp_path, recipe, text, shards):
    """All constants at once, in two whole runs: the same first line in the log."""
    changes = {**OTHER, "data": str(shards[0] if recipe == "gpt2" else text)}
    changes |= {"init_from": "scratch", "encoding": "gpt2" if recipe == "finetune" else "bytes"}
    flags = [f"--{name}={value}" for name, value in changes.items()]
    first_lines = []
    for script, args in (
        (ROOT / "train_gpt2.py", flags),
        (edited(tmp_path, recipe, changes), []),
    ):
        folder = tmp_path / f"run-{len(first_lines)}"
        folder.mkdir()
        result = fork(recipe, *args, script=script, cwd=folder)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"recipe {recipe}:")
        log = folder / "elsewhere" / "log.jsonl"
        first_lines.append(json.loads(log.read_text().splitlines()[0]))
        assert (folder / "elsewhere" / "train_gpt2.py").read_text() == script.read_text()
    assert first_lines[0]["constants"] == first_lines[1]["constants"]
    for name, value in changes.items():
        assert first_lines[0]["constants"][name] == value


def test_the_first_line_names_the_recipe_and_what_it_replaced(text, tmp_path):
    first = train(f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=1").stdout
    first = first.splitlines()[0]
    assert first.startswith("recipe baby")
    for replaced in ("n_layer=2", "optimizer='muon'", "max_lr=0.008", "device='cpu'"):
        assert replaced in first
    assert "weight_decay" not in first


def test_without_a_name_the_recipe_depends_on_the_shards(tmp_path):
    """gpt2 where its folder is, baby elsewhere, whatever --data says."""
    (tmp_path / "edu_fineweb10B").mkdir()
    for folder, data, n_layer in (
        (tmp_path, "my.txt", "12"),
        (tmp_path / "edu_fineweb10B", "my_shards", "4"),
    ):
        result = fork("-h", f"--data={data}", cwd=folder)
        assert f"--n_layer {n_layer} " in result.stdout and f"--data '{data}'" in result.stdout


def test_flags_as_people_write_them():
    for flags, name, shown in (
        (["--B", "16"], "B", "16"),
        (["--max_lr=.1"], "max_lr", "0.1"),
        (["--max_lr=1."], "max_lr", "1.0"),
        (["--max_lr", "1e-2"], "max_lr", "0.01"),
        (["--compile=false"], "compile", "False"),
        (["--compile", "True"], "compile", "True"),
        (["--wandb_log=1"], "wandb_log", "True"),
        (["--prompt=--x=1"], "prompt", "'--x=1'"),
        (["--log_dir=~/x/../y/"], "log_dir", repr(os.path.expanduser("~/y"))),
    ):
        assert help_of("baby", *flags)[name] == shown
        assert help_of(*flags, "baby")[name] == shown  # the recipe may come last


MISTAKES = {
    "--typo=1": "--typo=1: no such flag",
    "--n_laier=3": "--n_layer",
    "--B=abc": "--B: invalid int value: 'abc'",
    "--B=1.5": "--B: invalid int value",
    "--B": "--B: expected one argument",
    "B=4": "B=4: no such flag; did you mean --B?",
    "--lr=1e-3": "--lr=1e-3: no such flag; --help lists all",
    "--compile=maybe": "--compile: invalid true_or_false",
    "--max_lr=fast": "--max_lr: invalid float",
    "--dtype=bf16": "bfloat16",
    "--optimizer=adam": "adamw",
    "--encoding=utf8": "bytes",
    "--n_head=3": "n_embd=32 is not a multiple of n_head=3",
    "--n_layer=0": "n_layer=0: expected a number above 0",
    "--B=-4": "B=-4",
    "--n_embd=0": "n_embd=0",
    "--T=0": "T=0",
    "--T=7": "total_batch_size=512 is not a multiple of T=7",
    "--max_lr=-1": "max_lr=-1.0: expected a number from 0 to 1e18",
    "--max_lr=inf": "max_lr=inf",
    "--max_lr=nan": "max_lr=nan",
    "--max_lr=1e-4": "min_lr=0.0005 is above max_lr=0.0001; set both",
    "--dropout=1.5": "dropout=1.5: expected a number below 1",
    "--dropout=-0.1": "dropout=-0.1",
    "--timeout=1.5": "--timeout: invalid int",
    "--device=cuda:1": "cuda",
    "--device=mps": "device=mps: torch",
    "--init_from=nowhere": "nowhere",
    "--data=nowhere": "--data=nowhere",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_mistakes_are_named(flag, text, tmp_path):
    assert MISTAKES[flag] in mistake(f"--data={text}", flag, f"--log_dir={tmp_path}/log")
    assert not list(tmp_path.glob("log/*"))


@pytest.mark.parametrize("word", ["babby", "B=4"])
def test_an_unknown_recipe_is_named(word):
    result = fork(word)
    assert result.returncode == 1 and "finetune" in result.stderr and word in result.stderr


EDITS = {
    ("n_layer = 12", 'n_layer = "12"'): "n_layer='12': expected int",
    ("n_layer = 12", "n_layer = 12.0"): "n_layer=12.0: expected int",
    ("n_layer = 12", "n_layer = True"): "n_layer=True: expected int",
    ("max_lr = 6e-4", 'max_lr = "6e-4"'): "max_lr='6e-4': expected float",
    ('optimizer = "adamw"', 'optimizer = "adam"'): "adamw or muon",
    ('optimizer = "adamw"', "optimizer = None"): "optimizer",
    ("wandb_log = False", 'wandb_log = "no"'): "wandb_log='no': expected bool",
    ("dropout = 0.0", "dropout = 2"): "dropout=2: expected a number below 1",
    (
        '"gpt2": dict(',
        '"gpt2": dict(n_layers=6',
    ): "n_layers is not a constant; did you mean n_layer?",
    ('"sample": dict(', '"sample": dict(n_layers=6, '): "recipe sample: n_layers is not a constant",
    ('"gpt2": dict(', '"gpt2": dict(max_lr="1"'): "max_lr='1': expected float",
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("python", [[], ["-O"]])
def test_edits_that_cannot_work_are_named(tmp_path, edit, python):
    """Also where Python runs without assertions."""
    if python and "adam" not in edit[1]:
        pytest.skip("one such edit is enough for a start of Python")
    path = tmp_path / "train_gpt2.py"
    assert edit[0] in SOURCE
    path.write_text(SOURCE.replace(*edit))
    if python:
        command = [sys.executable, *python, path, "gpt2"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    else:
        result = fork("gpt2", script=path, cwd=tmp_path)
    assert result.returncode == 1 and EDITS[edit] in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == ["train_gpt2.py"]


def test_numbers_may_be_edited_to_whole_ones(tmp_path):
    """After the edit grad_clip = 1, --grad_clip=0.5 still works."""
    path = edited(tmp_path, "baby", {"grad_clip": 1})
    assert help_of("baby", script=path)["grad_clip"] == "1"
    assert help_of("baby", "--grad_clip=0.5", script=path)["grad_clip"] == "0.5"


def test_a_constant_that_is_added_has_a_flag(tmp_path):
    """A number, or a tuple, with the type that it has in the file."""
    path = tmp_path / "train_gpt2.py"
    more = "n_kv_head = 4  # heads for keys and values\nbetas = (0.9, 0.95)\n"
    path.write_text(SOURCE.replace("grad_clip = 1.0", more + "grad_clip = 1.0"))
    shown = help_of("baby", "--n_kv_head=2", "--betas=(0.8, 0.9)", script=path)
    assert shown["n_kv_head"] == "2" and shown["betas"].startswith("(0.8,")
    assert "--n_kv_head" in fork("--n_kv_head=two", script=path).stderr
    assert "betas=0.5: expected tuple" in fork("--betas=0.5", script=path).stderr


@pytest.mark.parametrize("processes, B, wasted", [(1, 8, None), (1, 5, None), (3, 16, "11%")])
def test_an_uneven_spread_is_told(text, tmp_path, processes, B, wasted):
    """16 windows: 2 x 8 or 4 x 4 waste nothing; 3 processes with 6 rows each compute 18."""
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=2", f"--B={B}"
    said = train(*flags, processes=processes).stdout
    assert said.count("is padding") == (wasted is not None)
    assert wasted is None or wasted in said


def test_gpus_that_differ_are_refused(text, tmp_path):
    """With --B=0, each rank computes what its GPU holds. Here, the second one's holds more."""
    change = "rows_that_fit(raw_model, T, run_dtype)", "4 * (rank + 1)"
    script = variant(tmp_path / "train_gpt2.py", "train_gpt2.py", change)
    flags = [f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=2", "--B=0"]
    ranks = [Fork(*TINY, *flags, env=env, script=script) for env in world(2)]
    first, second = (finish(rank) for rank in ranks)
    assert second.returncode == 1 and "B=8 on this rank, but 4 on rank 0" in second.stderr
    assert first.returncode != 0 and not (tmp_path / "log" / "log.jsonl").exists()


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


def test_the_learning_rate_warms_up_and_decays():
    from train_gpt2 import get_lr

    lrs = [get_lr(step, 1.0, 0.1, 10, 110) for step in range(111)]
    assert lrs[0] == pytest.approx(0.1) and lrs[9] == lrs[10] == pytest.approx(1.0)
    assert lrs[60] == pytest.approx(0.55) and lrs[110] == pytest.approx(0.1)
    assert lrs[10:] == sorted(lrs[10:], reverse=True)
    assert get_lr(500, 1.0, 0.1, 10, 110) == pytest.approx(0.1)


def test_input_txt_holds_speeches():
    text = (ROOT / "input.txt").read_text(encoding="ascii")
    assert 1_000_000 < len(text) < 1_200_000
    for speech in text.rstrip("\n").split("\n\n"):
        assert re.fullmatch(r"[A-Z][A-Z ,.-]*:\n[^\[\]\n][^\[\]]*", speech), speech
