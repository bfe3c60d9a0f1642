"""
GPT-2, trained from scratch: constants, model, data, optimizer, evaluation, checkpoints, the run.

A laptop trains a small GPT on the bytes of input.txt (Shakespeare) in three minutes, a GPU trains
GPT-2 (124M) as soon as fineweb.py has put token shards into edu_fineweb10B/:
    python train_gpt2.py
Eight GPUs, and two nodes of eight (this line on each, with its own --node_rank):
    torchrun --standalone --nproc_per_node=8 train_gpt2.py
    torchrun --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --nproc_per_node=8 train_gpt2.py

Change any constant below, here or for one launch: --B=16 --max_lr=1e-3. --help lists them all.
The results go to log_dir: log.jsonl, checkpoints and, for GPT-2, hf/, which transformers reads.
Ctrl-C saves and leaves; --init_from=resume goes on from there, on any number of GPUs.
"""
import dataclasses
import datetime
import difflib
import functools
import glob
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_map_only

import hellaswag

# constants -------------------------------------------------------------------
argv = sys.argv[1:] if __name__ == "__main__" else []  # imported, the constants stay as they are
chosen = dict(arg.removeprefix("--").split("=", 1) for arg in argv if "=" in arg)  # name -> value

# a folder of token shards, or one text file, read as bytes; some defaults below depend on which
_here = os.path.dirname(os.path.abspath(__file__))
_shards = os.path.join(_here, "edu_fineweb10B")
data = chosen.get("data", _shards if os.path.isdir(_shards) else os.path.join(_here, "input.txt"))
_gpu = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "")
device = chosen.get("device", _gpu or "cpu")  # cuda, mps (Apple's GPUs) or cpu

# GPT-2 (124M), for token shards: the paper's model, and GPT-3's recipe for a model of this size
log_dir = "log/gpt2"       # where the run goes; an earlier one there is moved aside
n_layer, n_head, n_embd = 12, 12, 768  # medium 24, 16, 1024; large 36, 20, 1280; xl 48, 25, 1600
T = 1024                   # tokens of context
B = 64                     # sequences in a forward, as many as fit: 64 in 80 GB, 16 in 24 GB
total_batch_size = 524288  # tokens in an optimizer step, over all GPUs: 2**19, about 0.5M
optimizer = "adamw"        # as in GPT-3; or muon for the matrices in the blocks (README.md)
max_lr, min_lr = 6e-4, 6e-5  # at the end of the warmup, and at the last step
warmup_steps = 715         # 375M tokens, as in GPT-3
max_steps = 19073          # 10B tokens, one epoch of edu_fineweb10B; 0 to evaluate, sample, save
val_tokens = 10485760      # of the val split, the first ones each time
log_every, val_every = 1, 250        # steps from one line, or evaluation, to the next;
hella_every, sample_every = 250, 250  # an "every" of 0 means only at the end
save_every, keep = 1000, 3           # steps; checkpoints kept, the newest ones, 0 for all
prompt = "Hello, I'm a language model,"

# the baby GPT, for a text file: 0.8M parameters, three minutes on two CPU cores (GPU: README.md)
if not os.path.isdir(chosen.get("data", data)):
    log_dir = "log/baby"
    n_layer, n_head, n_embd = 4, 4, 128
    T, B, total_batch_size = 64, 32, 2048
    optimizer = "muon"     # val loss 1.43 after 900 steps; adamw, at --max_lr=4e-3, 1.65
    max_lr, min_lr, warmup_steps, max_steps = 8e-3, 5e-4, 50, 900
    val_tokens = 1048576
    log_every, val_every, sample_every, save_every = 20, 300, 300, 300
    prompt = "\n"

# for both
init_from = "scratch"      # or resume, or weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder
seed = 1337                # of the initialization, the order of the data, dropout and samples
dropout = 0.0              # 0.1 in GPT-1; it helps where the same data is seen many times
weight_decay = 0.1         # on matrices and embeddings; biases and LayerNorms have none
beta1, beta2 = 0.9, 0.95   # AdamW averages gradients over 10 steps, their squares over 20, as GPT-3
momentum = 0.95            # Muon averages gradients over 20 steps
grad_clip = 1.0            # a longer gradient is scaled down to this norm; 0 for never
n_samples, sample_tokens = 2, 256  # texts at each sampling, tokens in each after the prompt
temperature, top_k = 0.8, 50  # below 1 favours likely tokens; only the k likeliest, 0 for all
compile = device == "cuda"   # fuses kernels: a minute at the start, then about twice the speed
# products and residual stream in bfloat16, half the bytes; weights in float32. T4: --dtype=float32
dtype = "bfloat16" if device == "cuda" or torch.cpu._is_avx512_bf16_supported() else "float32"
timeout = 600              # seconds that a process waits for the others before it gives up
wandb_log, wandb_project = False, "gpt2"

constants = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (int, float, str))}
forms = {bool: ("0|1|true|false", "0, 1, true or false"), int: (r"\d{1,18}", "an integer >= 0"),
         float: (r"(\d+\.?|\d*\.\d+)(e[+-]?\d+)?", "a number >= 0"), str: (".*", "text")}
for arg in [a for a in argv if a not in ("--help", "-h")]:  # --name=value, for this launch alone
    name, _, value = arg.removeprefix("--").partition("=")
    if name not in constants:
        near = difflib.get_close_matches(name, constants, n=1, cutoff=0)[0]
        sys.exit(f"{arg}: no such constant; the nearest is --{near}={constants[near]}")
    kind = type(constants[name])
    pattern, form = forms[kind]
    if arg != f"--{name}={value}" or not re.fullmatch(pattern, value, re.IGNORECASE | re.DOTALL):
        sys.exit(f"{arg}: expected --{name}= and {form}, as in --{name}={constants[name]}")
    constants[name] = value.lower() in ("1", "true") if kind is bool else kind(value)
globals().update(constants)
if {"--help", "-h"} & set(argv):
    sys.exit(print(__doc__, *(f"--{k}={v!r}" for k, v in constants.items()), sep="\n"))

# model -----------------------------------------------------------------------
@dataclasses.dataclass
class GPTConfig:
    block_size: int = 1024   # tokens of context
    vocab_size: int = 50257  # 256 bytes, 50,000 BPE merges, <|endoftext|>; any beyond are padding
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and those before it. It asks with a query, each of them
    answers with a key and offers a value; what arrives is the average of the values, weighted by
    how well the keys match the query: softmax(q k^T / sqrt(C/H)) v. The root keeps sums of C/H
    products near 1, the mask hides the future. H heads look for H things side by side."""
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape  # batch, time (tokens), channels (n_embd)
        q, k, v = self.c_attn(x).split(C, dim=2)
        # (B, T, C) -> (B, H, T, C/H)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

class MLP(nn.Module):
    """What attention has brought to a position is worked on there, each position by itself."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # tanh as in OpenAI's code

class Block(nn.Module):
    """Both branches read the residual stream x, put to mean 0, variance 1, and add to it."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        x = x + self.drop(self.attn(self.ln_1(x)))
        return x + self.drop(self.mlp(self.ln_2(x)))  # sums pass gradients on undiminished

class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): from the tokens so far to scores for the one that comes next."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.n_tokens = min(config.vocab_size, GPTConfig.vocab_size)  # without the padding
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # a vector for each token
            wpe=nn.Embedding(config.block_size, config.n_embd),  # and place: attention has no order
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # tied: the vector that stands for a token as input scores it as output; saves 39M of 163M
        self.transformer.wte.weight = self.lm_head.weight
        for name, p in self.named_parameters():
            # the residual stream adds up 2 * n_layer branches: shrink each to keep the sum's size
            branches = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / branches ** 0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx):
        """Token ids (B, T), T <= block_size -> hidden states after the last LayerNorm (B, T, C)."""
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[:idx.shape[1]]
        if torch.is_autocast_enabled(x.device.type):  # the stream in bfloat16: half the traffic
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Ids (B, T) -> logits (B, T, vocab_size); with targets (B, T) -> mean loss, float32."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, generator=None):
        """Continues ids (B, T) to (B, T + max_new_tokens); a generator must be on their device."""
        for _ in range(max_new_tokens):
            last = self.hidden(idx[:, -self.config.block_size:])[:, -1]
            logits = self.lm_head(last)[:, :self.n_tokens].float() / max(temperature, 1e-6)
            if top_k:
                logits[logits < logits.topk(min(top_k, self.n_tokens)).values[:, -1:]] = -math.inf
            token = torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)
            idx = torch.cat([idx, token], dim=1)
        return idx

    @classmethod
    def from_pretrained(cls, name, dropout=0.0):
        """Loads transformers' format: a folder, or a name on the hub (gpt2, gpt2-medium, ...)."""
        from transformers import GPT2LMHeadModel
        theirs, info = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
        if info["missing_keys"]:
            raise OSError(f"{name}: not a whole GPT-2, it lacks {min(info['missing_keys'])}")
        c = theirs.config
        model = cls(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, dropout))
        model.load_state_dict(transpose_conv1d(theirs.state_dict()))
        return model

    def save_pretrained(self, folder):
        """Writes config.json and model.safetensors for transformers, without padded rows."""
        from transformers import GPT2Config, GPT2LMHeadModel
        c = self.config
        theirs = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size,
                                            n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head))
        theirs.load_state_dict(transpose_conv1d(self.state_dict()))
        theirs.resize_token_embeddings(self.n_tokens)
        theirs.save_pretrained(folder)

def transpose_conv1d(state):
    """OpenAI keeps these weights as (in, out), nn.Linear as (out, in): turns one into the other."""
    turned = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {name: p.t() if name.endswith(turned) else p for name, p in state.items()}

# data ------------------------------------------------------------------------
def open_shard(path):
    """The tokens of a file, memory-mapped: only what is used gets loaded. A .npy holds uint16 in
    one dimension; a .bin, as in llm.c, 256 int32 (20240520, 1, the count, zeros), then uint16."""
    with open(path, "rb") as file:
        try:
            if path.endswith(".npy"):
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                magic, version, count = np.frombuffer(file.read(1024), "<i4")[:3].tolist()
                shape, dtype = (count,), "<u2" if (magic, version) == (20240520, 1) else None
            found = (os.path.getsize(path) - file.tell()) / 2
            if (dtype, shape) != ("<u2", (found,)):
                raise ValueError(f"expected {shape} of {dtype}, found {found:g} tokens of uint16")
        except Exception as error:  # of several kinds, for a damaged header
            sys.exit(f"{path}: not a shard, make it with fineweb.py: {error!r:.200}")
        return np.memmap(path, "<u2", mode="r", offset=file.tell(), shape=shape)

@functools.lru_cache(maxsize=8)
def permutation(n, seed, *more):  # cached: windows in a row need the same ones
    return np.arange(n) if seed is None else np.random.default_rng([seed, *more]).permutation(n)

class Tokens:
    """A split ("train" or "val") as an endless order of windows of T + 1 tokens: T inputs and, one
    place on, T targets. In each epoch the shards come in an order of their own, and in each shard
    its windows, cut in other places: all is mixed, while only one shard is being read. The order
    follows from the seed alone (None: that of the files), so that to resume, a number is enough."""
    def __init__(self, data, split, T, vocab_size, seed=None):
        self.T, self.vocab_size, self.seed = T, vocab_size, seed
        if os.path.isfile(data) and not data.endswith((".npy", ".bin")):
            text = np.memmap(data, mode="r") if os.path.getsize(data) else np.empty(0, np.uint8)
            cut = len(text) - len(text) // 10  # the last tenth is the val split
            shards = {data: text[:cut] if split == "train" else text[cut:]}
        else:
            paths = sorted(glob.glob(os.path.join(glob.escape(data), f"*{split}*")))
            ours = re.compile(rf"{split}(?!.*(train|val)).*\.(npy|bin)$")  # retrieval_train: train
            shards = {path: open_shard(path) for path in paths if ours.search(path)}
        self.shards = [(path, tokens) for path, tokens in shards.items() if len(tokens) > T]
        if not self.shards:
            why = f"no {split} window of T + 1 = {T + 1}" if os.path.exists(data) else "not found"
            sys.exit(f"--data={data}: {why}; give a text, or shards: python fineweb.py --out=DIR")
        if short := [path for path, tokens in shards.items() if len(tokens) <= T]:
            print(f"warning: skipping {', '.join(short)}: less than T + 1 = {T + 1} tokens")
        self.counts = [(len(tokens) - 1) // T for _, tokens in self.shards]  # windows in each
        self.n_windows = sum(self.counts)
        parts = [b"%d " % len(tokens) + tokens[:1 << 16].tobytes() for _, tokens in self.shards]
        self.hash = hashlib.sha256(b"".join(parts)).hexdigest()[:16]  # to notice other data

    def window(self, i):
        """Place i in the order -> T + 1 tokens; exits where one is not in the vocabulary."""
        epoch, i = divmod(i, self.n_windows)
        for shard in permutation(len(self.shards), self.seed, epoch).tolist():
            if i < self.counts[shard]:
                break
            i -= self.counts[shard]
        path, tokens = self.shards[shard]
        i = permutation(self.counts[shard], self.seed, epoch, shard)[i]
        shift = int(0.618 * self.T * epoch) % self.T  # golden ratio: the cuts spread evenly
        start = min(i * self.T + shift, len(tokens) - self.T - 1)
        ids = tokens[start:start + self.T + 1]
        if (bad := ids.max()) >= self.vocab_size:
            sys.exit(f"{path}: token {bad} at offset {start + ids.argmax()} >= {self.vocab_size}")
        return ids

    def batch(self, first, B, device):
        """The B windows from place `first` on -> inputs, targets: (B, T) each, int64, on device."""
        ids = torch.from_numpy(np.stack([self.window(first + i) for i in range(B)], dtype=np.int64))
        ids = ids.pin_memory() if device == "cuda" else ids  # so that nothing waits for the copy
        ids = ids.to(device, non_blocking=device == "cuda")
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

# optimizer and schedule ------------------------------------------------------
def orthogonalize(m):
    """Matrices U S V^T (..., rows, columns) -> about U V^T: all directions equally strong. Each
    round turns a singular value s into 3.4445 s - 4.7750 s^3 + 2.0315 s^5, in the end near 1."""
    x = m.bfloat16() if m.is_cuda else m  # enough for a direction; on most CPUs it is very slow
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x

class Muon(torch.optim.AdamW):
    """AdamW, but in groups with a muon_momentum each matrix steps along its averaged gradient made
    orthogonal, to learn rare directions as fast as common ones (Jordan 2024), and of AdamW's size,
    so that one learning rate serves both (Liu et al. 2025, arXiv 2502.16982, section 2.2)."""
    @torch.no_grad()
    def step(self, closure=None):
        for group in [g for g in self.param_groups if g.get("muon_momentum") is not None]:
            for p in group["params"]:
                state, (rows, columns) = self.state[p], p.shape
                if not state:  # AdamW, when it loads a state, looks for its step
                    state.update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p))
                average = state["momentum_buffer"].lerp_(p.grad, 1 - group["muon_momentum"])
                m = p.grad.lerp(average, group["muon_momentum"])  # Nesterov's: one step ahead
                m = m.reshape(1 if rows % columns else rows // columns, -1, columns)  # q, k, v...
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # orthogonal matrices have entries around 1/sqrt(columns), AdamW's steps around 0.2
                p.add_(orthogonalize(m).view(p.shape), alpha=-group["lr"] * 0.2 * columns ** 0.5)
                p.grad = None  # for AdamW to pass it over
        return super().step(closure)

def make_optimizer(model, name, weight_decay, betas, momentum):
    """AdamW for all, or Muon for the blocks' matrices; biases and LayerNorms are not decayed."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".h." in n]
    embeddings = [p for n, p in model.named_parameters() if p.dim() == 2 and ".h." not in n]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    return Muon([{"params": matrices, "muon_momentum": momentum if name == "muon" else None},
                 {"params": embeddings}, {"params": vectors, "weight_decay": 0.0}],
                weight_decay=weight_decay, betas=betas, fused=True)

def get_lr(step, max_lr, min_lr, warmup_steps, max_steps):
    """Linear warmup, as big steps from random weights diverge; then half a cosine to min_lr."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + (max_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

# evaluation ------------------------------------------------------------------
def sum_over_ranks(values, device):
    """Adds up lists of floats, one from each process, for all of them to get."""
    if dist.is_initialized():
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        values = sums.tolist()
    return values

@torch.no_grad()
def evaluate(model, tokens, n_windows, B, rank, world_size, device, autocast):
    """The mean loss (nats per token) over the first n_windows windows; the ranks share them."""
    total = 0.0
    for first in range(rank * B, n_windows, world_size * B):
        x, y = tokens.batch(first, min(B, n_windows - first), device)
        with autocast:
            total += model(x, y).item() * len(x)
    loss = sum_over_ranks([total], device)[0] / n_windows
    return loss if math.isfinite(loss) else sys.exit(f"val loss {loss}: stopped; lower --max_lr")

def sample(model, encode, decode, prompt, n, length, temperature, top_k, seed, device, autocast):
    """n texts: the prompt, continued by `length` tokens; the same for the same weights and seed."""
    idx = torch.tensor([encode(prompt or "\n")] * n, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with autocast:
        idx = model.generate(idx, length, temperature, top_k, generator)
    return [decode(ids) for ids in idx.tolist()]

def text_codec(n_tokens):
    """Functions text -> ids and ids -> text: bytes for 256 tokens, else GPT-2's BPE; or None."""
    if n_tokens == 256:
        return lambda text: list(os.fsencode(text)), lambda ids: bytes(ids).decode(errors="replace")
    try:
        import tiktoken
        bpe = tiktoken.get_encoding("gpt2")
        return lambda text: bpe.encode(text, allowed_special="all"), bpe.decode
    except Exception as error:  # of many kinds; as a rule, there is no network
        print(f"no samples: can't fetch GPT-2's tokenizer ({type(error).__name__}), see README.md")

# logging and checkpoints -----------------------------------------------------
# dense bf16 FLOP/s, from the data sheets; the first name found in the device's own counts
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}

def open_log(log_dir, start, head):
    """Opens log_dir/log.jsonl, locked against a second run. A fresh run (start=None) moves an
    earlier one aside, to log_dir-1, -2, ...; a resumed one cuts what was logged from start on."""
    path = os.path.join(log_dir, "log.jsonl")
    try:
        os.makedirs(log_dir, exist_ok=True)
        log_file = open(path, "a+", encoding="latin-1", newline="\n", buffering=1)
        if os.name == "posix":
            import fcntl
            fcntl.flock(log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        why = "another run is writing there" if isinstance(error, BlockingIOError) else error
        sys.exit(f"--log_dir={log_dir}: {why}; choose another folder")
    if start is None and (os.path.getsize(path) or checkpoint_paths(log_dir)):
        names = (f"{os.path.normpath(log_dir)}-{n}" for n in range(1, sys.maxsize))
        aside = next(name for name in names if not os.path.exists(name))
        log_file.close()
        os.rename(log_dir, aside)
        print(f"moved the earlier run in {log_dir} to {aside}")
        return open_log(log_dir, start, head)
    log_file.seek(0)
    kept = 0
    for line in log_file:
        step = re.match(r'{"step": (\d+)', line)  # the first line has none, nor have damaged ones
        if line[-1] != "\n" or step and int(step[1]) >= start:
            break
        kept += len(line)  # latin-1, for what may be damaged: a character is a byte
    log_file.truncate(kept)
    log_file.write("" if kept else json.dumps(head) + "\n")
    return log_file

def log(log_file, wandb_run, step, line, **event):
    """Prints a line, and adds the event to log.jsonl, as JSON, and where it is on to wandb."""
    print(f"step {step:5d} | {line}", flush=True)
    log_file.write(json.dumps({"step": step} | event) + "\n")
    if wandb_run:
        wandb_run.log(event, step=step)

def checkpoint_paths(log_dir):  # oldest first
    paths = glob.glob(os.path.join(glob.escape(os.path.normpath(log_dir)), "ckpt_*.pt"))
    return sorted([p for p in paths if re.search(r"ckpt_\d+\.pt$", p)], key=lambda p: (len(p), p))

def save_checkpoint(log_dir, keep, checkpoint, final):
    """Writes beside the final name, then renames: a kill never leaves half a checkpoint.
    A full disk is worth a warning, as there are older ones; at the end, it is an error."""
    path = os.path.join(os.path.normpath(log_dir), f"ckpt_{checkpoint['step']:06d}.pt")
    try:
        with open(path + ".tmp", "wb", buffering=0) as file:
            torch.save(checkpoint, file)
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:  # the latter is torch's, around an OSError
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        problem = f"{path} can't be saved: {error.__context__ or error}"
        return sys.exit(problem) if final else print(f"warning: {problem}")
    paths = checkpoint_paths(log_dir)  # any after this one did not load, and do not count
    for old in paths[:paths.index(path) + 1][:-keep]:  # all stay for keep = 0: [:-0] is empty
        os.remove(old)

def load_checkpoint(log_dir):
    """The newest checkpoint that loads; weights_only: as tensors and builtins, running no code."""
    for path in reversed(checkpoint_paths(log_dir)):
        try:
            assert not zipfile.ZipFile(path).testzip(), "it is damaged"  # torch ignores checksums
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or hostile file leads to
            print(f"warning: {path} does not load, trying the one before it: {error!r:.200}")
    sys.exit(f"--log_dir={log_dir}: no checkpoint there loads; start with --init_from=scratch")

# the run ---------------------------------------------------------------------
if __name__ == "__main__":
    # torchrun starts a process, a rank, for each GPU and sets these; plain python is rank 0 of 1
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")  # rank 0 speaks for all
    sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal must not end a run
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save

    def explain(kind, error, trace):  # one line where the reason lies outside the program
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            error = f"out of memory with --B={B}; try --B={B // 2 or 1}, or a smaller model"
        elif wandb_log and "wandb" in f"{kind.__module__} {error}":
            error = f"{error}; pip install wandb, wandb login, or WANDB_MODE=offline"
        elif not isinstance(error, OSError):
            return sys.__excepthook__(kind, error, trace)
        print(str(error).strip().partition("\n")[0], file=sys.stderr)
    sys.excepthook = explain
    # mistakes in the constants and the data end here, before anything is built or moved
    choices = {"device": f"{_gpu} cpu", "optimizer": "adamw muon", "dtype": "bfloat16 float32"}
    for name, allowed in choices.items():
        if constants[name] not in allowed.split():
            sys.exit(f"--{name}={constants[name]}: this machine's choices are {allowed.strip()}")
    n_here, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.accelerator.device_count()
    if device != "cpu" and local_rank >= n_gpus:
        sys.exit(f"{n_here} processes, but {n_gpus} GPUs here; try --nproc_per_node={n_gpus}")
    if 0 in (B, T, n_head, n_embd) or n_embd % n_head or max(dropout, beta1, beta2, momentum) >= 1:
        sys.exit(f"need {B=}, {T=} > 0, {n_embd=} % {n_head=} == 0, dropout, betas, momentum < 1")
    fits = [b for b in range(1, B + 1) if total_batch_size % (b * T * world_size) == 0]
    if B not in fits or total_batch_size == 0:
        fix = f"B={fits[-1]}" if fits else f"total_batch_size={B * T * world_size}"
        sys.exit(f"{total_batch_size=} is no multiple of B * T * processes; try --{fix}")
    micro_steps = total_batch_size // (B * T * world_size)
    n_tokens = 256 if os.path.isfile(data) else GPTConfig.vocab_size
    train = Tokens(data, "train", T, n_tokens, seed)
    val = Tokens(data, "val", T, n_tokens)
    n_val = max(1, min(val_tokens // T, val.n_windows))
    if train.n_windows < (need := total_batch_size // T):  # windows of T + 1 tokens
        sys.exit(f"{data}: {train.n_windows} windows, a step takes {need}: lower total_batch_size")
    if device == "cuda":
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")  # TF32 for what remains in float32
    gpu = torch.cuda.get_device_name() if device == "cuda" else device
    autocast = torch.autocast(device, getattr(torch, dtype), enabled=dtype == "bfloat16")

    # start afresh, or from rank 0's newest checkpoint: when asked to, and when torchrun restarts us
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if world_size > 1:  # the ranks meet in a store: a restart must not find its old keys
        attempt = restarts if n_here == world_size else ""  # nodes may count in other ways
        store = dist.PrefixStore(attempt, next(dist.rendezvous("env://"))[0])
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world_size, timeout=datetime.timedelta(seconds=timeout))
    restarted = sum_over_ranks([int(restarts)], device)[0] > 0 and checkpoint_paths(log_dir) != []
    config = constants | {"data_hash": train.hash + val.hash}
    asked = init_from == "resume"  # if not, but restarted, this is the same launch as before
    shared = [config, load_checkpoint(log_dir) if rank == 0 and (asked or restarted) else None]
    if world_size > 1:
        dist.broadcast_object_list(shared)
    theirs, checkpoint = shared
    if other := [k for k in config if config[k] != theirs.get(k) and k not in ("data", "log_dir")]:
        sys.exit(f"rank {rank} differs from rank 0 in {', '.join(other)}; launch all nodes alike")
    torch.manual_seed(seed)
    start, pretrained, wandb_run = 0, None, None
    if checkpoint:
        start, old = checkpoint["step"], checkpoint["config"] | {"init_from": init_from}
        differ = {k: f"{k} was {old.get(k)}, is {v}" for k, v in config.items() if v != old.get(k)}
        fixed = "data_hash seed T total_batch_size n_layer n_head n_embd optimizer".split()
        if wrong := "; ".join(differ[k] for k in (fixed if asked else differ) if k in differ):
            sys.exit(f"can't resume: {wrong}; set it back, or start anew with --init_from=scratch")
        print("\n  ".join([f"resuming {log_dir} at step {start}", *differ.values()]))
        gpt_config = GPTConfig(**old["model"] | {"dropout": dropout})
    elif init_from == "scratch":
        padded = math.ceil(n_tokens / 128) * 128  # 50257 -> 50304, which GPUs multiply faster
        gpt_config = GPTConfig(T, padded, n_layer, n_head, n_embd, dropout)
    else:
        if not os.path.isdir(init_from) and "/" not in init_from and init_from[:4] != "gpt2":
            sys.exit(f"--init_from={init_from}: not scratch, resume, a folder, or a GPT-2 by name")
        pretrained = GPT.from_pretrained(init_from, dropout)
        gpt_config = pretrained.config
        if T > gpt_config.block_size or n_tokens != pretrained.n_tokens:
            sys.exit(f"--T={T} with {n_tokens} tokens: --init_from={init_from} has a context of "
                     f"{gpt_config.block_size} and {pretrained.n_tokens} tokens")
    head = {"constants": constants, "torch": torch.__version__, "numpy": np.__version__, "gpu": gpu}
    sum_over_ranks([0], device)  # all are here: none reads log_dir now, none has found a mistake
    writes = rank == 0 and start <= max_steps  # a run past its last step is only looked at
    log_file = open_log(log_dir, checkpoint and start, head) if writes else open(os.devnull, "w")
    if wandb_log and writes:
        import wandb
        wandb_run = wandb.init(project=wandb_project, name=log_dir, dir=log_dir, config=config)
    if compile:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        except Exception as error:  # of many kinds; as a rule, there is no C++ compiler
            print(f"warning: --compile=0, as it fails here: {error!r:.200}")
            compile = False
    raw_model = (pretrained or GPT(gpt_config)).to(device)
    opt = make_optimizer(raw_model, optimizer, weight_decay, (beta1, beta2), momentum)
    if checkpoint:  # of the optimizer, the state alone: weight decay and the like are today's
        raw_model.load_state_dict(checkpoint["model"])
        opt.load_state_dict(opt.state_dict() | {"state": checkpoint["optimizer"]["state"]})
    checkpoint = shared = None  # frees the memory of these copies

    # raw_model is evaluated, sampled and saved; model, with the same weights, trains: compiled, and
    # in DDP, which averages the gradients of all processes while backward still computes others
    ddp = DDP(raw_model, gradient_as_bucket_view=True) if world_size > 1 else raw_model
    model = torch.compile(ddp) if compile else ddp
    c, n_params = gpt_config, sum(p.numel() for p in raw_model.parameters())
    # 2 a weight forward, 4 backward, none for positions; attention 12 L C T (nanoGPT's estimate)
    flops_per_token = 6 * (n_params - c.block_size * c.n_embd) + 12 * c.n_layer * c.n_embd * T
    peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    print(f"{n_params:,} parameters, {train.n_windows * T:,} tokens, {world_size} x {gpu}, {dtype}")
    examples = hellaswag.load(skip=True) if n_tokens == GPTConfig.vocab_size else None
    codec = text_codec(n_tokens) if rank == 0 and n_samples else None
    report = functools.partial(log, log_file, wandb_run)
    stops, now = [], time.monotonic  # added up over the ranks in each step; if any, all save, leave
    for s in (signal.SIGINT, signal.SIGTERM):  # one 0.5 s later kills; Slurm and torchrun send two
        signal.signal(s, lambda *_: stops.append(now()) or now() > stops[0] + 0.5 and os._exit(1))
    saved = (saver := ThreadPoolExecutor(1)).submit(str)  # the save before: there is none yet
    last, stopped = max(start, max_steps), False
    batch = train.batch((start * micro_steps * world_size + rank) * B, B, device)
    for step in range(start, last + 1):
        # `step` updates are done: evaluate, sample, save
        final = step == last
        if (final or val_every and step % val_every == 0) and not stopped:
            loss = evaluate(raw_model.eval(), val, n_val, B, rank, world_size, device, autocast)
            report(step, f"val loss {loss:.4f}", val_loss=loss)
        if (final or hella_every and step % hella_every == 0) and examples and not stopped:
            acc = hellaswag.evaluate(raw_model, examples, B * T, autocast)["acc_norm"]
            report(step, f"HellaSwag acc_norm {acc:.4f}", hellaswag=acc)
        if (final or sample_every and step and step % sample_every == 0) and codec and not stopped:
            texts = sample(raw_model.eval(), *codec, prompt, n_samples, sample_tokens,
                           temperature, top_k, seed, device, autocast)
            for text in texts:
                report(step, f"sample: {text}\n", sample=text)
            if wandb_run:
                wandb_run.log({"samples": wandb.Table(["text"], [[t] for t in texts])}, step=step)
        if writes and (final or stopped or step and save_every and step % save_every == 0):
            saved.result()  # one at a time, by a thread, of a copy that training leaves alone
            state = tree_map_only(torch.Tensor, lambda p: p.to("cpu", copy=True), {
                "model": raw_model.state_dict(), "optimizer": opt.state_dict(),
                "step": step, "config": config | {"model": dataclasses.asdict(gpt_config)}})
            state["model"]["lm_head.weight"] = state["model"]["transformer.wte.weight"]  # one copy
            saved = saver.submit(save_checkpoint, log_dir, keep, state, final or stopped)
        if final or stopped:
            break
        # gradient accumulation: backward adds to .grad, so that micro_steps batches act as one
        if not raw_model.training:
            raw_model.train()
        began = time.perf_counter()
        lr = get_lr(step, max_lr, min_lr, warmup_steps, max_steps)
        for group in opt.param_groups:
            group["lr"] = lr
        torch.manual_seed(seed + 1000003 * step + rank)  # dropout: of seed, step and rank alone
        total = 0.0
        for micro in range(micro_steps):
            ddp.require_backward_grad_sync = micro == micro_steps - 1  # average once, at the end
            with autocast:
                part = model(*batch) / micro_steps
            part.backward()
            total += part.detach()
            n = step * micro_steps + micro + 1  # while the GPU is busy, fetch its next batch
            batch = train.batch((n * world_size + rank) * B, B, device)
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf).item()
        loss, stopped = sum_over_ranks([total.item() / world_size, len(stops)], device)
        if not math.isfinite(loss + norm):
            sys.exit(f"step {step}: loss {loss}, gradient norm {norm}: stopped; lower --max_lr")
        opt.step()
        opt.zero_grad(set_to_none=True)
        dt = time.perf_counter() - began
        if log_every and step % log_every == 0 or step == last - 1:
            rate, left = total_batch_size / dt, (last - 1 - step) * dt / 60
            mfu = flops_per_token * rate / (world_size * peak_flops) if peak_flops else None
            used = f"mfu {mfu:.1%} | " if mfu else ""
            report(step, f"loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {dt * 1e3:.0f} ms | "
                   f"{rate:,.0f} tokens/s | {used}{left:.1f} min left", train_loss=loss, lr=lr,
                   grad_norm=norm, dt=dt, tokens_per_sec=rate, mfu=mfu)

    saved.result()
    if writes and not stopped and n_tokens == GPTConfig.vocab_size:
        raw_model.save_pretrained(os.path.join(log_dir, "hf"))
    print(f"stopped at step {step}, --init_from=resume goes on" if stopped else f"done: {log_dir}")
    if world_size > 1:
        dist.barrier()  # rank 0 may still be saving; a sum is not enough: a rank left behind aborts
        dist.destroy_process_group()
