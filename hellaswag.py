"""
HellaSwag (Zellers et al. 2019, arxiv.org/abs/1905.07830): which of four endings continues a text?

    python hellaswag.py gpt2                      # or gpt2-medium, gpt2-large, gpt2-xl
    python hellaswag.py log/gpt2/hf --show=3      # a folder that save_pretrained has written
    torchrun --standalone --nproc_per_node=8 hellaswag.py gpt2-xl

A language model does not choose, but finds an ending more or less likely: after the context, the
tokens of " " and the ending. acc takes the likeliest ending, acc_norm the one with the likeliest
tokens on average, which does not favour short ones. Chance is 0.25. Published figures are
                gpt2     medium   large    xl       GPT-3 (124M)
    acc         0.2859                     0.3842                 build-nanogpt, llm.c
    acc_norm    0.2955   0.3752   0.4320   0.4893   0.337         the same, and the GPT-3 paper
Harnesses that word the examples and normalize the losses in other ways get higher ones.
"""
import argparse
import collections
import contextlib
import hashlib
import http.client
import json
import os
import signal
import sys
import urllib.request

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

# the authors' validation set, and its SHA-1 as git counts it
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA1, N_EXAMPLES = "0f5ee25d72216f12317d5d8a7b92deafa423d81e", 10042
FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hellaswag_val.jsonl")

# context and endings as lists of tokens, the number of the right ending, the line it was read from
Example = collections.namedtuple("Example", "context endings label text")

# data ------------------------------------------------------------------------
def download():
    """Fetches FILE, unless it is there. What is not the validation set isn't kept: OSError."""
    if os.path.exists(FILE):
        return
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{URL} can't be fetched: {error!r}") from None
    if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != SHA1:
        raise OSError(f"{URL} gave {len(content)} bytes that are not the validation set")
    with open(FILE + ".tmp", "wb") as file:
        file.write(content)
    os.replace(FILE + ".tmp", FILE)

def read(path, limit=None):
    """A file of JSON lines -> list of Examples. Raises ValueError with the number of a bad line."""
    encode, examples = tiktoken.get_encoding("gpt2").encode_ordinary, []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)
                if len(text["endings"]) != 4 or text["label"] not in (0, 1, 2, 3):
                    raise ValueError("four endings and a label from 0 to 3 are needed")
                if not all(part.strip() for part in [text["ctx"], *text["endings"]]):
                    raise ValueError("the context or an ending is empty")
                endings = [encode(" " + ending) for ending in text["endings"]]
                examples.append(Example(encode(text["ctx"]), endings, text["label"], text))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: {error!r}") from None
    if not examples or path == FILE and len(examples) != N_EXAMPLES:
        raise ValueError(f"{path}: {len(examples)} examples, not {N_EXAMPLES}; remove it")
    return examples[:limit]

def load(path=FILE, limit=None, skip=False):
    """All processes get the examples that rank 0 reads, of a file that it fetches if need be.
    With skip=True an error leads to a message and no examples."""
    examples = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            if path == FILE:
                download()
            examples = [read(path, limit)]
        except (OSError, ValueError) as error:
            if not skip:
                raise
            print(f"no HellaSwag: {error}")
    if dist.is_initialized():
        dist.broadcast_object_list(examples)
    return examples[0]

# evaluation ------------------------------------------------------------------
def pack(examples, block_size, batch_tokens):
    """Yields batches of examples, the longest first, of up to batch_tokens when padded."""
    # one token more than the model takes, as the last one is only a target
    lengths = [min(block_size + 1, len(e.context) + max(map(len, e.endings))) for e in examples]
    batch, longest = [], 0
    for i in sorted(range(len(examples)), key=lambda i: -lengths[i]):
        longest = longest or lengths[i]
        if batch and (len(batch) + 1) * 4 * longest > batch_tokens:
            yield batch
            batch, longest = [], lengths[i]
        batch.append(examples[i])
    if batch:
        yield batch

def token_losses(hidden, weight, targets):
    """States (N, C) that predict tokens (N) -> their losses (N), -log softmax(hidden weight^T). The
    logits are made 4096 at a time: logsumexp of the parts' logsumexps is that of all 50257."""
    sums = [F.linear(hidden, rows).float().logsumexp(1) for rows in weight.split(4096)]
    return torch.stack(sums).logsumexp(0) - (hidden * weight[targets]).float().sum(1)

@torch.no_grad()
def score(model, batch):
    """Loss of each ending, summed over its tokens, and their number: two arrays (len(batch), 4)."""
    block_size, device = model.transformer.wpe.num_embeddings, model.lm_head.weight.device
    weight = model.lm_head.weight[:getattr(model, "n_tokens", None)]  # ours may be padded
    rows = [(e.context + ending)[-block_size - 1:] for e in batch for ending in e.endings]
    counts = [min(len(ending), block_size) for e in batch for ending in e.endings]
    width = max(map(len, rows)) - 1
    idx = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        idx[i, :len(row) - 1] = row[:-1]
    # the tokens of an ending, and where in the batch each is predicted: one place before its own
    targets = np.concatenate([row[-n:] for row, n in zip(rows, counts, strict=True)])
    places = np.concatenate([i * width + np.arange(len(row) - 1 - n, len(row) - 1)
                             for i, (row, n) in enumerate(zip(rows, counts, strict=True))])
    idx, places, targets = (torch.from_numpy(x).to(device) for x in (idx, places, targets))
    hidden = (model.hidden(idx) if hasattr(model, "hidden")
              else model.transformer(idx, use_cache=False).last_hidden_state)
    pieces = zip(hidden.flatten(0, 1)[places].split(1024), targets.split(1024), strict=True)
    losses = torch.cat([token_losses(h, weight, t) for h, t in pieces]).cpu().numpy()
    sums = np.bincount(np.repeat(np.arange(len(rows)), counts), losses)
    return sums.reshape(-1, 4), np.reshape(counts, (-1, 4))

def evaluate(model, examples, batch_tokens=16384, autocast=None, progress=False):
    """Scores examples with our GPT or transformers' GPT2LMHeadModel, split over the ranks.
    -> {"acc", "acc_norm": fractions right, "correct", "correct_norm", "total": numbers of examples,
    "cut": number of rows that are longer than the model's context and lost their left end}."""
    if dist.is_initialized():
        examples = examples[dist.get_rank()::dist.get_world_size()]
    block_size, was_training = model.transformer.wpe.num_embeddings, model.training
    totals = np.zeros(5, np.int64)  # right by acc, by acc_norm; examples; rows cut; batches failed
    model.eval()
    with tqdm(total=len(examples), disable=not progress) as bar:
        for batch in pack(examples, block_size, batch_tokens):
            with autocast or contextlib.nullcontext():
                sums, counts = score(model, batch)
            labels = np.array([e.label for e in batch])
            right = [np.sum(losses.argmin(1) == labels) for losses in (sums, sums / counts)]
            cut = sum(len(e.context + x) > block_size + 1 for e in batch for x in e.endings)
            totals += [*right, len(batch), cut, not np.isfinite(sums).all()]
            bar.update(len(batch))
            bar.set_postfix_str("acc {:.4f}, acc_norm {:.4f}".format(*totals[:2] / totals[2]))
    model.train(was_training)
    totals = torch.from_numpy(totals).to(model.lm_head.weight.device)
    if dist.is_initialized():
        dist.all_reduce(totals)
    correct, correct_norm, total, cut, failed = totals.tolist()
    if failed:
        sys.exit("HellaSwag: the model's losses are not finite")
    return {"acc": correct / total, "acc_norm": correct_norm / total, "correct": correct,
            "correct_norm": correct_norm, "total": total, "cut": cut}

# the command -----------------------------------------------------------------
if __name__ == "__main__":
    gpu = torch.accelerator.current_accelerator(check_available=True)
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.error = lambda message: sys.exit(f"{message}; --help lists what there is")
    parser.add_argument("model", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder")
    parser.add_argument("--data", default=FILE, help="a file of other examples in the same format")
    parser.add_argument("--device", default=gpu.type if gpu else "cpu")
    parser.add_argument("--batch_tokens", type=int, default=16384, help="less takes less memory")
    parser.add_argument("--limit", type=int, help="only the first so many examples")
    parser.add_argument("--show", type=int, default=0, help="print so many, with the losses")
    args = parser.parse_args()
    if args.batch_tokens < 1 or args.limit is not None and args.limit < 1:
        parser.error("--batch_tokens and --limit have to be positive")
    signal.signal(signal.SIGINT, lambda *_: sys.exit("stopped"))
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    device, rank = args.device, int(os.environ.get("RANK", 0))
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            if device == "cuda":
                device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        examples = load(args.data, args.limit)
        from transformers import GPT2Config, GPT2LMHeadModel
        config = GPT2Config.from_pretrained(args.model)
        if config.activation_function == "gelu_new":  # GPT-2's own; this is the same in one kernel
            config.activation_function = "gelu_pytorch_tanh"
        model, info = GPT2LMHeadModel.from_pretrained(
            args.model, config=config, output_loading_info=True)
        lacks = sorted(info["missing_keys"]) or ["tokens"] * (config.vocab_size < 50257)
        if lacks:
            raise ValueError(f"not a GPT-2, it lacks {lacks[0]}")
        model.to(device, torch.float32)
    except Exception as error:  # transformers' errors have no common base
        sys.exit(f"{args.model} on {args.data}: {' '.join(str(error).split())}")
    for e in examples[:args.show] if rank == 0 else []:
        sums, counts = score(model.eval(), [e])
        print(f"\n{e.text['ctx']}")
        for i, loss in enumerate((sums / counts)[0]):
            print(f"{'right' if i == e.label else '':>6} {loss:.4f}  {e.text['endings'][i]}")
    result = evaluate(model, examples, args.batch_tokens, progress=rank == 0)
    n = result["total"]
    if rank == 0:
        if result["cut"]:
            print(f"{result['cut']} of {4 * n} rows lost their left end: too long for the model")
        errors = {key: (result[key] * (1 - result[key]) / n) ** 0.5 for key in ("acc", "acc_norm")}
        print(f"acc {result['correct']}/{n}={result['acc']:.4f} +- {errors['acc']:.4f}, acc_norm "
              f"{result['correct_norm']}/{n}={result['acc_norm']:.4f} +- {errors['acc_norm']:.4f}")
    if dist.is_initialized():
        dist.barrier()  # leave together: a process that is left behind may abort
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # Python's own end aborts where a thread of gloo's is still freeing a tensor
