"""The model, compared with transformers and with what can be worked out by hand."""

import json
import math

import pytest
import torch
from conftest import in_a_fork

from train_gpt2 import (
    GPT,
    Block,
    GPTConfig,
    LayerNorm,
    from_pretrained,
    is_gpt2,
    save_pretrained,
)

SMALL = GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=4, n_embd=32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(SMALL)


@pytest.mark.parametrize(
    "shape, count",
    [
        ((12, 12, 768), 124_439_808),
        ((24, 16, 1024), 354_823_168),
        ((36, 20, 1280), 774_030_080),
        ((48, 25, 1600), 1_557_611_200),
    ],
)
def test_parameters_of_the_four_sizes(shape, count):
    with torch.device("meta"):
        model = GPT(GPTConfig(1024, 50257, *shape))
    padding = len(model.lm_head.weight) - 50257
    assert sum(p.numel() for p in model.parameters()) == count + padding * shape[2]
    assert len(model.lm_head.weight) == 50304


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=64))
    x = torch.randint(50257, (4, 65))
    loss = model(x[:, :-1], x[:, 1:])
    assert loss.dtype == torch.float32
    assert abs(loss.item() - math.log(50257)) < 0.1


def test_weights_start_as_gpt_2_s(model):
    """std is 0.02, and 0.02 / sqrt(2 * 3) for what is added to the residual stream."""
    torch.manual_seed(0)
    wide = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=3, n_head=4, n_embd=256))
    for name, p in wide.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.05), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert torch.all(p == (1 if name.endswith("weight") else 0)), name
    assert model.transformer.wte.weight is model.lm_head.weight


def test_the_residual_stream_under_autocast(model):
    """It is bfloat16 from the embeddings to the last LayerNorm. The loss is float32 and close."""
    x = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
    seen = []
    for module in model.modules():
        if isinstance(module, (Block, LayerNorm)):
            module.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    plain = model(x[:, :-1], x[:, 1:])
    assert {z.dtype for z in seen} == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x[:, :-1], x[:, 1:])
    assert len(seen) > 6 and {z.dtype for z in seen} == {torch.bfloat16}
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(plain.item(), abs=0.01)


def test_no_position_sees_a_later_one(model):
    x = torch.randint(50, (1, 16))
    before = model(x)
    for t in range(16):
        y = x.clone()
        y[0, t] = (y[0, t] + 1) % 50
        after = model(y)
        assert torch.equal(before[0, :t], after[0, :t])
        assert not torch.equal(before[0, t], after[0, t])


def test_the_loss_is_the_mean_cross_entropy_of_the_logits(model):
    x = torch.randint(50, (2, 9))
    p = model(x[:, :-1]).softmax(-1)
    by_hand = -sum(p[b, t, x[b, t + 1]].log() for b in range(2) for t in range(8)) / 16
    assert model(x[:, :-1], x[:, 1:]).item() == pytest.approx(by_hand.item(), abs=1e-5)


@in_a_fork
def test_one_batch_overfits(model):
    x = torch.randint(50, (4, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_dropout_only_while_training():
    model = GPT(GPTConfig(**{**vars(SMALL), "dropout": 0.3}))
    x = torch.randint(50, (1, 16))
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def transformers_model(**more):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(n_positions=64, n_layer=3, n_head=4, n_embd=48, **more))
    with torch.no_grad():  # biases and norms at their initial values would hide mistakes
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def test_parity_with_transformers_there_and_back(tmp_path):
    from transformers import GPT2LMHeadModel

    theirs = transformers_model()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs").eval()
    x = torch.randint(50257, (2, 64))
    with torch.no_grad():
        expected = theirs(x).logits
        assert torch.allclose(ours(x), expected, atol=1e-4)
        save_pretrained(ours, tmp_path / "ours")
        assert torch.equal(
            GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()(x).logits, expected
        )
        assert torch.equal(from_pretrained(tmp_path / "ours").eval()(x), ours(x))


def test_padding_stays_inside(tmp_path):
    """The vocabulary of 50257 has 50304 rows. The last 47 have no scores, change no loss, are
    never sampled and never saved."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=16)).eval()
    x = torch.randint(50257, (4, 9))
    loss = model(x[:, :-1], x[:, 1:])
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        expected = model(x[:, :-1], x[:, 1:])
        model.lm_head.weight[50257:] = 10.0  # by far the likeliest
    assert loss != expected == model(x[:, :-1], x[:, 1:])
    assert model(x[:, :-1]).shape == (4, 8, 50257)
    assert model.generate(torch.zeros(64, 1, dtype=torch.long), 10).max() < 50257
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 50257
    found = from_pretrained(tmp_path)
    assert found.config.vocab_size == 50257 and found.lm_head.weight.shape == (50304, 16)
    assert (found.lm_head.weight[50257:] == 0).all()


def test_targets_of_minus_100_have_no_loss(model):
    """They count in the mean, so that a loss can be scaled by the number of rows."""
    x = torch.randint(50, (3, 9))
    y = x[:, 1:].clone()
    two = model(x[:2, :-1], y[:2])
    y[2] = -100
    assert model(x[:, :-1], y).item() == pytest.approx(two.item() * 2 / 3, abs=1e-6)
    y[:] = -100
    assert model(x[:, :-1], y).item() == 0


class WithoutPositions(GPT):
    def __init__(self, config):
        super().__init__(config)
        del self.transformer["wpe"]


class WithAnotherActivation(GPT):
    def logits(self, hidden):
        return super().logits(hidden.relu())


def test_a_changed_architecture_is_noticed(model, capsys):
    """By its weights, or by what it computes from the same weights."""
    assert is_gpt2(model) and model.training and not capsys.readouterr().out
    for changed in (WithoutPositions(SMALL), WithAnotherActivation(SMALL)):
        assert not is_gpt2(changed)
        assert "no hf/" in capsys.readouterr().out


def test_generate_draws_from_the_model_s_scores(model):
    model.eval()
    x = torch.randint(50, (3, 5))

    def generate(seed, **how):
        torch.manual_seed(seed)
        return model.generate(x, 30, **how)

    assert generate(1).shape == (3, 35)  # more than the context of 16
    assert torch.equal(generate(1)[:, :5], x)
    assert torch.equal(generate(1), generate(1))
    assert not torch.equal(generate(1), generate(2))
    greedy = generate(1, top_k=1)
    assert torch.equal(greedy, generate(2, temperature=0.0))
    assert greedy[0, 5] == model(x)[0, -1].argmax()
    with torch.no_grad():
        top = model(x)[:, -1].topk(3).indices
    for seed in range(20):
        assert (generate(seed, top_k=3)[:, 5:6] == top).any(-1).all()
