"""
HellaSwag (Zellers et al. 2019, arxiv.org/abs/1905.07830): which of four endings continues a text?

    python hellaswag.py gpt2                    # or gpt2-medium, gpt2-large, gpt2-xl
    python hellaswag.py log/gpt2/hf --show=3    # a folder that save_pretrained has written

A language model is not asked to choose. It says how likely an ending is after the context: the
losses of its tokens add up to -log p(ending | context). acc is how often the right ending has the
lowest sum. Long endings have large sums, so acc_norm takes the mean instead. Published, with a
standard error of 0.005 (harnesses that word the examples in other ways report higher figures):

                gpt2     medium   large    xl       GPT-3 (124M)   guessing
    acc         0.2859                     0.3842                  0.25    build-nanogpt
    acc_norm    0.2955   0.3752   0.4320   0.4893   0.337          0.25    llm.c, GPT-3's
"""
import argparse
import hashlib
import json
import sys
from collections import namedtuple
from pathlib import Path

import requests
import tiktoken
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# the authors' validation set, its SHA-1 as git computes it, and where it is kept
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA1 = "0f5ee25d72216f12317d5d8a7b92deafa423d81e"
N_EXAMPLES = 10042
FILE = Path(__file__).resolve().with_name("hellaswag_val.jsonl")

# four rows of tokens (the context, then an ending), the context's length, and which row is right
Example = namedtuple("Example", "rows n_context label")

# examples --------------------------------------------------------------------
def download():
    """Fetches the validation set to FILE, whole or not at all. Raises OSError."""
    response = requests.get(URL, timeout=60)
    response.raise_for_status()
    content = response.content
    # an error page may come with the status of a success
    if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != SHA1:
        raise OSError(f"{URL} gave {len(content)} bytes that are not the validation set")
    incomplete = FILE.with_suffix(".tmp")
    incomplete.write_bytes(content)
    incomplete.replace(FILE)

def read(path):
    """A file of JSON lines -> list of Examples. A bad line raises ValueError with its number."""
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    examples = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            fields = json.loads(line)
            texts = [fields["ctx"], *fields["endings"]]
            complete = len(texts) == 5 and all(text.strip() for text in texts)
            if not complete or fields["label"] not in (0, 1, 2, 3):
                raise ValueError("needs a context and four endings, none empty, and a label")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from None

        # in GPT-2's vocabulary a word begins with the space before it
        context = encode(texts[0])
        rows = [context + encode(" " + ending) for ending in texts[1:]]
        examples.append(Example(rows, len(context), fields["label"]))

    partial = path == FILE and len(examples) != N_EXAMPLES
    if partial or not examples:
        raise ValueError(f"{path}: {len(examples)} examples, not {N_EXAMPLES}; remove it")
    return examples

def load_examples(path=FILE):
    """-> list of Examples, the same on all ranks. Raises ValueError on all ranks, with one line."""
    shared = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            if path == FILE and not FILE.exists():
                download()
            shared = [read(path)]
        except (OSError, ValueError) as error:
            shared = [ValueError(" ".join(str(error).split()))]

    # rank 0 sends what it has, examples or error, as other nodes may not see its disk
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    if isinstance(shared[0], ValueError):
        raise shared[0]
    return shared[0]

def load_or_skip():
    """The examples for a training run, or None and a message: it goes on without HellaSwag."""
    try:
        return load_examples()
    except (OSError, ValueError) as error:
        print(f"no HellaSwag: {error}")

# evaluation ------------------------------------------------------------------
def width(example):
    """Tokens in the longest of its rows."""
    return max(len(row) for row in example.rows)

def batches(examples, batch_tokens):
    """Yields lists of examples of at most batch_tokens when padded, or of one example."""
    # rows of about one length need little padding; where memory runs out, it does so at once
    examples = sorted(examples, key=width, reverse=True)
    i = 0
    while i < len(examples):
        n = max(1, batch_tokens // (4 * width(examples[i])))
        yield examples[i:i + n]
        i += n

@torch.no_grad()
def ending_losses(model, batch):
    """n examples -> the losses of their endings (n, 4): summed over the tokens, and averaged."""
    # one token more than the model's context, as the last one is only a target
    limit = model.transformer.wpe.num_embeddings + 1
    rows = []
    masks = []
    for example in batch:
        for row in example.rows:
            is_ending = torch.arange(len(row)) >= example.n_context
            # a row that is too long loses its left end
            rows.append(torch.tensor(row)[-limit:])
            masks.append(is_ending[-limit:])

    # pad on the right: (4n, longest); each position predicts the next one's token
    device = model.lm_head.weight.device
    tokens = pad_sequence(rows, batch_first=True).to(device)
    mask = pad_sequence(masks, batch_first=True)[:, 1:].to(device)
    if hasattr(model, "hidden"):
        hidden = model.hidden(tokens[:, :-1])
    else:
        hidden = model.transformer(tokens[:, :-1], use_cache=False).last_hidden_state

    # logits for the endings alone, a third of the memory; without the padding of our vocabulary
    logits = model.lm_head(hidden[mask])[:, :getattr(model, "n_tokens", None)]
    losses = torch.zeros(mask.shape, device=device)
    losses[mask] = F.cross_entropy(logits.float(), tokens[:, 1:][mask], reduction="none")
    sums = losses.sum(1).view(-1, 4)
    return sums, sums / mask.sum(1).view(-1, 4)

def evaluate(model, examples, batch_tokens=16384, progress=False):
    """Scores our GPT or transformers' GPT2LMHeadModel; the ranks share the examples.
    -> {"acc", "acc_norm": fractions right, "correct", "correct_norm", "total": examples,
    "cut": rows longer than the model's context}. Exits on all ranks if a loss is not finite."""
    if dist.is_initialized():
        examples = examples[dist.get_rank()::dist.get_world_size()]
    limit = model.transformer.wpe.num_embeddings + 1
    cut = sum(len(row) > limit for example in examples for row in example.rows)

    was_training = model.training
    model.eval()
    correct = correct_norm = not_finite = 0
    for batch in tqdm(list(batches(examples, batch_tokens)), disable=not progress):
        sums, means = ending_losses(model, batch)
        labels = torch.tensor([example.label for example in batch], device=sums.device)
        correct += (sums.argmin(1) == labels).sum().item()
        correct_norm += (means.argmin(1) == labels).sum().item()
        not_finite += (~sums.isfinite()).sum().item()
    model.train(was_training)

    counts = [correct, correct_norm, len(examples), cut, not_finite]
    counts = torch.tensor(counts, device=model.lm_head.weight.device)
    if dist.is_initialized():
        dist.all_reduce(counts)
    correct, correct_norm, total, cut, not_finite = counts.tolist()
    if not_finite:
        sys.exit(f"HellaSwag: {not_finite} of {4 * total} losses are not finite")
    return {"acc": correct / total, "acc_norm": correct_norm / total, "correct": correct,
            "correct_norm": correct_norm, "total": total, "cut": cut}

# the command -----------------------------------------------------------------
if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.error = sys.exit
    gpu = torch.accelerator.current_accelerator(check_available=True)
    parser.add_argument("model", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder")
    parser.add_argument("--data", type=Path, default=FILE, help="other examples in the same format")
    parser.add_argument("--device", default=str(gpu or "cpu"))
    parser.add_argument("--batch_tokens", type=int, default=16384, help="less takes less memory")
    parser.add_argument("--limit", type=int, default=sys.maxsize, help="only the first so many")
    parser.add_argument("--show", type=int, default=0, help="print so many, with their losses")
    args = parser.parse_args()
    if args.limit < 1:
        sys.exit("--limit has to be positive")

    from transformers import GPT2LMHeadModel
    try:
        examples = load_examples(args.data)[:args.limit]
        model, info = GPT2LMHeadModel.from_pretrained(args.model, output_loading_info=True)
        model.to(args.device, torch.float32)
    # the last two are what a device that is not there leads to
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        sys.exit(" ".join(str(error).split()))
    # transformers has filled what is missing with random numbers
    if info["missing_keys"] or model.config.vocab_size < 50257:
        sys.exit(f"{args.model} is not a GPT-2: it lacks weights or tokens")
    # the same function in one kernel instead of eight
    if model.config.activation_function == "gelu_new":
        for block in model.transformer.h:
            block.mlp.act = torch.nn.GELU(approximate="tanh")
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU

    decode = tiktoken.get_encoding("gpt2").decode
    for rows, n_context, label in examples[:args.show]:
        _, means = ending_losses(model, [Example(rows, n_context, label)])
        print(f"\n{decode(rows[0][:n_context])}")
        for i, row in enumerate(rows):
            mark = "right" if i == label else ""
            print(f"{mark:>6} {means[0, i]:.4f} {decode(row[n_context:])}")

    result = evaluate(model, examples, args.batch_tokens, progress=True)
    if result["cut"]:
        print(f"{result['cut']} rows are too long for the model and lost their left end")
    for name, right in [("acc", "correct"), ("acc_norm", "correct_norm")]:
        print(f"{name} {result[right]}/{result['total']}={result[name]:.4f}")
