"""Somebody's weights: a GPT-2 of Hugging Face's format, or those of a run. A small random GPT-2,
saved by transformers, stands in for OpenAI's."""

import json
import re

import pytest
import torch
from conftest import TINY, fork, load, log_of, series, train

SMALL = TINY[1:]  # without the recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hf")
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32)).save_pretrained(path)
    return path


def launch(*flags, **how):
    """Runs to the end and must succeed -> what it prints."""
    result = fork(*flags, **how)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_fine_tuning_on_a_text(text, folder, tmp_path):
    """It starts at transformers' loss on the same tokens, and the loss falls. transformers reads
    the result, and --init_from=resume continues."""
    import tiktoken
    from transformers import GPT2LMHeadModel

    flags = "finetune", *SMALL, f"--data={text}", f"--log_dir={tmp_path}/log", "--max_lr=1e-2"
    flags += "--val_every=10", "--save_every=10", "--val_steps=2", "--warmup_steps=2"
    launch(*flags, f"--init_from={folder}", "--max_steps=20")
    losses = series(tmp_path / "log", "val_loss")
    assert losses[20] < losses[0] - 0.5

    tokens = tiktoken.get_encoding("gpt2").encode_ordinary(text.read_text())
    val = tokens[len(tokens) - len(tokens) // 10 :]
    windows = torch.tensor([val[i * 32 : i * 32 + 33] for i in range(2 * 16)])
    with torch.no_grad():
        logits = GPT2LMHeadModel.from_pretrained(folder).eval()(windows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert losses[0] == pytest.approx(expected.item(), abs=1e-4)

    assert GPT2LMHeadModel.from_pretrained(tmp_path / "log" / "hf").config.n_embd == 32
    said = launch(*flags, "--init_from=resume", "--max_steps=22")
    assert "resuming at step 20" in said
    assert list(series(tmp_path / "log", "train_loss")) == list(range(22))


def test_finetune_starts_from_weights_even_where_it_is_resumed(text, folder, tmp_path):
    """One launch line for the first start and all later ones: the recipe names the weights."""
    (tmp_path / "gpt2").symlink_to(folder)  # where transformers looks before it asks the hub
    flags = "finetune", *SMALL, f"--data={text}", "--init_from=resume", "--max_steps=2"
    said = launch(*flags, cwd=tmp_path)
    assert "no checkpoint" in said
    expected = launch(*flags, "--init_from=gpt2", "--log_dir=other", cwd=tmp_path)
    assert re.findall("val loss [0-9.]+", said) == re.findall("val loss [0-9.]+", expected)


def samples(*flags, cwd):
    """What the recipe "sample" prints, with no data to read."""
    said = launch("sample", *flags, "--data=none", "--sample_tokens=8", "--device=cpu", cwd=cwd)
    return [text.strip() for text in re.split(r"step +\d+/\d+ \| sample: ", said)[1:]]


def test_samples_without_training(folder, tmp_path):
    """Samples depend on the seed. Nothing is written."""
    flags = f"--init_from={folder}", "--prompt=The sea"
    first = samples(*flags, cwd=tmp_path)
    assert len(first) == 2 and all(text.startswith("The sea") for text in first)
    assert samples(*flags, cwd=tmp_path) == first
    assert samples(*flags, "--seed=2", cwd=tmp_path) != first
    assert not list(tmp_path.iterdir())


def test_a_sample_ends_with_its_document(folder, tmp_path):
    """A model that prefers <|endoftext|> says nothing after the prompt."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[50256] = 10.0
    model.save_pretrained(tmp_path / "hf")
    flags = f"--init_from={tmp_path}/hf", "--prompt=The sea"
    assert samples(*flags, cwd=tmp_path) == ["The sea", "The sea"]
    # an empty prompt starts with <|endoftext|>
    assert len(samples(f"--init_from={folder}", "--prompt=", cwd=tmp_path)) == 2


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The folder of a run on bytes, with AdamW and a model of its own shape."""
    log_dir = tmp_path_factory.mktemp("finished") / "log"
    flags = f"--data={text}", f"--log_dir={log_dir}", "--max_steps=20", "--save_every=10"
    train(*flags, "--n_layer=1", "--n_embd=48", "--optimizer=adamw")
    return log_dir


def test_samples_from_a_run(finished, tmp_path):
    """Its shape, its vocabulary and its newest checkpoint, whatever the constants say."""
    before = {path: path.read_bytes() for path in finished.iterdir()}
    texts = samples(f"--init_from={finished}", "--prompt=KING HENRY:", cwd=tmp_path)
    assert len(texts) == 2 and all(text.startswith("KING HENRY:") for text in texts)
    assert before == {path: path.read_bytes() for path in finished.iterdir()}
    assert not list(tmp_path.iterdir())


def test_a_run_begins_with_the_weights_of_another(finished, text, tmp_path):
    """A text of its own, another optimizer. The first loss is the other run's last."""
    flags = "baby", *SMALL, f"--init_from={finished}", f"--log_dir={tmp_path}/log"
    launch(*flags, f"--data={text}", "--max_steps=3", "--save_every=3", "--sample_every=3")
    first = series(tmp_path / "log", "val_loss")[0]
    assert first == pytest.approx(series(finished, "val_loss")[20], abs=1e-5)
    shape = load(tmp_path / "log" / "ckpt_000003.pt")["config"]["model"]
    assert (shape["n_layer"], shape["n_embd"], shape["vocab_size"]) == (1, 48, 256)
    assert [event["step"] for event in log_of(tmp_path / "log") if "sample" in event] == [
        *(0, 0, 3, 3)
    ]


def test_a_run_begins_with_its_own_older_weights(finished, text, tmp_path):
    """In the same folder: the older run moves aside."""
    import shutil

    shutil.copytree(finished, tmp_path / "log")
    flags = "baby", *SMALL, f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=1"
    said = launch(*flags, f"--init_from={tmp_path}/log")
    assert f"{tmp_path}/log-1" in said and (tmp_path / "log-1" / "ckpt_000020.pt").exists()
    first = series(tmp_path / "log", "val_loss")[0]
    assert first == pytest.approx(series(finished, "val_loss")[20], abs=1e-5)


def test_a_run_on_gpt2_s_tokens_is_fine_tuned(shards, text, tmp_path):
    """From its folder, and after its checkpoints are gone, from the hf/ in it."""
    flags = "gpt2", *SMALL, f"--data={shards[0]}", f"--log_dir={tmp_path}/log", "--hella_every=0"
    launch(*flags, "--max_steps=2")
    losses = []
    for n in (1, 2):
        more = f"--init_from={tmp_path}/log", f"--data={text}", f"--log_dir={tmp_path}/{n}"
        launch("finetune", *SMALL, *more, "--max_steps=1", "--dropout=0")
        losses.append(series(tmp_path / str(n), "val_loss")[0])
        for path in (tmp_path / "log").glob("*.pt"):
            path.unlink()
    assert losses[0] == losses[1]


def test_evaluating_a_run_needs_no_optimizer(finished, text, tmp_path):
    """A run of AdamW is evaluated by a recipe whose optimizer is Muon."""
    flags = "baby", *SMALL, f"--data={text}", "--max_steps=0"
    for more in ([f"--init_from={finished}"], ["--init_from=resume", f"--log_dir={finished}"]):
        said = launch(*flags, *more, cwd=tmp_path)
        found = float(re.search(r"val loss ([0-9.]+)", said)[1])
        assert found == pytest.approx(series(finished, "val_loss")[20], abs=1e-4)
    first = json.loads((finished / "log.jsonl").read_text().splitlines()[0])
    assert first["constants"]["optimizer"] == "adamw"
