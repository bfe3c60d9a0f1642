"""
HellaSwag (Zellers et al. 2019, arxiv.org/abs/1905.07830): which of four endings continues a text?

    python hellaswag.py gpt2                    # or gpt2-medium, gpt2-large, gpt2-xl
    python hellaswag.py log/gpt2 --show=3       # the folder of a run, or one of Hugging Face's

A model's losses on the tokens of an ending add up to -log p(ending | context). acc is how often
the right ending has the lowest sum. acc_norm is how often it has the lowest mean, which does
not favour short endings. Guessing gives 0.25. Published values, +- 0.005:
                gpt2     medium   large    xl       GPT-3 (124M)
    acc         0.2859                     0.3842                   build-nanogpt
    acc_norm    0.2955   0.3752   0.4320   0.4893   0.337           and llm.c, GPT-3's paper
"""

import argparse
import hashlib
import json
import sys
from collections import namedtuple
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# the authors' 10,042 validation examples are downloaded to FILE; without a network, put it there
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
FILE = Path(__file__).resolve().with_name("hellaswag_val.jsonl")

# four rows of tokens (context and ending), the context's length, the number of the right row
Example = namedtuple("Example", "rows n_context label")


# examples --------------------------------------------------------------------
def read(path):
    """Reads Examples from JSON lines. A bad line raises ValueError with its number."""
    content = path.read_bytes()
    if path == FILE and hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError("not HellaSwag's validation set; remove it, or name yours by --data")
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    examples = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            context, endings, label = fields["ctx"], fields["endings"], str(fields["label"])
            is_list = isinstance(endings, list) and len(endings) == 4
            if not is_list or label not in ("0", "1", "2", "3"):
                raise ValueError("needs a list of four endings, and a label from 0 to 3")
            if not all(text.strip() for text in [context, *endings]):
                raise ValueError("the context or an ending is empty")
        except Exception as error:
            raise ValueError(f"line {number}: {error!r}") from None
        context = encode(context)
        # in GPT-2's vocabulary, the space before a word is part of it
        rows = [context + encode(" " + ending) for ending in endings]
        examples.append(Example(rows, len(context), int(label)))
    if not examples:
        raise ValueError("there are no examples")
    return examples


def load_examples(path=FILE):
    """Returns the Examples. If that fails, raises ValueError with a message of one line. All ranks
    get the same from rank 0, since other nodes may not see its disk."""
    examples = problem = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            if path == FILE and not FILE.exists():
                torch.hub.download_url_to_file(URL, str(FILE), SHA256, progress=False)
            examples = read(path)
        # RuntimeError: a wrong hash, perhaps that of an error page
        except (OSError, ValueError, RuntimeError) as error:
            problem = f"{path}: {' '.join(str(error).split())}"
    if dist.is_initialized():
        shared = [examples, problem]
        dist.broadcast_object_list(shared)
        examples, problem = shared
    if problem is not None:
        raise ValueError(problem)
    return examples


# evaluation ------------------------------------------------------------------
def width(example):
    """The length of its longest row."""
    return max(len(row) for row in example.rows)


def batches(examples, batch_tokens):
    """Yields lists of examples: at most batch_tokens with padding, or a single example."""
    # similar lengths need little padding; the longest come first: if they fit, all do
    examples = sorted(examples, key=width, reverse=True)
    i = 0
    while i < len(examples):
        n = max(1, batch_tokens // (4 * width(examples[i])))
        yield examples[i : i + n]
        i += n


def longest_row(model):
    """How many tokens a row can have: one more than our GPT, or transformers' GPT2LMHeadModel, can
    see, since the last one is only a target."""
    config = model.config
    return 1 + (config.block_size if hasattr(config, "block_size") else config.n_positions)


@torch.no_grad()
def ending_losses(model, batch):
    """Returns the losses of n examples' endings: sums and means over tokens, each (n, 4)."""
    limit = longest_row(model)
    rows = []
    masks = []
    for example in batch:
        for row in example.rows:
            is_ending = torch.arange(len(row)) >= example.n_context
            # rows that are too long keep their right end
            rows.append(torch.tensor(row)[-limit:])
            masks.append(is_ending[-limit:])

    # (4n, width), padded on the right; each position predicts the next token
    device = model.lm_head.weight.device
    tokens = pad_sequence(rows, batch_first=True).to(device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    mask = pad_sequence(masks, batch_first=True)[:, 1:].to(device)
    # logits for the endings only, which are about a third of the tokens
    if hasattr(model, "hidden"):
        logits = model.logits(model.hidden(inputs)[mask])
    else:
        hidden = model.transformer(inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[mask])
    losses = torch.zeros(mask.shape, device=device)
    losses[mask] = F.cross_entropy(logits.float(), targets[mask], reduction="none")
    sums = losses.sum(1).view(-1, 4)
    means = sums / mask.sum(1).view(-1, 4)
    return sums.cpu(), means.cpu()


def evaluate(model, examples, batch_tokens=16384, until_stopped=iter):
    """Scores our GPT or transformers' GPT2LMHeadModel; the ranks share the examples. Returns the
    shares "acc" and "acc_norm", the "total" of examples, and how many rows were "cut" because the
    model can't see all of them. If a loss is not finite, all ranks exit. until_stopped goes through
    the batches; where it ends early, what is returned means nothing."""
    hide = None  # tqdm shows its bar on a terminal only
    if dist.is_initialized():
        examples = examples[dist.get_rank() :: dist.get_world_size()]
        hide = True if dist.get_rank() > 0 else None
    limit = longest_row(model)
    cut = sum(len(row) > limit for example in examples for row in example.rows)

    was_training = model.training
    model.eval()
    correct = correct_norm = not_finite = 0
    progress = tqdm(list(batches(examples, batch_tokens)), "HellaSwag", leave=False, disable=hide)
    for batch in until_stopped(progress):
        sums, means = ending_losses(model, batch)
        labels = torch.tensor([example.label for example in batch])
        correct += (sums.argmin(1) == labels).sum().item()
        correct_norm += (means.argmin(1) == labels).sum().item()
        not_finite += not sums.isfinite().all()
    model.train(was_training)

    counts = torch.tensor([correct, correct_norm, len(examples), cut, not_finite])
    counts = counts.to(model.lm_head.weight.device)
    if dist.is_initialized():
        dist.all_reduce(counts)
    correct, correct_norm, total, cut, not_finite = counts.tolist()
    if not_finite:
        sys.exit("HellaSwag: losses are not finite; the model has diverged or is damaged")
    return {"acc": correct / total, "acc_norm": correct_norm / total, "total": total, "cut": cut}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.error = sys.exit  # one line, exit status 1
    gpu = torch.accelerator.current_accelerator(check_available=True)
    parser.add_argument("model", help="gpt2 ... gpt2-xl, or the folder of a run or of a model")
    parser.add_argument("--data", type=Path, default=FILE, help="examples in the same format")
    parser.add_argument("--device", default=str(gpu or "cpu"))
    parser.add_argument("--batch_tokens", type=int, default=16384, help="lower saves memory")
    parser.add_argument("--limit", type=int, default=sys.maxsize, help="score only this many")
    parser.add_argument("--show", type=int, default=0, help="first print this many examples")
    args = parser.parse_args()
    if args.limit < 1:
        sys.exit("--limit has to be at least 1")
    from train_gpt2 import load_weights

    try:
        examples = load_examples(args.data)[: args.limit]
        model = load_weights(args.model).to(args.device)
    except (ValueError, RuntimeError) as error:  # of the examples, or of the device
        sys.exit(" ".join(str(error).split()))
    if model.config.vocab_size < 50257:
        found = f"{args.model} has {model.config.vocab_size} tokens"
        sys.exit(f"{found}, but HellaSwag needs the 50257 of GPT-2's tokenizer")
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU

    decode = tiktoken.get_encoding("gpt2").decode
    for example in examples[: args.show]:
        _, means = ending_losses(model, [example])
        print(f"\n{decode(example.rows[0][: example.n_context])}")
        for i, row in enumerate(example.rows):
            mark = "right" if i == example.label else "     "
            print(f" {mark} {means[0, i]:.4f} {decode(row[example.n_context :])}")

    result = evaluate(model, examples, args.batch_tokens)
    total = result["total"]
    if result["cut"]:
        print(f"{result['cut']} rows are too long for the model and lost their left end")
    for name in ("acc", "acc_norm"):
        print(f"{name} {round(result[name] * total)}/{total}={result[name]:.4f}")
