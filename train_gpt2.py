"""Trains GPT-2 (124M) from scratch, or a small GPT, on one CPU or on any number of GPUs.

The recipe says what to train, and on which data:
    python train_gpt2.py baby                            a small GPT on Shakespeare, in minutes
    python train_gpt2.py gpt2                            GPT-2 on FineWeb-Edu (see fineweb.py)
    python train_gpt2.py finetune --data=my.txt          OpenAI's GPT-2, trained on your text
    python train_gpt2.py sample --init_from=log/baby     texts from what you have trained
On eight GPUs, and on two nodes of eight (the second with --node_rank=1):
    torchrun --standalone --nproc_per_node=8 train_gpt2.py gpt2
    torchrun --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --nproc_per_node=8 train_gpt2.py gpt2

The constants below can be edited here, or set for one launch: --B=16 --max_lr=1e-3.
The results go to log_dir: log.jsonl, checkpoints and, for GPT-2, hf/, which transformers reads.
Ctrl-C saves and exits. --init_from=resume continues, on any number of GPUs.

A first reading can end with main(). What follows it is machinery that main() calls: the log,
checkpoints, checks, processes and signals, Hugging Face's format, the command line.
"""

import argparse
import ast
import contextlib
import difflib
import functools
import glob
import json
import math
import os
import re
import secrets
import signal
import sys
import time
import traceback
import zipfile
from dataclasses import dataclass
from datetime import timedelta

# large pages of memory, which torch asks for now: with a large vocabulary, they halve a CPU's steps
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP

import hellaswag

# -----------------------------------------------------------------------------
# constants: those of GPT-2 (124M). A recipe replaces some of them, and flags replace both. --help
# shows the comments

data = "edu_fineweb10B"  # a folder of token shards (see fineweb.py), or a text file
encoding = "gpt2"  # how a text becomes tokens: gpt2 or bytes. Shards always hold GPT-2's tokens
log_dir = "log/gpt2"  # folder of the run; an older run in it is moved aside
init_from = "scratch"  # or resume, or weights: gpt2 ... gpt2-xl, folder of a run or of a model
seed = 1337  # for the initial weights, the order of the data, dropout, samples

# the model. Medium is 24, 16, 1024; large 36, 20, 1280; xl 48, 25, 1600
n_layer = 12  # blocks
n_head = 12  # attention heads in each block
n_embd = 768  # channels; GPT-2 has 64 for each head
dropout = 0.0  # share of activations that are dropped; helps if data is seen many times

total_batch_size = 524288  # tokens in an optimizer step, over all GPUs; 2**19 is about 0.5M
B = 0  # sequences in a forward pass, at most; 0: up to 64, as the GPU's memory allows
T = 1024  # tokens in a sequence

# the optimizer: GPT-3's settings for a model of this size
optimizer = "adamw"  # adamw, or muon for the matrices in the blocks
warmup_steps = 715  # steps in which the learning rate rises from 0; GPT-2's are 375M tokens
max_lr = 6e-4  # the learning rate after the warmup
min_lr = 6e-5  # the learning rate at the last step
max_steps = 19073  # GPT-2's are 10B tokens, one epoch; with 0 it evaluates, samples and exits
weight_decay = 0.1  # of matrices and embeddings, not of biases and LayerNorms
beta1 = 0.9  # of AdamW's average of gradients: 90% old, 10% new
beta2 = 0.95  # of AdamW's average of squared gradients
momentum = 0.95  # of Muon's average of gradients
grad_clip = 1.0  # gradients with a larger norm are scaled down to it; 0 for never

# how often, in steps; 0 for never
log_every = 1  # steps from line to line in the log
val_every = 250  # steps between evaluations on the validation set
val_steps = 20  # evaluate on the first val_steps * total_batch_size tokens, or on all there are
hella_every = 1000  # steps between evaluations on HellaSwag
sample_every = 1000  # steps between samples
save_every = 1000  # steps between checkpoints
keep = 3  # newest checkpoints to keep, besides every 5000th step; 0 keeps all

prompt = "Hello, I'm a language model,"  # samples begin with it
n_samples = 2  # samples each time
sample_tokens = 128  # tokens after the prompt
temperature = 0.8  # below 1, likely tokens become likelier
top_k = 50  # sample only from the 50 likeliest tokens; 0 for all

# cuda, mps or cpu
device = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
dtype = "auto"  # bfloat16, float16 or float32; auto: the fastest that the device has
compile = torch.cuda.is_available() and os.name == "posix"  # after a minute, steps are faster
timeout = 600  # seconds to wait for another process before giving up
wandb_log = False  # send the log to Weights & Biases
wandb_project = "gpt2"  # the project there

# a recipe: what it is for, and the constants that it replaces
# fmt: off
recipes = {
    # GPT-2 on shards of FineWeb-Edu
    "gpt2": dict(),
    # a small GPT on the bytes of a text, minutes on a laptop
    "baby": dict(
        data="input.txt", encoding="bytes", log_dir="log/baby", compile=False,
        n_layer=4, n_head=4, n_embd=128, T=64, B=32, total_batch_size=2048,
        optimizer="muon", max_lr=8e-3, min_lr=5e-4, warmup_steps=50, max_steps=1000, momentum=0.9,
        log_every=20, val_every=500, val_steps=100, sample_every=500, save_every=500,
        prompt="\n", sample_tokens=256),
    # OpenAI's or your own weights, trained on a text
    "finetune": dict(
        data="input.txt", log_dir="log/finetuned", init_from="gpt2", dropout=0.1, compile=False,
        B=4, total_batch_size=16384, max_lr=3e-5, min_lr=3e-6, warmup_steps=10, max_steps=100,
        val_every=25, hella_every=0, sample_every=50, save_every=50),
    # prints samples from such weights; trains and writes nothing
    "sample": dict(init_from="gpt2", max_steps=0, val_every=0, hella_every=0),
}
# fmt: on

# everything above by name. The last lines of this file set these globals to the launch's values, so
# main() sees what the recipe and the flags have replaced
constants = {
    name: value
    for name, value in globals().items()
    if name[0] != "_" and isinstance(value, (int, float, str, tuple, list))
}

# -----------------------------------------------------------------------------
# model


@dataclass
class GPTConfig:
    block_size: int = 1024  # tokens of context
    vocab_size: int = 50257  # 256 bytes, 50,000 BPE merges, <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0


class CausalSelfAttention(nn.Module):
    """Lets each position gather information from itself and the positions before it.
    Each has a query (what it looks for), a key (what it can be found by) and a value (what
    it passes on). It receives the average of the values, weighted by how well the keys match
    its query. The H heads do this side by side."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k, v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape  # batch, sequence, channels
        q, k, v = self.c_attn(x).split(C, dim=2)
        # (B, T, C) -> (B, H, T, C/H)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # put the heads next to each other again
        return self.c_proj(y)


class MLP(nn.Module):
    """Processes what attention has gathered, each position on its own."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # as in OpenAI's code


class LayerNorm(nn.LayerNorm):
    """Keeps the dtype of its input: under autocast, torch's own returns 32 bits, and the residual
    stream would not stay in 16."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


class Block(nn.Module):
    """Attention and MLP each read the normalized residual stream and add to it."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        x = x + self.drop(self.attn(self.ln_1(x)))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): turns the tokens so far into scores for the next one."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # matrix products are faster with sizes that are multiples of 128, so a vocabulary of
        # 50257 gets 50304 rows. logits() cuts the last ones off
        n_rows = 128 * math.ceil(config.vocab_size / 128)
        modules = dict(
            wte=nn.Embedding(n_rows, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=LayerNorm(config.n_embd),
        )
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = nn.Linear(config.n_embd, n_rows, bias=False)
        # weight tying: one matrix for both, since tokens with similar embeddings should also
        # have similar scores
        self.transformer.wte.weight = self.lm_head.weight

        for name, p in self.named_parameters():
            # 2 * n_layer branches add to the residual stream: small weights limit its growth
            branches = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(branches))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx):
        """Ids (B, T) -> states after the last LayerNorm, (B, T, C). Apart from logits(), so that
        samples and HellaSwag compute scores only where they need them."""
        assert idx.shape[1] <= self.config.block_size, "more tokens than the model has positions"
        tok_emb = self.transformer.wte(idx)  # (B, T, C)
        # (T, C): without positions, attention would not see the order of the tokens
        pos_emb = self.transformer.wpe.weight[: idx.shape[1]]
        x = tok_emb + pos_emb
        # a residual stream in 16 bits is faster, and the losses are the same (docs/measurements.md)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def logits(self, hidden):
        """States (..., C) -> a score for each token of the vocabulary, (..., vocab_size)."""
        return self.lm_head(hidden)[..., : self.config.vocab_size]

    def forward(self, idx, targets=None):
        """Ids (B, T) -> logits (B, T, vocab_size), or the mean loss given targets (B, T).
        A target of -100 adds no loss, but it still counts in the mean."""
        logits = self.logits(self.hidden(idx))
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        return loss / targets.numel()

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0):
        """Ids (B, T) -> ids (B, T + max_new_tokens), each drawn from the model's scores."""
        for _ in range(max_new_tokens):
            context = idx[:, -self.config.block_size :]
            last = self.hidden(context)[:, -1]  # (B, C): only the last position is needed
            logits = self.logits(last).float() / max(temperature, 1e-6)
            if top_k > 0:
                likeliest = logits.topk(min(top_k, logits.shape[1])).values
                logits[logits < likeliest[:, -1:]] = -math.inf
            probs = F.softmax(logits, dim=-1)
            next_token = torch.multinomial(probs, num_samples=1)
            idx = torch.cat([idx, next_token], dim=1)
        return idx


def causal_attention(q, k, v, dropout):
    """softmax(q k^T / sqrt(C/H)) v, shapes (B, H, T, C/H). No position sees a later one."""
    dtype = q.dtype
    if q.device.type == "cpu":  # on a CPU, the backward pass is slow in 16 bits
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast("cpu", enabled=False):  # which would turn them into 16 bits again
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return y.to(dtype)


# -----------------------------------------------------------------------------
# data


def get_tokenizer(encoding):
    """GPT-2's tokenizer, which tiktoken downloads once, or one whose tokens are bytes. If the
    download fails, it says so and returns None."""
    if encoding == "bytes":
        every_byte = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(
            "bytes", pat_str="(?s:.)", mergeable_ranks=every_byte, special_tokens={}
        )
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        print(f"no samples: GPT-2's tokenizer can't be downloaded: {error!r:.200}")


@functools.cache  # train and val are parts of one text
def read_text(path, encoding):
    """The tokens of a text file."""
    if encoding == "bytes":
        return np.fromfile(path, dtype=np.uint8)
    try:
        text = open(path, encoding="utf-8").read()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        sys.exit(f"{path}: byte {byte:#x} at {error.start} is not UTF-8; try --encoding=bytes")
    tokenizer = get_tokenizer(encoding)
    if tokenizer is None:
        sys.exit(f"{path}: without the tokenizer, only --encoding=bytes can read a text")
    try:
        tokens = tokenizer.encode(text, allowed_special="all")
    except ValueError:  # it gives up on a million spaces in a row: cut the text into pieces
        pieces = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
        tokens = np.concatenate(tokenizer.encode_batch(pieces, allowed_special="all"))
    return np.array(tokens, dtype=np.uint16)


def open_shard(path):
    """Memory-maps the tokens of a .npy, or of a .bin from llm.c. Exits if it is damaged."""
    with open(path, "rb") as file:
        try:
            # the header says how many tokens follow, and their type
            if path.endswith(".npy"):
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                magic, version, count = np.fromfile(file, "<i4", 256)[:3].tolist()
                if (magic, version) != (20240520, 1):
                    raise ValueError("the header is not llm.c's")
                shape, dtype = (count,), "<u2"
            found = (os.path.getsize(path) - file.tell()) / 2
            if shape != (found,):
                raise ValueError(f"expected {shape} tokens, found {found:.10g}")
            if dtype != "<u2":
                raise ValueError(f"{dtype} instead of uint16")
        except Exception as error:  # a damaged header can lead to any kind of error
            sys.exit(f"{path}: not a shard of tokens from fineweb.py: {error!s:.200}")
        return np.memmap(path, "<u2", mode="r", offset=file.tell(), shape=shape)


def load_split(data, split, encoding):
    """Returns [(name, tokens)] of train or val: a folder's shards, or a part of a text."""
    shards = []
    if os.path.isdir(data):
        for name in sorted(os.listdir(data)):
            words = name.replace(".", "_").replace("-", "_").split("_")  # edu_train_000001.npy
            if split in words and name.endswith((".npy", ".bin")):
                shards.append((name, open_shard(f"{data}/{name}")))
    elif os.path.isfile(data) and not data.endswith((".npy", ".bin")):
        tokens = read_text(data, encoding)
        n_train = len(tokens) - len(tokens) // 10  # the last tenth is for validation
        name = os.path.basename(data)
        if split == "train":
            shards.append((name, tokens[:n_train]))
        else:
            shards.append((f"the last tenth of {name}", tokens[n_train:]))
    if not os.path.exists(data):
        sys.exit(f"--data={data}: there is no such file or folder; fineweb.py makes edu_fineweb10B")
    if not shards:
        sys.exit(f"--data={data}: no text, and no folder with {split} shards; see fineweb.py")
    return shards


class TokenLoader:
    """Cuts shards into windows of T + 1 tokens: T inputs, and the token after each.
    With T = 4, a shard of 14 tokens has the windows 0 to 4, 4 to 8 and 8 to 12.
    The seed and the epoch alone decide their order. So a resumed run needs only the step, and a
    step trains on the same windows with any number of rows (B) and of processes (ranks)."""

    def __init__(self, shards, rows, T, rank, world_size, device, vocab_size, seed=None):
        self.shards = shards
        self.rows, self.T = rows, T
        self.rank, self.world_size = rank, world_size
        self.device, self.vocab_size, self.seed = device, vocab_size, seed
        # for each window, its shard and where in that shard it starts
        starts = [np.arange(0, len(tokens) - T, T) for _, tokens in shards]
        self.starts = np.concatenate(starts)
        self.shard_of = np.repeat(np.arange(len(shards)), [len(s) for s in starts])
        self.n_windows = len(self.starts)
        if self.n_windows == 0:
            name, tokens = shards[0]
            found = f"{len(tokens)} tokens, but a window takes T + 1 = {T + 1}"
            sys.exit(f"{name} is too short: {found}")
        self.start_epoch(0)

    def start_epoch(self, epoch):
        """Shuffles the windows, and moves all of them, so that each epoch cuts elsewhere."""
        self.epoch = epoch
        self.offset = 101 * epoch % self.T  # 101 is prime: T offsets, if it does not divide T
        self.order = np.arange(self.n_windows)
        if self.seed is not None:  # for validation, the order stays
            np.random.default_rng([self.seed, epoch]).shuffle(self.order)

    def window(self, n):
        """The n-th window to train on, T + 1 tokens. Every n_windows, a new epoch begins."""
        epoch, place = divmod(n, self.n_windows)
        if epoch != self.epoch:
            self.start_epoch(epoch)
        i = self.order[place]
        name, tokens = self.shards[self.shard_of[i]]
        # the last window of a shard has less room to move
        start = min(self.starts[i] + self.offset, len(tokens) - self.T - 1)
        ids = tokens[start : start + self.T + 1]
        if ids.max() >= self.vocab_size:
            where = f"{name}: {ids.max()} at offset {start + ids.argmax()}"
            sys.exit(f"{where} is outside the vocabulary of {self.vocab_size} tokens")
        return ids

    def n_batches(self, windows):
        """How many micro-batches, of `rows` windows on each rank, a range of windows takes."""
        return math.ceil(len(windows) / (self.rows * self.world_size))

    def batch(self, windows, i):
        """This rank's part of the i-th micro-batch: inputs and the token after each, (B, T).
        If the windows run out, the rows that are left get targets of -100, which have no loss."""
        first = (i * self.world_size + self.rank) * self.rows
        mine = windows[first : first + self.rows]
        tokens = np.zeros((self.rows, self.T + 1), dtype=np.int64)
        for row, n in enumerate(mine):
            tokens[row] = self.window(n)
        tokens = torch.from_numpy(tokens)
        if self.device == "cuda":
            tokens = tokens.pin_memory()  # so that Python need not wait for the copy
        tokens = tokens.to(self.device, non_blocking=True)
        x = tokens[:, :-1]
        y = tokens[:, 1:].clone()
        y[len(mine) :] = -100
        return x, y


# -----------------------------------------------------------------------------
# optimizers and schedule


def make_optimizers(model, optimizer, weight_decay, betas=(0.9, 0.95), momentum=0.95):
    """AdamW for everything, or Muon for the matrices in the blocks and AdamW for the rest. To
    give a group a learning rate of its own, change its lr_scale, which multiplies the schedule."""
    vectors, embeddings, matrices = [], [], {}
    for name, p in model.named_parameters():
        if p.dim() < 2:  # biases and LayerNorms
            vectors.append(p)
        elif name.startswith("transformer.h."):
            matrices[name] = p
        else:
            embeddings.append(p)

    groups = [
        {"params": embeddings, "lr_scale": 1.0, "weight_decay": weight_decay},
        {"params": vectors, "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    if optimizer == "adamw":
        groups.append({"params": matrices.values(), "lr_scale": 1.0, "weight_decay": weight_decay})
    optimizers = [torch.optim.AdamW(groups, betas=betas, fused=True)]
    if optimizer == "muon":
        optimizers.append(Muon(matrices, weight_decay, momentum))
    return optimizers


def update(optimizers, scaler, norm):
    """Updates the weights. In float16, an infinite gradient norm means that the loss was scaled
    up too far: then the update is skipped, and scaler.update() halves the scale."""
    if math.isfinite(norm):
        for opt in optimizers:
            scaler.step(opt)  # opt.step(), except in float16
    scaler.update()


def get_lr(step, max_lr, min_lr, warmup_steps, max_steps):
    """A linear warmup, since large first steps diverge, then a cosine down to min_lr."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    decay_ratio = min(1, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    coeff = 0.5 * (1 + math.cos(math.pi * decay_ratio))  # from 1 to 0
    return min_lr + coeff * (max_lr - min_lr)


# -----------------------------------------------------------------------------
# Muon: an optimizer for the matrices in the blocks. The lectures don't have it, baby trains with it


def newton_schulz(m):
    """Matrices U S V^T (n, rows, columns) -> about U V^T: all singular values near 1.
    Each round turns a singular value s into 3.4445 s - 4.7750 s^3 + 2.0315 s^5 (Jordan 2024)."""
    if m.shape[-2] > m.shape[-1]:
        return newton_schulz(m.mT).mT  # for a smaller Gram matrix
    x = m / (m.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        # x = 3.4445 x + (-4.7750 gram + 2.0315 gram gram) x; baddbmm is beta a + alpha b c
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """Moves each matrix along its averaged gradient, made orthogonal. So it learns rare
    directions as fast as common ones (Jordan 2024, kellerjordan.github.io/posts/muon)."""

    def __init__(self, matrices, weight_decay, momentum):
        # one parameter group for each shape, so that step() can stack its matrices
        groups = {}
        for name, p in matrices.items():
            n_maps = 3 if name.endswith("c_attn.weight") else 1  # those of q, k and v
            group = groups.setdefault((p.shape, n_maps), {"params": [], "n_maps": n_maps})
            group["params"].append(p)
        defaults = dict(lr=0.0, lr_scale=1.0, weight_decay=weight_decay, momentum=momentum)
        super().__init__(groups.values(), defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            directions = []
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                # Nesterov's momentum: as if the next gradient were like this one
                directions.append(p.grad.lerp(state["momentum_buffer"], group["momentum"]))

            # (n, rows, columns): one large product is faster than many small ones
            stack = torch.stack(directions)
            rows, columns = stack.shape[1] // group["n_maps"], stack.shape[2]
            stack = newton_schulz(stack.view(-1, rows, columns)).view_as(stack)
            # steps as large as AdamW's, so one learning rate suits both (arXiv 2502.16982)
            stack *= 0.2 * math.sqrt(max(rows, columns))
            for p, direction in zip(group["params"], stack, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(direction, alpha=group["lr"])


# -----------------------------------------------------------------------------
# evaluation and samples

# attention without cuDNN's kernel, which makes a new plan for each length
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.no_grad()
def evaluate(model, loader, windows):
    """The mean loss on a range of windows, in nats per token. If the run is asked to stop, it
    gives up early, and the number that it returns means nothing."""
    model.eval()
    loss_sum = 0.0
    for i in until_stopped(range(loader.n_batches(windows))):
        x, y = loader.batch(windows, i)
        loss_sum += model(x, y) * y.numel()
    model.train()
    return sum_over_ranks(loss_sum, loader.device) / (len(windows) * loader.T)


def sum_over_ranks(value, device):
    """The sum of a number over all processes."""
    if not dist.is_initialized():
        return float(value)
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def sample(model, tokenizer, prompt, n_samples, max_new_tokens, temperature, top_k, seed):
    """Returns texts that begin with the prompt and end where the model ends its document."""
    model.eval()
    new_document = "<|endoftext|>" if tokenizer.name == "gpt2" else "\n"
    start = tokenizer.encode(prompt or new_document, allowed_special="all")
    idx = torch.tensor([start] * n_samples, device=model.lm_head.weight.device)
    torch.manual_seed(seed)  # training is not affected: it sets a new seed in each step
    idx = model.generate(idx, max_new_tokens, temperature, top_k)
    model.train()
    texts = []
    for tokens in idx[:, len(start) :].tolist():
        # a model from the hub can have more tokens than the tokenizer
        text = tokenizer.decode([token for token in tokens if token < tokenizer.n_vocab])
        texts.append(prompt + printable(text.partition("<|endoftext|>")[0]))
    return texts


def printable(text):
    """A model of bytes may write control characters, which could upset a terminal."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text)


# -----------------------------------------------------------------------------
# the run


def main(recipe):
    # torchrun starts a process for each GPU; without it, there is only this one
    rank, world_size = connect_processes()
    ddp = world_size > 1
    master_process = rank == 0  # it prints, logs and saves
    writes_files = master_process and max_steps > 0
    if writes_files:
        lock_folder(log_dir)

    # products in 16 bits where the device is fast at them
    run_dtype = default_dtype(device) if dtype == "auto" else dtype
    autocast = contextlib.nullcontext()
    if run_dtype != "float32":
        autocast = torch.autocast(device, getattr(torch, run_dtype))
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what remains in float32
    # float16 would round small gradients to 0, so scale the loss up. Other dtypes don't
    scaler = torch.amp.GradScaler(device, enabled=run_dtype == "float16")

    # model: from this run's newest checkpoint, from scratch, or from somebody's weights
    torch.manual_seed(seed)
    resume = init_from == "resume"
    # before the first checkpoint, resuming starts the run as its recipe does
    start_from = recipes[recipe].get("init_from", "scratch") if resume else init_from
    checkpoint = load_checkpoint(log_dir) if resume else None
    if resume and checkpoint is None:
        print(f"no checkpoint in {log_dir} yet: beginning a new run from {start_from}")
    if checkpoint is not None:
        raw_model = model_of(checkpoint, dropout)
    elif start_from == "scratch":
        vocab_size = 256 if encoding == "bytes" and not os.path.isdir(data) else 50257
        raw_model = GPT(GPTConfig(T, vocab_size, n_layer, n_head, n_embd, dropout))
    else:
        raw_model = load_weights(start_from, dropout)
    vocab_size = raw_model.config.vocab_size
    model_encoding = "bytes" if vocab_size == 256 else "gpt2"

    # data: a step takes this many windows of T tokens, spread evenly over all ranks
    windows_per_step = total_batch_size // T
    max_rows = B if B > 0 else rows_that_fit(raw_model, T, run_dtype)
    grad_accum_steps = math.ceil(windows_per_step / (max_rows * world_size))
    # no more rows than these micro-steps need
    rows = math.ceil(windows_per_step / (grad_accum_steps * world_size))
    # a micro-step's rows as a share of a step's windows: 1 / grad_accum_steps if none is empty
    micro_step_share = rows * T * world_size / total_batch_size
    config = {"recipe": recipe, **constants, "model": vars(raw_model.config)}
    if max_steps > 0:
        shards = load_split(data, "train", model_encoding)
        train_loader = TokenLoader(shards, rows, T, rank, world_size, device, vocab_size, seed)
        config["shards"] = [[name, len(tokens)] for name, tokens in shards]
    if val_every > 0:
        shards = load_split(data, "val", model_encoding)
        val_loader = TokenLoader(shards, rows, T, rank, world_size, device, vocab_size)
        val_windows = range(min(val_steps * windows_per_step, val_loader.n_windows))
    check_run(config, checkpoint)
    check_ranks({**config, "B": rows, "dtype": run_dtype}, checkpoint)

    # for HellaSwag and samples; if a download fails, training goes on without them
    examples = tokenizer = None
    if hella_every > 0 and model_encoding == "gpt2":
        try:
            examples = hellaswag.load_examples()
        except ValueError as error:
            print(f"no HellaSwag: {error}")
    if sample_every > 0 and n_samples > 0:
        tokenizer = get_tokenizer(model_encoding)
    writes_hf = writes_files and model_encoding == "gpt2" and is_gpt2(raw_model)

    # model trains and validates; raw_model, with the same weights, does everything else
    raw_model.to(device)
    model = torch.compile(raw_model) if compile else raw_model
    if ddp:
        model = DDP(model, gradient_as_bucket_view=True)  # averages gradients in backward

    # optimizers
    optimizers = []
    if max_steps > 0:
        optimizers = make_optimizers(raw_model, optimizer, weight_decay, (beta1, beta2), momentum)

    # where the run starts and ends, and its log
    start_step, earlier_end = 0, max_steps
    if checkpoint is not None:
        start_step, earlier_end = checkpoint["step"], checkpoint["config"]["max_steps"]
        print(f"resuming at step {start_step}")
        if max_steps > 0:
            load_optimizers(optimizers, scaler, checkpoint)
    end_step = max(start_step, max_steps)  # a run that is past its end is only evaluated
    log = open_log(log_dir, end_step, config, checkpoint) if writes_files else Log(end_step)
    print_setup(raw_model, world_size, run_dtype, grad_accum_steps, rows, micro_step_share)

    def due(step, every):
        """True every so many steps, at the end, and where the run ended that this one extends,
        since it repeats that evaluation."""
        return every > 0 and (step % every == 0 or step in (end_step, earlier_end))

    catch_stop_signals()
    t_start = time.perf_counter()
    if start_step < end_step:
        # compile now, and see now whether a forward and a backward pass fit into memory, not after
        # a long evaluation
        x, y = train_loader.batch(range(windows_per_step), 0)
        with autocast:
            model(x, y).backward()
        raw_model.zero_grad()

    # at this point, the run has made `step` updates; the last round only evaluates and saves
    for step in range(start_step, end_step + 1):
        last_step = step == end_step
        windows = range(step * windows_per_step, (step + 1) * windows_per_step)
        log_size = log.size()  # a run that is resumed at this step repeats what follows

        # once in a while: the loss on the validation set
        if due(step, val_every):
            with autocast:
                val_loss = evaluate(model, val_loader, val_windows)
            if not asked_to_stop(device):
                log(step, f"val loss {val_loss:.4f}", val_loss=val_loss)
                check_finite(step, val_loss)

        # once in a while: HellaSwag
        if due(step, hella_every) and examples is not None:
            with autocast, sdpa_kernel(ANY_LENGTH):
                scores = hellaswag.evaluate(raw_model, examples, rows * T, until_stopped)
            if not asked_to_stop(device):
                acc_norm = scores["acc_norm"]
                log(step, f"HellaSwag acc_norm {acc_norm:.4f}", hellaswag=acc_norm)

        # once in a while: samples, but none from random weights
        is_trained = step > 0 or start_from != "scratch"
        if due(step, sample_every) and tokenizer is not None and is_trained and master_process:
            with autocast, sdpa_kernel(ANY_LENGTH):
                texts = sample(
                    raw_model, tokenizer, prompt, n_samples, sample_tokens, temperature, top_k, seed
                )
            log.samples(step, texts)

        # once in a while, at the end, and when asked to stop: save
        stopping = asked_to_stop(device)
        if step > start_step and (stopping or due(step, save_every)):
            # weights without a finite loss must not replace sound ones
            check_loss(step, raw_model, train_loader, windows, autocast)
            if writes_files:
                checkpoint = dict(
                    step=step,
                    config=config,
                    log_size=log_size,
                    run_id=log.run_id,
                    model=raw_model.state_dict(),
                    scaler=scaler.state_dict(),
                    optimizers=[opt.state_dict() for opt in optimizers],
                )
                save_checkpoint(log_dir, checkpoint, keep, final=stopping or last_step)
        if stopping or last_step:
            break

        # one step of the optimization
        t0 = time.perf_counter()
        lr = get_lr(step, max_lr, min_lr, warmup_steps, max_steps)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr * group["lr_scale"]
        torch.manual_seed(seed + step * world_size + rank)  # for dropout: the same if resumed

        # a whole batch would need too much memory: add up the gradients of micro-batches
        loss_accum = 0.0
        for micro_step in range(grad_accum_steps):
            x, y = train_loader.batch(windows, micro_step)
            if ddp:
                # DDP averages gradients over all ranks in the last backward only
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            with autocast:
                # backward() adds up gradients, but we want those of the mean loss: so this is
                # loss / grad_accum_steps, or more if rows are empty, since these have a loss of 0
                loss = model(x, y) * micro_step_share
            loss_accum += loss.detach()
            scaler.scale(loss).backward()
        train_loss = sum_over_ranks(loss_accum, device) / world_size

        # clip the gradients, so that a bad batch does not move the weights far
        for opt in optimizers:
            scaler.unscale_(opt)  # in float16, they are scaled like the loss
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf).item()
        # item() has waited for the GPU, so dt is the time of a whole step
        check_finite(step, train_loss, norm, scaler)
        with autocast:  # for Muon's matrix products; AdamW has none
            update(optimizers, scaler, norm)
        raw_model.zero_grad()

        dt = time.perf_counter() - t0
        if due(step, log_every):
            tokens_per_sec = total_batch_size / dt
            mfu = estimate_mfu(raw_model, T, tokens_per_sec / world_size, run_dtype)
            line = (
                f"loss {train_loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | "
                f"{1000 * dt:.0f} ms | {tokens_per_sec:,.0f} tokens/s | "
            )
            if mfu is not None:
                line += f"mfu {mfu:.1%} | "
            line += time_left(t_start, step + 1 - start_step, end_step - start_step)
            speed = {"dt": dt, "tokens_per_sec": tokens_per_sec, "mfu": mfu}
            log(step, line, train_loss=train_loss, lr=lr, grad_norm=norm, **speed)

    if stopping and max_steps > 0:
        print(f"stopped at step {step}; to continue, launch it again with --init_from=resume")
    elif writes_files:
        if writes_hf:
            save_pretrained(raw_model, f"{log_dir}/hf")
        tokens = step * total_batch_size
        minutes = (time.perf_counter() - t_start) / 60
        print(
            f"done: {step} steps, {tokens:,} tokens, {minutes:.1f} minutes{peak_memory()}, "
            f"{log_dir}"
        )
    if ddp:
        disconnect_processes()


# -----------------------------------------------------------------------------
# the log. A first reading can end here: what follows is the machinery around main()


class Log:
    """Prints events. With a file, it also writes each of them as a line of JSON."""

    def __init__(self, end_step, file=None, run_id=None, wandb_run=None):
        self.end_step = end_step
        self.file, self.run_id, self.wandb_run = file, run_id, wandb_run

    def __call__(self, step, line, **event):
        print(f"step {step:5d}/{self.end_step} | {line}", flush=True)
        self.write({"step": step, **event})
        if self.wandb_run is not None:
            self.wandb_run.log(event, step=step)

    def samples(self, step, texts):
        for text in texts:
            print(f"step {step:5d}/{self.end_step} | sample: {text}\n", flush=True)
            self.write({"step": step, "sample": text})
        if self.wandb_run is not None:
            self.wandb_run.log({"sample": "\n\n".join(texts)}, step=step)

    def write(self, event):
        if self.file is not None:
            # JSON has no infinities
            event = {name: value if is_finite(value) else None for name, value in event.items()}
            try:
                self.file.write(json.dumps(event) + "\n")
            except OSError as error:
                print(f"warning: {self.file.name}: {error}")

    def size(self):
        """In bytes. A checkpoint names it, so that a resumed run can drop later lines."""
        return os.fstat(self.file.fileno()).st_size if self.file is not None else 0


def is_finite(value):
    return not isinstance(value, float) or math.isfinite(value)


def time_left(t_start, done, total):
    """From the mean time of the steps that are done, evaluations and all."""
    seconds = (time.perf_counter() - t_start) / done * (total - done)
    return f"{timedelta(seconds=round(seconds))} left"


def open_log(log_dir, end_step, config, checkpoint):
    """Begins log.jsonl with the constants, or continues it where the checkpoint was saved."""
    if checkpoint is None:
        move_aside(log_dir)
    copy_script(log_dir, checkpoint)
    file = open(f"{log_dir}/log.jsonl", "a", buffering=1)
    run_id = secrets.token_hex(4)  # for Weights & Biases: one for the whole training
    if checkpoint is not None:
        run_id = checkpoint["run_id"]
        # what came after the checkpoint will be repeated, so drop those lines
        file.truncate(min(checkpoint["log_size"], os.path.getsize(file.name)))
    wandb_run = connect_wandb(log_dir, run_id, config) if wandb_log else None
    log = Log(end_step, file, run_id, wandb_run)
    if log.size() == 0:
        log.write({"constants": config, "run_id": run_id, "torch": torch.__version__})
    elif checkpoint is not None:
        before = checkpoint["config"]
        changed = {name: config[name] for name in constants if config[name] != before.get(name)}
        if changed.keys() - {"init_from"}:
            log.write({"step": checkpoint["step"], "changed": changed})
    return log


def connect_wandb(log_dir, run_id, config):
    """Begins or continues a run there. Without a login or the service, it goes on offline."""
    os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds
    import wandb

    how = dict(project=wandb_project, name=log_dir, id=run_id, resume="allow", config=config)
    try:
        run = wandb.init(**how)
    except Exception as error:
        print(f"warning: Weights & Biases is offline; send it later by wandb sync. {error!s:.200}")
        wandb.teardown()
        run = wandb.init(**how, mode="offline")
    at_end.callback(run.finish)
    return run


def lock_folder(log_dir):
    """Makes the folder, and keeps other runs out of it until this one ends."""
    folder = os.path.realpath(log_dir)
    if folder == os.path.dirname(os.path.realpath(__file__)):
        sys.exit(f"--log_dir={log_dir}: a run needs a folder of its own, not that of the script")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        sys.exit(f"--log_dir={log_dir}: {error}")
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
        at_end.callback(lock.release)
    except Timeout:
        sys.exit(f"another run holds {folder}.lock; choose another --log_dir")
    except OSError as error:  # some network drives have no locks
        print(f"warning: {folder}.lock can't be locked: {error}")


def move_aside(log_dir):
    """Moves what an older run has written from log/gpt2, say, to log/gpt2-1, or -2, ...
    Other files in the folder stay."""
    patterns = ["ckpt_*.pt", "hf"]
    if os.path.exists(f"{log_dir}/log.jsonl"):
        patterns += ["train_gpt2*.py", "log.jsonl"]  # the log comes last, in case of a kill
    names = [name for pattern in patterns for name in glob.glob(pattern, root_dir=log_dir)]
    if names:
        folder = os.path.realpath(log_dir)  # if it is a link, stay on the same disk
        n = 1
        while os.path.exists(f"{folder}-{n}"):
            n += 1
        os.makedirs(f"{folder}-{n}")
        for name in names:
            os.rename(f"{folder}/{name}", f"{folder}-{n}/{name}")
        print(f"moved the older run in {log_dir} to {folder}-{n}")


def copy_script(log_dir, checkpoint):
    """Keeps this script as it was launched, and again for a resumed run that has edited it."""
    path = f"{log_dir}/train_gpt2.py"
    if os.path.exists(path) and open(path, encoding="utf-8").read() != source:
        step = checkpoint["step"] if checkpoint is not None else 0
        path = f"{log_dir}/train_gpt2_{step:06d}.py"
    with open(path, "w", encoding="utf-8") as file:
        file.write(source)


# -----------------------------------------------------------------------------
# checkpoints


def checkpoint_paths(log_dir):
    """The checkpoints in log_dir as {step: path}, in order."""
    names = glob.glob("ckpt_*.pt", root_dir=log_dir)
    steps = {int(name[5:-3]): name for name in names if name[5:-3].isdigit()}
    return {step: f"{log_dir}/{steps[step]}" for step in sorted(steps)}


def save_checkpoint(log_dir, checkpoint, keep, final):
    """Saves a checkpoint, removes old ones. If it can't, it warns, or raises if `final`."""
    path = f"{log_dir}/ckpt_{checkpoint['step']:06d}.pt"
    temporary = f"{log_dir}/ckpt.pt.tmp"  # one name: the next save overwrites what a kill has left
    try:
        # renamed only when complete, so that a kill never leaves half a checkpoint
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        if final:
            raise
        print(f"warning: {path} can't be saved, is the disk full? {error}")
        return
    # of the checkpoints up to this one, keep the newest and every 5000th step
    paths = checkpoint_paths(log_dir)
    steps = [s for s in paths if s <= checkpoint["step"] and s % 5000 != 0]
    if keep > 0:
        for step in steps[:-keep]:
            with contextlib.suppress(OSError):
                os.remove(paths[step])


def load_checkpoint(log_dir):
    """The newest checkpoint that is not damaged, or None if there is none yet."""
    paths = list(checkpoint_paths(log_dir).values())
    for path in reversed(paths):
        try:
            # it is a zip file, and torch.load does not compare the checksums in it
            if zipfile.ZipFile(path).testzip() is not None:
                raise ValueError("wrong checksum")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damage can lead to any kind of error
            print(f"warning: skipping {path}, it does not load: {error!r:.200}")
    if paths:
        sys.exit(f"no checkpoint in {log_dir} loads; for a new run, choose another --log_dir")
    return None


def model_of(checkpoint, dropout):
    """The GPT of a checkpoint, with another dropout. Takes its weights out, to free memory."""
    model = GPT(GPTConfig(**checkpoint["config"]["model"] | {"dropout": dropout}))
    model.load_state_dict(checkpoint.pop("model"))
    return model


def load_optimizers(optimizers, scaler, checkpoint):
    """Loads the averages of gradients. Settings, like the weight decay, stay this launch's."""
    for opt, saved in zip(optimizers, checkpoint.pop("optimizers"), strict=True):
        opt.load_state_dict(opt.state_dict() | {"state": saved["state"]})
    scaler.load_state_dict(scaler.state_dict() | checkpoint["scaler"])  # {} if not float16


# -----------------------------------------------------------------------------
# refusing what can't work, and stopping what has gone wrong


def check_run(config, checkpoint):
    """Exits if the data, the weights and the constants of a run don't fit together."""
    block_size, vocab_size = config["model"]["block_size"], config["model"]["vocab_size"]
    if T > block_size and (max_steps > 0 or val_every > 0):
        sys.exit(f"--T={T}: use --T={block_size}, which is the model's context")
    if vocab_size != 256 and vocab_size < 50257:
        sys.exit(f"--init_from={init_from} has {vocab_size} tokens, but GPT-2's tokenizer 50257")
    if max_steps == 0:
        return

    windows_per_step = total_batch_size // T
    n_windows = sum((n_tokens - 1) // T for _, n_tokens in config["shards"] if n_tokens > 0)
    if n_windows < windows_per_step:
        sys.exit(
            f"{data}: {n_windows} windows of {T} tokens, but a step takes "
            f"{windows_per_step}; lower --total_batch_size"
        )
    if checkpoint is not None:
        check_resume(config, checkpoint["config"], checkpoint["step"])


def check_ranks(config, checkpoint):
    """Exits if the processes were launched differently, don't see the same files, or have GPUs that
    differ."""
    if not dist.is_initialized():
        return
    mine = {"step": checkpoint["step"] if checkpoint is not None else 0, **config}
    all_of_them = [None] * dist.get_world_size()
    dist.all_gather_object(all_of_them, mine)
    for name in mine:
        values = [each[name] for each in all_of_them]
        if name not in ("data", "log_dir", "init_from") and mine[name] != values[0]:
            sys.exit(
                f"{name}={mine[name]!r:.100} on this rank, but {values[0]!r:.100} on rank 0: "
                f"use the same flags everywhere; do all see {log_dir} and {data}?"
            )


def check_resume(config, saved, step):
    """Exits if a resumed run would have another model, optimizer or order of data. Prints what
    else has changed."""
    fixed = "seed T total_batch_size n_layer n_head n_embd optimizer encoding".split()
    changed = [f"{k} was {saved[k]}, is {config[k]}" for k in fixed if saved[k] != config[k]]
    if changed:
        sys.exit(f"can't resume: {'; '.join(changed)}; set it back, or start from scratch")
    before, now = dict(saved["shards"]), dict(config["shards"])
    changed = [
        f"{name} had {before.get(name, 0)} tokens, has {now.get(name, 0)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changed:
        sys.exit(
            f"can't resume, the data has changed: {'; '.join(changed[:3])}; "
            f"--init_from={log_dir} with another --log_dir begins a new run from its weights"
        )
    for name in config:
        if name not in ("init_from", "model") and config[name] != saved.get(name):
            print(f"changed since the checkpoint: {name} was {saved.get(name)}, is {config[name]}")
    schedule = "max_lr", "min_lr", "warmup_steps", "max_steps"
    lr_before, lr = (get_lr(step, *[c[name] for name in schedule]) for c in (saved, config))
    if lr != lr_before:
        print(f"so the learning rate at step {step} was {lr_before:.2e}, is {lr:.2e}")


def check_loss(step, model, loader, windows, autocast):
    """Exits if the model has no finite loss: its checkpoint must not replace sound ones."""
    x, y = loader.batch(windows, 0)
    model.eval()
    with torch.no_grad(), autocast:
        loss = model(x[:1], y[:1])
    model.train()
    check_finite(step, sum_over_ranks(loss, loader.device))


def check_finite(step, loss, norm=0.0, scaler=None):
    """Exits if a loss or a gradient norm is infinite or not a number. In float16, such a norm is
    no harm yet: update() skips it, until the scale has fallen to 1."""
    if scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1:
        norm = 0.0
    if not math.isfinite(loss + norm):
        message = f"step {step}: loss {loss}, gradient norm {norm}; lower --max_lr"
        paths = list(checkpoint_paths(log_dir).values())
        if len(paths) > 1:
            message += f"; if {paths[-1]} is not sound, remove it to resume from {paths[-2]}"
        sys.exit(message)


# -----------------------------------------------------------------------------
# processes and signals

at_end = contextlib.ExitStack()  # what to undo when the run ends, however it ends


def connect_processes():
    """Connects the processes that torchrun has started, and returns this one's rank and how many
    there are. Without torchrun, that is rank 0 of 1."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # its number on this machine
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            n_processes = os.environ.get("LOCAL_WORLD_SIZE", 1)
            sys.exit(f"--device=cuda: {n_processes} processes, but only {n_gpus} GPUs")
        torch.cuda.set_device(local_rank)
    if world_size > 1:
        if device == "mps":
            sys.exit("--device=mps is for one process; for several, use --device=cpu")
        backend = "nccl" if device == "cuda" else "gloo"
        # without a store of our own, a restart would find old addresses: see torchrun_store
        dist.init_process_group(
            backend,
            store=torchrun_store(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
    return rank, world_size


def disconnect_processes():
    """Waits for the others, since rank 0 may still be saving."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if device == "cuda" else None)
    let_gloo_finish()  # else the exit may hang: see there
    dist.destroy_process_group()


def torchrun_store():
    """Where the processes find each other's addresses. After a restart on one machine they would
    find the old ones, so each attempt has its own prefix (pytorch#135712)."""
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    return store


def let_gloo_finish():
    """Its threads can hang or crash the exit of a process (pytorch#190489)."""
    if dist.is_initialized():
        time.sleep(0.2)


def default_dtype(device):
    """The fastest dtype that the device supports natively; old GPUs emulate bfloat16."""
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float16"
    native = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


stop_signals = []  # when they came


def on_stop_signal(number, frame):
    """Lets the step finish and be saved. A second signal exits at once, unless it comes within
    half a second: Slurm sends one to each process, and so does torchrun."""
    stop_signals.append(time.monotonic())
    if stop_signals[-1] - stop_signals[0] > 0.5:
        os._exit(1)


def catch_stop_signals():
    for number in (signal.SIGINT, signal.SIGTERM):
        at_end.callback(signal.signal, number, signal.signal(number, on_stop_signal))


def until_stopped(steps):
    """Goes through a sequence, but ends early if this process has received a signal."""
    for step in steps:
        if stop_signals:
            break
        yield step


def asked_to_stop(device):
    """Whether any process has received a signal, so that all of them stop."""
    return sum_over_ranks(len(stop_signals), device) > 0


# -----------------------------------------------------------------------------
# speed and memory

# dense 16-bit FLOP/s from the data sheets; the first key found in the GPU's name counts
# fmt: off
PEAK_FLOPS = {
    "T4": 65e12, "V100": 125e12, "L4": 121e12, "L40S": 362e12, "A10": 125e12, "A100": 312e12,
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 209e12, "MI300X": 1307e12,
}
# fmt: on


def get_peak_flops(device_name):
    """312e12 for "NVIDIA A100-SXM4-80GB"; None for a device that is not listed."""
    names = [n for n in PEAK_FLOPS if re.search(rf"\b{n}\b(?!.*(Laptop|MIG))", device_name)]
    return PEAK_FLOPS[names[0]] if names else None


def get_flops_per_token(model, T):
    """FLOP to train on a token: 2 per parameter forward, 4 backward, none for positions. The
    attention takes 12 L C T (PaLM, arXiv 2204.02311, appendix B)."""
    c = model.config
    n_params = sum(p.numel() for p in model.parameters()) - c.block_size * c.n_embd
    return 6 * n_params + 12 * c.n_layer * c.n_embd * T


def estimate_mfu(model, T, tokens_per_sec, dtype):
    """The share of its peak FLOP/s that a GPU reaches, or None if the peak is not known."""
    peak = get_peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    if peak is None or dtype == "float32":
        return None
    return tokens_per_sec * get_flops_per_token(model, T) / peak


def rows_that_fit(model, T, dtype, memory=None):
    """How many sequences a training step can take in a GPU's memory (in bytes), with a tenth of
    it to spare: a power of two up to 64. By arithmetic, as in docs/measurements.md: for each token,
    the backward pass needs 16.5 C numbers of each layer, and the logits. Without torch.compile,
    it needs 2.4 times as much."""
    if memory is None:
        if device != "cuda":
            return 8
        memory = torch.cuda.get_device_properties("cuda").total_memory
    c = model.config
    # float32 weights and gradients, and AdamW's two averages
    fixed = 16 * sum(p.numel() for p in model.parameters())
    number = 4 if dtype == "float32" else 2  # bytes
    per_row = T * number * (16.5 * c.n_layer * c.n_embd + c.vocab_size)
    if not compile:
        per_row *= 2.4
    fit = (0.9 * memory - fixed) / per_row
    return min(64, 2 ** int(math.log2(max(1, fit))))


def print_setup(model, world_size, dtype, grad_accum_steps, rows, micro_step_share):
    """Prints the device, the size of the model, and how a step is divided."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{world_size} x {name}, {dtype}, {n_params / 1e6:.3g}M parameters")
    if max_steps == 0 and val_every == 0:
        return
    print(
        f"a step: {grad_accum_steps} x {rows} x {T} tokens in each process "
        f"(for less memory, lower --B={rows})"
    )
    wasted = 1 - 1 / (grad_accum_steps * micro_step_share)
    if wasted > 0.05:
        print(
            f"{wasted:.0%} of that is padding: {total_batch_size // T} sequences "
            f"don't spread evenly over {world_size} processes with --B={rows}"
        )


def peak_memory():
    if device != "cuda":
        return ""
    return f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory"


# -----------------------------------------------------------------------------
# Hugging Face's format, for --init_from=gpt2 and for the folder hf/


def transpose_conv1d(state):
    """OpenAI's weights are (in, out), nn.Linear's are (out, in). Converts either way."""
    conv1d = "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"
    return {name: p.t() if name.endswith(conv1d) else p for name, p in state.items()}


def load_weights(source, dropout=0.0):
    """A GPT with somebody's weights. `source` is the folder of a run, whose newest checkpoint
    is used, a folder in Hugging Face's format, or the name of a GPT-2 on the hub."""
    if checkpoint_paths(source):
        return model_of(load_checkpoint(source), dropout)
    if os.path.exists(f"{source}/hf"):  # a run whose checkpoints are gone
        source = f"{source}/hf"
    if os.path.exists(source) and not os.path.exists(f"{source}/config.json"):
        sys.exit(f"{source}: neither a run with a checkpoint, nor a model with a config.json")
    if os.path.isdir(os.path.dirname(source)) and not os.path.exists(source):
        sys.exit(f"{source}: there is no such folder")
    try:
        return from_pretrained(source, dropout)
    except Exception as error:  # those of transformers and safetensors have no common base
        reason = " ".join(str(error).split())
        sys.exit(f"{source}: no run, and no GPT-2 in a folder or on the hub: {reason:.300}")


# what a config has to say; with other values, the same weights are another function
GPT2_ONLY = dict(
    model_type=["gpt2"],
    activation_function=["gelu_new", "gelu_pytorch_tanh"],
    layer_norm_epsilon=[1e-5],
    scale_attn_weights=[True],
    scale_attn_by_inverse_layer_idx=[False],
    tie_word_embeddings=[True],
    add_cross_attention=[False],
)


def from_pretrained(name, dropout=0.0):
    """Loads a GPT-2 from a folder or, by name, from the hub. Raises OSError if there is none, and
    ValueError naming the field or the weight if it is not GPT-2's function."""
    from transformers import AutoConfig, GPT2LMHeadModel

    c = AutoConfig.from_pretrained(name)
    for field, values in GPT2_ONLY.items():
        if getattr(c, field, None) not in values:
            raise ValueError(f"{field} is {getattr(c, field, None)}, in GPT-2 it is {values[0]}")
    if c.n_inner not in (None, 4 * c.n_embd):
        raise ValueError(f"n_inner is {c.n_inner}, in GPT-2 it is 4 * n_embd = {4 * c.n_embd}")
    theirs, info = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
    wrong = [*info["missing_keys"], *(k for k in info["unexpected_keys"] if ".h." in k)]
    if wrong:
        raise ValueError(f"these weights are missing, or have no place: {', '.join(sorted(wrong))}")
    model = GPT(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, dropout))
    state = transpose_conv1d(theirs.state_dict())
    padding = len(model.lm_head.weight) - c.vocab_size
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = F.pad(state[name], (0, 0, 0, padding))
    model.load_state_dict(state)
    return model


def to_transformers(model):
    """GPT -> transformers' GPT2LMHeadModel, with the same weights in the same memory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    config = GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
    )
    state = transpose_conv1d(model.state_dict())
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state[name][: c.vocab_size]
    with torch.device("meta"):  # no weights of its own
        theirs = GPT2LMHeadModel(config)
    theirs.load_state_dict(state, assign=True)
    theirs.tie_weights()
    return theirs.eval()


def save_pretrained(model, folder):
    """Writes config.json and model.safetensors."""
    to_transformers(model).save_pretrained(folder)


@torch.no_grad()
def is_gpt2(model):
    """Whether GPT-2 in transformers computes the same, so that it can be saved for it."""
    idx = torch.arange(min(16, model.config.block_size))[None]
    problem = None
    model.eval()
    try:
        if not torch.allclose(model(idx), to_transformers(model)(idx).logits, atol=1e-3):
            problem = "transformers' GPT-2 computes something else from its weights"
    except Exception as error:  # the names or shapes of the weights differ
        problem = " ".join(str(error).split())
    model.train()
    if problem is not None:
        print(f"no hf/ at the end, the model is not GPT-2: {problem:.200}")
    return problem is None


# -----------------------------------------------------------------------------
# the launch

# the type of each constant; one that you add has the type of its value
# fmt: off
TYPES = {
    str: "data encoding log_dir init_from optimizer prompt device dtype wandb_project",
    bool: "compile wandb_log",
    int: "seed n_layer n_head n_embd total_batch_size B T warmup_steps max_steps log_every "
         "val_every val_steps hella_every sample_every save_every keep n_samples sample_tokens "
         "top_k timeout",
    float: "dropout max_lr min_lr weight_decay beta1 beta2 momentum grad_clip temperature",
}
# fmt: on
TYPES = {name: kind for kind, names in TYPES.items() for name in names.split()}
POSITIVE = "n_layer n_head n_embd total_batch_size T val_steps timeout".split()
BELOW_1 = "dropout beta1 beta2 momentum".split()
CHOICES = {
    "optimizer": ("adamw", "muon"),
    "encoding": ("gpt2", "bytes"),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "device": ("cuda", "mps", "cpu"),
}

source = open(__file__, encoding="utf-8").read()


def true_or_false(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError
    return text.lower() in ("true", "1")


def kind_of(name):
    return TYPES.get(name, type(constants[name]))


def hint(name, dashes=""):
    close = difflib.get_close_matches(name, constants, n=1)
    return f"did you mean {dashes}{close[0]}?" if close else "--help lists all"


def parse_launch(argv):
    """Returns the recipe and all constants: as in the file, replaced by the recipe, then flags."""
    comments = dict(re.findall(r"^(\w+) = .*?  # (.*)", source, re.MULTILINE))
    parser = argparse.ArgumentParser(
        usage="train_gpt2.py [RECIPE] [--name=value ...]",
        description=__doc__,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=100),
        add_help=False,
        allow_abbrev=False,
    )
    parser.error = sys.exit  # one line, exit status 1
    default = "gpt2" if os.path.isdir("edu_fineweb10B") else "baby"
    parser.add_argument("recipe", nargs="?", choices=recipes, default=default)
    parser.add_argument("-h", "--help", action="store_true")
    options = {}
    for name in constants:
        convert = {bool: true_or_false, tuple: ast.literal_eval, list: ast.literal_eval}
        options[name] = parser.add_argument(
            f"--{name}",
            type=convert.get(kind_of(name), kind_of(name)),
            default=argparse.SUPPRESS,
            choices=CHOICES.get(name),
            help=comments.get(name, "").replace("%", "%%"),
        )

    flags, unknown = parser.parse_known_intermixed_args(argv)
    flags = vars(flags)
    recipe, wants_help = flags.pop("recipe"), flags.pop("help")
    if unknown:
        name = unknown[0].removeprefix("--").partition("=")[0]
        sys.exit(f"{unknown[0]}: no such flag; {hint(name, '--')}")
    for each, values in recipes.items():
        for name in values:
            if name not in constants:
                sys.exit(f"recipe {each}: {name} is not a constant; {hint(name)}")

    replaced = recipes[recipe] | flags
    launch = constants | replaced
    check_constants(launch)
    launch["log_dir"] = os.path.normpath(launch["log_dir"])
    for name in ("data", "log_dir", "init_from"):
        launch[name] = os.path.expanduser(launch[name])
    if wants_help:
        for name, value in launch.items():
            options[name].metavar = repr(value)
        parser.print_help()
        sys.exit()
    print(f"recipe {recipe}:", *[f"{name}={value!r}" for name, value in replaced.items()])
    return recipe, launch


def check_constants(launch):
    """Exits if a constant has another type than it should, or a value that can't work."""
    for name, value in launch.items():
        kind = kind_of(name)
        problem = None
        if type(value) is not kind and (type(value), kind) != (int, float):
            problem = f"expected {kind.__name__}"
        elif name in CHOICES and value not in CHOICES[name]:
            problem = f"expected {' or '.join(CHOICES[name])}"
        elif name in POSITIVE and value == 0:
            problem = "expected a number above 0"
        elif kind in (int, float) and not 0 <= value < 1e18:
            problem = "expected a number from 0 to 1e18"
        elif name in BELOW_1 and value >= 1:
            problem = "expected a number below 1"
        if problem is not None:
            sys.exit(f"{name}={value!r}: {problem}")

    if launch["min_lr"] > launch["max_lr"]:
        sys.exit("min_lr={min_lr} is above max_lr={max_lr}; set both".format_map(launch))
    if launch["n_embd"] % launch["n_head"] != 0:
        sys.exit("n_embd={n_embd} is not a multiple of n_head={n_head}".format_map(launch))
    if launch["total_batch_size"] % launch["T"] != 0:
        sys.exit(
            "total_batch_size={total_batch_size} is not a multiple of T={T}".format_map(launch)
        )
    available = {"cuda": torch.cuda.is_available(), "mps": torch.mps.is_available(), "cpu": True}
    if not available[launch["device"]]:
        sys.exit(f"device={launch['device']}: torch {torch.__version__} finds no such device")


if __name__ == "__main__":
    if os.environ.get("RANK", "0") != "0":  # remove this to see what the other processes print
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # samples hold any character
    recipe, launch = parse_launch(sys.argv[1:])
    constants.update(launch)
    globals().update(launch)
    try:
        with at_end:
            at_end.callback(let_gloo_finish)
            main(recipe)
    except Exception as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        traceback.print_exc()
        sys.exit("torch.compile has failed. It needs a C compiler; --compile=false works without")
