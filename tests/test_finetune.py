"""Somebody's weights: a GPT-2 of Hugging Face's format, or those of a run. A small random GPT-2,
saved by transformers, stands in for OpenAI's."""

import json
import re

import pytest
import torch
from conftest import ROOT, TINY, fork, load, log_of, series, train

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


def test_fine_tuning_starts_at_transformers_loss(text, folder, tmp_path):
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


# somebody's weights that are not GPT-2's function


def other_function(**changes):
    """A GPT-2 of transformers with another config, and the names of what differs."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


OTHER_FUNCTIONS = [
    {"activation_function": "relu"},
    {"activation_function": "gelu"},
    {"layer_norm_epsilon": 1e-2},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"tie_word_embeddings": False},
    {"add_cross_attention": True},
    {"n_inner": 64},
]
SAME_FUNCTION = [
    {"activation_function": "gelu_pytorch_tanh"},
    {"reorder_and_upcast_attn": True},
    {"n_inner": 128},
    {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    {"vocab_size": 50258},
    {"n_positions": 48},
]


@pytest.mark.parametrize("changes", OTHER_FUNCTIONS, ids=str)
def test_weights_of_another_function_are_refused(tmp_path, changes):
    """In one line that names the field. With plain GPT-2, their predictions would differ."""
    from train_gpt2 import GPT2_ONLY, load_weights

    theirs = other_function(**changes)
    theirs.save_pretrained(tmp_path)
    (field,) = changes
    with pytest.raises(SystemExit, match=f"{tmp_path}: .*{field} is ") as error:
        load_weights(str(tmp_path), dropout=0.0)
    assert "\n" not in str(error.value)
    assert {*GPT2_ONLY, "n_inner"} == {"model_type"} | {name for c in OTHER_FUNCTIONS for name in c}
    result = fork("sample", f"--init_from={tmp_path}", "--device=cpu")
    assert result.returncode == 1 and field in result.stderr.splitlines()[-1]
    example = {"ctx": "To be", "endings": ["or", "and", "not", "so"], "label": 0}
    (tmp_path / "examples.jsonl").write_text(json.dumps(example))
    flags = tmp_path, f"--data={tmp_path}/examples.jsonl"
    result = fork(*flags, script=ROOT / "hellaswag.py")
    assert result.returncode == 1 and field in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("changes", SAME_FUNCTION, ids=str)
def test_weights_of_the_same_function_are_used(tmp_path, changes):
    """Their logits are those of transformers."""
    from train_gpt2 import load_weights

    theirs = other_function(**changes).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_weights(str(tmp_path), dropout=0.0).eval()
    x = torch.randint(50257, (2, 48))
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x).logits, atol=1e-3)


def test_weights_that_lack_or_add_a_tensor_are_refused(tmp_path, folder):
    """transformers would fill what is missing with random numbers, and ignore what is too much."""
    import shutil

    from safetensors.torch import load_file, save_file

    from train_gpt2 import load_weights

    name = "transformer.h.1.mlp.c_fc.weight"
    for change in ("lacks", "adds"):
        shutil.copytree(folder, tmp_path / change)
        state = load_file(folder / "model.safetensors")
        if change == "lacks":
            wrong = name
            del state[name]
        else:
            wrong = name.replace("h.1", "h.2")
            state[wrong] = state[name].clone()
        save_file(state, tmp_path / change / "model.safetensors", {"format": "pt"})
        with pytest.raises(SystemExit, match=wrong):
            load_weights(str(tmp_path / change), dropout=0.0)


def test_a_llama_is_refused(tmp_path, text):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    LlamaForCausalLM(LlamaConfig(vocab_size=50257, **size)).save_pretrained(tmp_path / "llama")
    flags = "finetune", *SMALL, f"--data={text}", f"--log_dir={tmp_path}/log"
    result = fork(*flags, f"--init_from={tmp_path}/llama")
    assert result.returncode == 1 and "model_type is llama" in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "log").iterdir())


def test_a_gpt2_with_added_tokens(text, tmp_path):
    """It loads, trains, samples and is saved whole, with the one token that its tokenizer lacks."""
    from transformers import GPT2LMHeadModel

    theirs = other_function(vocab_size=50258)
    with torch.no_grad():
        theirs.transformer.ln_f.bias.fill_(1.0)
        theirs.lm_head.weight[50257] = 1.0  # the likeliest token
    theirs.save_pretrained(tmp_path / "theirs")
    flags = "finetune", *SMALL, f"--data={text}", f"--log_dir={tmp_path}/log", "--max_steps=2"
    flags += f"--init_from={tmp_path}/theirs", "--max_lr=1e-6", "--min_lr=0"
    launch(*flags, "--sample_every=1")
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "log" / "hf")
    assert saved.lm_head.weight.shape == (50258, 32)
    assert torch.allclose(saved.lm_head.weight, theirs.lm_head.weight, atol=1e-4)
    assert len([event for event in log_of(tmp_path / "log") if "sample" in event]) == 6
    assert len(samples(f"--init_from={tmp_path}/log", "--top_k=1", cwd=tmp_path)) == 2


@pytest.mark.parametrize("vocab_size", [1000, 100])
def test_fewer_tokens_than_the_tokenizer_makes(text, tmp_path, vocab_size):
    other_function(vocab_size=vocab_size).save_pretrained(tmp_path / "theirs")
    for recipe in ("finetune", "sample"):
        flags = recipe, *SMALL, f"--data={text}", f"--log_dir={tmp_path}/log"
        result = fork(*flags, f"--init_from={tmp_path}/theirs")
        assert result.returncode == 1
        assert f"has {vocab_size} tokens" in result.stderr.splitlines()[-1]
        assert "50257" in result.stderr and not list((tmp_path / "log").iterdir())


def test_a_model_in_bfloat16_generates(folder):
    """As its user has converted it, on a CPU."""
    from train_gpt2 import from_pretrained

    model = from_pretrained(folder).to(torch.bfloat16).eval()
    idx = model.generate(torch.tensor([[464, 5417]]), 5, top_k=1)
    assert idx.shape == (1, 7) and model(idx).dtype == torch.bfloat16
