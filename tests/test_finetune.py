"""GPT-2's weights in one line. A small random GPT-2, saved by transformers, stands in for them."""

import re

import pytest
import torch
from conftest import log_of, series, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hf")
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32)).save_pretrained(path)
    return path


def test_fine_tuning_on_a_text(text, folder, tmp_path):
    """It starts at transformers' loss on the same tokens, and the loss falls. transformers reads
    the result, and --init_from=resume --encoding=gpt2 continues."""
    import tiktoken
    from transformers import GPT2LMHeadModel

    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--encoding=gpt2", "--max_lr=1e-2"
    flags += "--val_every=10", "--save_every=10", "--val_steps=2", "--warmup_steps=2"
    train(*flags, f"--init_from={folder}", "--max_steps=20")
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
    result = train(*flags, "--init_from=resume", "--max_steps=22")
    assert "resuming at step 20" in result.stdout
    assert list(series(tmp_path / "log", "train_loss")) == list(range(22))


def talk(folder, *flags, cwd):
    """The samples from a folder's weights, with no data to read."""
    flags = f"--init_from={folder}", "--data=none", "--max_steps=0", "--val_every=0", *flags
    flags += "--hella_every=0", "--sample_every=1", f"--log_dir={cwd}/log"
    return re.split(r"step +0 \| sample: ", train(*flags).stdout)[1:]


def test_samples_without_training(folder, tmp_path):
    """Samples depend on the seed. Nothing is written."""
    first = talk(folder, "--prompt=The sea", cwd=tmp_path)
    assert len(first) == 2 and all(text.startswith("The sea") for text in first)
    assert talk(folder, "--prompt=The sea", cwd=tmp_path) == first
    assert talk(folder, "--prompt=The sea", "--seed=2", cwd=tmp_path) != first
    assert not list(tmp_path.iterdir())


def test_a_sample_ends_with_its_document(folder, tmp_path):
    """A model that prefers <|endoftext|> says nothing after the prompt."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[50256] = 10.0
    model.save_pretrained(tmp_path / "hf")
    texts = talk(tmp_path / "hf", "--prompt=The sea", cwd=tmp_path)
    assert [text.strip() for text in texts] == ["The sea", "The sea"]
    assert len(talk(folder, "--prompt=", cwd=tmp_path)) == 2  # starts with <|endoftext|>
    assert not (tmp_path / "log").exists() or not log_of(tmp_path / "log")
