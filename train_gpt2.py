"""Trains GPT-2 from scratch: constants, model, data, optimizers, evaluation, checkpoints, run.

On a laptop it trains a small GPT on the bytes of input.txt (Shakespeare) in three minutes.
With shards of tokens in edu_fineweb10B/, which fineweb.py makes, it trains GPT-2 (124M):
    python train_gpt2.py
On eight GPUs, and on two nodes of eight (the second with --node_rank=1):
    torchrun --standalone --nproc_per_node=8 train_gpt2.py
    torchrun --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --nproc_per_node=8 train_gpt2.py

Each constant can be set for one launch: --B=16 --max_lr=1e-3. --help lists them all.
The results go to log_dir: log.jsonl, checkpoints and hf/, a folder that transformers reads.
Ctrl-C saves and exits; --init_from=resume continues, on any number of GPUs.
"""
import atexit
import difflib
import functools
import glob
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass
from datetime import timedelta

# torch reads these on import: GPU memory in segments that grow, large pages on a CPU
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
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

# constants -------------------------------------------------------------------
# a folder of token shards (see fineweb.py), or a text file: then small_gpt below applies
data = "edu_fineweb10B" if os.path.isdir("edu_fineweb10B") else "input.txt"
encoding = "gpt2"          # for a text file: gpt2 or bytes; shards hold GPT-2's tokens
log_dir = "log/gpt2"       # folder of the run; an older run in it is moved aside
init_from = "scratch"      # or resume, or somebody's weights: gpt2 ... gpt2-xl, or a folder
seed = 1337                # for the initial weights, data order, dropout, samples

# model: GPT-2 (124M). Medium is 24, 16, 1024; large 36, 20, 1280; xl 48, 25, 1600
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0              # helps only where the same data is seen many times

total_batch_size = 524288  # tokens in an optimizer step, over all GPUs: 2**19, about 0.5M
B = 64                     # sequences in a forward pass: 64 fit in 80 GB, 16 in 24 GB
T = 1024                   # tokens in a sequence

# optimizer: GPT-3's recipe for a model of this size
optimizer = "adamw"        # or muon, for the matrices in the blocks
max_lr = 6e-4              # reached at the end of the warmup
min_lr = 6e-5              # at the last step
warmup_steps = 715         # 375M tokens
max_steps = 19073          # 10B tokens, one epoch; with 0 it evaluates, samples and exits
weight_decay = 0.1         # of matrices and embeddings, not of biases and LayerNorms
momentum = 0.95            # of Muon's averaged gradients: 95% old, 5% new
grad_clip = 1.0            # gradients with a larger norm are scaled down to it; 0 for never

# how often, in steps; 0 for never
log_every = 1
val_every = 250
val_steps = 20             # evaluate on 20 * total_batch_size tokens, always the same ones
hella_every = 500          # HellaSwag
sample_every = 500
save_every = 1000
keep = 3                   # newest checkpoints to keep, plus every 5000th step; 0 keeps all

prompt = "Hello, I'm a language model,"
n_samples = 2
sample_tokens = 128        # tokens after the prompt
temperature = 0.8          # below 1, likely tokens become likelier
top_k = 50                 # sample only from the 50 likeliest tokens; 0 for all

device = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
dtype = "auto"             # bfloat16, float16 or float32; auto: the fastest native one
compile = torch.cuda.is_available() and os.name == "posix"  # there is no Triton for Windows
timeout = 600              # seconds to wait for another process before giving up
wandb_log = False
wandb_project = "gpt2"

# for a text file, these replace the values above, so edit them here: a small GPT, 3 minutes
small_gpt = dict(encoding="bytes", log_dir="log/baby", n_layer=4, n_head=4, n_embd=128, T=64,
    B=32, total_batch_size=2048, optimizer="muon", max_lr=8e-3, min_lr=5e-4, warmup_steps=50,
    max_steps=1000, momentum=0.9, log_every=20, val_every=500, val_steps=100,
    sample_every=500, save_every=500, prompt="\n", sample_tokens=256)
# and these for a text file with somebody's GPT-2: a short fine-tuning
fine_tuning = dict(log_dir="log/finetuned", dropout=0.1, total_batch_size=16384, B=4,
    max_lr=3e-5, min_lr=3e-6, warmup_steps=10, max_steps=100, val_every=25, hella_every=0,
    sample_every=50, save_every=50)
CHOICES = {"optimizer": ("adamw", "muon"), "encoding": ("gpt2", "bytes"),
           "dtype": ("auto", "bfloat16", "float16", "float32"), "device": ("cuda", "mps", "cpu")}
constants = {k: v for k, v in globals().items() if k[0] != "_" and isinstance(v, (int, float, str))}

# model -----------------------------------------------------------------------
@dataclass
class GPTConfig:
    block_size: int = 1024   # tokens of context
    vocab_size: int = 50257  # 256 bytes, 50,000 BPE merges, <|endoftext|>; more is padding
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0

def causal_attention(q, k, v, dropout):
    """softmax(q k^T / sqrt(C/H)) v, shapes (B, H, T, C/H). No position sees a later one."""
    if q.device.type == "cpu":  # where the backward pass in 16 bits is slow
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast("cpu", enabled=False):  # on a GPU this changes nothing
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)

class CausalSelfAttention(nn.Module):
    """Lets each position gather information from itself and the positions before it.
    Each has a query (what it looks for), a key (what it can be found by) and a value (what
    it passes on). It receives the average of the values, weighted by how well the keys match
    its query. The H heads do this side by side."""
    def __init__(self, config):
        super().__init__()
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

class Block(nn.Module):
    """Attention and MLP each read the normalized residual stream and add to it."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        x = x + self.drop(self.attn(self.ln_1(x)))
        return x + self.drop(self.mlp(self.ln_2(x)))

class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): turns the tokens so far into scores for the next one."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # weight tying: similar tokens should have similar embeddings, and similar scores
        self.transformer.wte.weight = self.lm_head.weight

        for name, p in self.named_parameters():
            # 2 * n_layer branches add to the residual stream: small weights limit its growth
            branches = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(branches))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx):
        """Ids (B, T), T <= block_size -> states after the last LayerNorm, (B, T, C)."""
        tok_emb = self.transformer.wte(idx)  # (B, T, C)
        pos_emb = self.transformer.wpe.weight[:idx.shape[1]]  # (T, C): attention ignores order
        x = tok_emb + pos_emb
        if torch.is_autocast_enabled(x.device.type):  # a residual stream in 16 bits is faster
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Ids (B, T) -> logits (B, T, vocab_size), or the mean loss given targets (B, T)."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0):
        """Ids (B, T) -> ids (B, T + max_new_tokens), each drawn from the model's scores."""
        for _ in range(max_new_tokens):
            context = idx[:, -self.config.block_size:]
            last = self.hidden(context)[:, -1]  # (B, C): only the last position is needed
            logits = self.lm_head(last)[:, :GPTConfig.vocab_size].float()  # without padding
            logits = logits / max(temperature, 1e-6)
            if top_k > 0:
                likeliest = logits.topk(min(top_k, logits.shape[1])).values
                logits[logits < likeliest[:, -1:]] = -math.inf
            probs = F.softmax(logits, dim=-1)
            next_token = torch.multinomial(probs, num_samples=1)
            idx = torch.cat([idx, next_token], dim=1)
        return idx

# Hugging Face's format -------------------------------------------------------
def transpose_conv1d(state):
    """OpenAI's weights are (in, out), nn.Linear's are (out, in). Converts either way."""
    conv1d = "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"
    return {name: p.t() if name.endswith(conv1d) else p for name, p in state.items()}

def from_pretrained(name, dropout=0.0):
    """Loads a GPT-2 from a folder or, by name, from the hub. Raises OSError if it can't."""
    from transformers import GPT2LMHeadModel
    theirs = GPT2LMHeadModel.from_pretrained(name)
    c = theirs.config
    model = GPT(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, dropout))
    model.load_state_dict(transpose_conv1d(theirs.state_dict()))
    return model

def save_pretrained(model, folder):
    """Writes config.json and model.safetensors, without the padding of the vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel
    c = model.config
    shape = dict(n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, **shape))
    theirs.load_state_dict(transpose_conv1d(model.state_dict()))
    theirs.resize_token_embeddings(min(c.vocab_size, GPTConfig.vocab_size))
    theirs.save_pretrained(folder)

GPT.from_pretrained = staticmethod(from_pretrained)
GPT.save_pretrained = save_pretrained

# data ------------------------------------------------------------------------
def get_tokenizer(encoding):
    """GPT-2's tokenizer, which tiktoken downloads once, or one whose tokens are bytes."""
    if encoding == "gpt2":
        return tiktoken.get_encoding("gpt2")
    single = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("", pat_str="(?s:.)", mergeable_ranks=single, special_tokens={})

@functools.cache  # train and val are parts of one text
def read_text(path, encoding):
    """The tokens of a text file."""
    if encoding == "bytes":
        return np.fromfile(path, dtype=np.uint8)
    text = open(path, encoding="utf-8", errors="replace").read()
    return np.array(get_tokenizer(encoding).encode_ordinary(text), dtype=np.uint16)

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
                assert (magic, version) == (20240520, 1), "the header is not llm.c's"
                shape, dtype = (count,), "<u2"
            found = (os.path.getsize(path) - file.tell()) / 2
            assert shape == (found,), f"expected {shape} tokens, found {found}"
            assert dtype == "<u2", f"{dtype} instead of uint16"
        except Exception as error:  # a damaged header can lead to any kind of error
            sys.exit(f"{path}: not a shard of tokens from fineweb.py: {error!s:.200}")
        return np.memmap(path, "<u2", mode="r", offset=file.tell(), shape=shape)

def load_split(data, split, encoding):
    """Returns [(name, tokens)] of train or val: a folder's shards, or a part of a text."""
    shards = []
    if os.path.isdir(data):
        for name in sorted(os.listdir(data)):
            # edu_train_000001.npy has the words edu, train and npy
            if name.endswith((".npy", ".bin")) and split in re.findall("[a-z]+", name):
                shards.append((name, open_shard(f"{data}/{name}")))
    elif os.path.isfile(data) and not data.endswith((".npy", ".bin")):
        tokens = read_text(data, encoding)
        n_train = len(tokens) - len(tokens) // 10  # the last tenth is for validation
        tokens = tokens[:n_train] if split == "train" else tokens[n_train:]
        shards.append((os.path.basename(data), tokens))
    if not shards:
        sys.exit(f"--data={data}: no text, and no folder with {split} shards; see fineweb.py")
    return shards

class TokenLoader:
    """Cuts shards into windows of T + 1 tokens: T inputs, and the token after each.
    With T = 4, a shard of 14 tokens has the windows 0 to 4, 4 to 8 and 8 to 12. Their order
    depends only on the seed and the epoch. So a resumed run needs only the step, and a step
    trains on the same tokens with any B and any number of processes."""
    def __init__(self, shards, B, T, rank, world_size, device, seed=None):
        self.shards = shards
        self.B, self.T = B, T
        self.rank, self.world_size = rank, world_size
        self.device, self.seed = device, seed
        # for each window, its shard and where it starts in there
        starts = [np.arange(0, len(tokens) - T, T) for _, tokens in shards]
        self.starts = np.concatenate(starts)
        self.shard_of = np.repeat(np.arange(len(shards)), [len(s) for s in starts])
        self.n_windows = len(self.starts)
        if self.n_windows == 0:
            sys.exit(f"{shards[0][0]} is too short: a window takes T + 1 = {T + 1} tokens")
        self.start_epoch(0)

    def start_epoch(self, epoch):
        """Shuffles the windows, and moves all of them, so that each epoch cuts elsewhere."""
        self.epoch = epoch
        self.offset = 101 * epoch % self.T  # 101 is prime, so offsets repeat only after T epochs
        self.order = np.arange(self.n_windows)
        if self.seed is not None:  # for validation, the order stays
            np.random.default_rng([self.seed, epoch]).shuffle(self.order)

    def window(self, number):
        """The T + 1 tokens of a window. Numbers run on from one epoch to the next."""
        epoch, place = divmod(number, self.n_windows)
        if epoch != self.epoch:
            self.start_epoch(epoch)
        window = self.order[place]
        name, tokens = self.shards[self.shard_of[window]]
        # the last window of a shard has less room to move
        start = min(self.starts[window] + self.offset, len(tokens) - self.T - 1)
        ids = tokens[start:start + self.T + 1]
        if ids.max() >= GPTConfig.vocab_size:
            sys.exit(f"{name}: {ids.max()} at offset {start + ids.argmax()} is no GPT-2 token")
        return ids

    def batch(self, n):
        """This rank's n-th micro-batch: inputs and the tokens after them, (B, T) each."""
        # a micro-batch is world_size * B windows, of which each rank takes B
        first = (n * self.world_size + self.rank) * self.B
        windows = [self.window(i) for i in range(first, first + self.B)]
        tokens = torch.from_numpy(np.stack(windows).astype(np.int64)).to(self.device)
        return tokens[:, :-1], tokens[:, 1:]  # views, one token apart

# optimizers and schedule -----------------------------------------------------
def orthogonalize(m):
    """Matrices U S V^T (n, rows, columns) -> about U V^T: all singular values near 1.
    Each round turns a singular value s into 3.4445 s - 4.7750 s^3 + 2.0315 s^5 (Jordan 2024)."""
    if m.shape[-2] > m.shape[-1]:
        return orthogonalize(m.mT).mT  # for a smaller Gram matrix
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
        shapes = dict.fromkeys(p.shape for p in matrices)
        groups = [{"params": [p for p in matrices if p.shape == shape]} for shape in shapes]
        super().__init__(groups, dict(lr=0.0, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            directions = []
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                state["average"].lerp_(p.grad, 1 - group["momentum"])
                directions.append(p.grad.lerp(state["average"], group["momentum"]))  # Nesterov

            # (n, rows, columns): one large product is faster than many small ones
            stack = torch.stack(directions)
            rows, columns = stack.shape[1:]
            if rows == 3 * columns:
                rows = columns  # c_attn is three maps, for q, k and v, in one product
            stack = orthogonalize(stack.view(-1, rows, columns)).view_as(stack)
            # steps as large as AdamW's, so one learning rate suits both (arXiv 2502.16982)
            stack *= 0.2 * math.sqrt(max(rows, columns))
            for p, direction in zip(group["params"], stack, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(direction, alpha=group["lr"])

def make_optimizers(model, optimizer, weight_decay, momentum=momentum):
    """AdamW for everything, or Muon for the matrices in the blocks, AdamW for the rest."""
    vectors, embeddings, matrices = [], [], []
    for name, p in model.named_parameters():
        if p.dim() < 2:  # biases and LayerNorms
            vectors.append(p)
        elif name.startswith("transformer.h."):
            matrices.append(p)
        else:
            embeddings.append(p)
    decayed = embeddings if optimizer == "muon" else embeddings + matrices
    groups = [{"params": decayed}, {"params": vectors, "weight_decay": 0.0}]
    # GPT-3's betas; the loop sets the learning rate
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    if optimizer == "adamw":
        return [adamw]
    return [adamw, Muon(matrices, weight_decay, momentum)]

def get_lr(step, max_lr, min_lr, warmup_steps, max_steps):
    """A linear warmup, since large first steps diverge, then a cosine down to min_lr."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    decay_ratio = min(1, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    coeff = 0.5 * (1 + math.cos(math.pi * decay_ratio))  # from 1 to 0
    return min_lr + coeff * (max_lr - min_lr)

# evaluation ------------------------------------------------------------------
# attention without cuDNN's kernel, which makes a new plan for each length
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

def mean_over_ranks(values, device):
    """A list of numbers -> the mean of each over all processes."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, device=device)
    dist.all_reduce(total)  # now the sum over all processes
    return [value / dist.get_world_size() for value in total.tolist()]

@torch.no_grad()
def evaluate(model, loader, n_batches):
    """The mean loss, in nats per token, of the first n_batches micro-batches of all ranks."""
    model.eval()
    losses = []
    for n in range(n_batches):
        x, y = loader.batch(n)
        losses.append(model(x, y).item())
    model.train()
    return mean_over_ranks([sum(losses) / n_batches], loader.device)[0]

def sample(model, tokenizer, prompt, n_samples, seed):
    """Returns texts that begin with the prompt; see sample_tokens, temperature and top_k."""
    model.eval()
    start = tokenizer.encode(prompt or "<|endoftext|>", allowed_special="all")
    idx = torch.tensor([start] * n_samples, device=model.lm_head.weight.device)
    torch.manual_seed(seed)  # training is not affected: it sets a new seed in each step
    idx = model.generate(idx, sample_tokens, temperature, top_k)
    model.train()
    texts = [tokenizer.decode(tokens) for tokens in idx[:, len(start):].tolist()]
    # a random model of bytes writes control characters, which would upset a terminal
    texts = [re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text) for text in texts]
    return [prompt + text.partition("<|endoftext|>")[0] for text in texts]

# log and checkpoints ---------------------------------------------------------
# dense 16-bit FLOP/s from the data sheets; the first key found in the GPU's name counts
PEAK_FLOPS = {"T4": 65e12, "V100": 125e12, "L4": 121e12, "L40S": 362e12, "A10": 125e12,
    "A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12,
    "B200": 2250e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 209e12, "MI300X": 1307e12}

def get_peak_flops(device):
    """312e12 for "NVIDIA A100-SXM4-80GB"; None for a device that is not listed."""
    names = [n for n in PEAK_FLOPS if re.search(rf"\b{n}\b(?!.*(Laptop|MIG))", device)]
    return PEAK_FLOPS[names[0]] if names else None

def lock(path):
    """Keeps other runs out of the folder as long as this process lives."""
    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout:
        sys.exit(f"another run holds {path}; choose another --log_dir")
    except OSError as error:  # some network drives have no locks
        print(f"warning: {path} can't be locked: {error}")

def move_aside(log_dir):
    """Renames log/gpt2, which holds an older run, to log/gpt2-1, or -2, ..."""
    n = 1
    while os.path.exists(f"{log_dir}-{n}"):
        n += 1
    os.rename(log_dir, f"{log_dir}-{n}")
    os.makedirs(log_dir)
    print(f"moved the older run in {log_dir} to {log_dir}-{n}")

def checkpoint_paths(log_dir):
    """The checkpoints in log_dir as {step: path}, in order."""
    names = glob.glob("ckpt_*.pt", root_dir=log_dir)
    steps = sorted(int(name[5:-3]) for name in names if name[5:-3].isdigit())
    return {step: f"{log_dir}/ckpt_{step:06d}.pt" for step in steps}

def save_checkpoint(log_dir, checkpoint, keep, final):
    """Saves a checkpoint, removes old ones. If it can't, it warns, or raises if `final`."""
    path = f"{log_dir}/ckpt_{checkpoint['step']:06d}.pt"
    try:
        # renamed only when complete, so that a kill never leaves half a checkpoint
        with open(path + ".tmp", "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        if final:
            raise
        print(f"warning: {path} can't be saved, is the disk full? {error}")
        return
    # of the checkpoints up to this one, keep the newest and every 5000th step
    paths = checkpoint_paths(log_dir)
    steps = [s for s in paths if s <= checkpoint["step"] and s % 5000 != 0]
    if keep > 0:
        for step in steps[:-keep]:
            os.remove(paths[step])

def load_checkpoint(log_dir):
    """The newest checkpoint that is not damaged, or None if there is none."""
    paths = list(checkpoint_paths(log_dir).values())
    for path in reversed(paths):
        try:
            # it is a zip file, and torch.load does not compare the checksums in it
            assert zipfile.ZipFile(path).testzip() is None, "wrong checksum"
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damage can lead to any kind of error
            print(f"warning: skipping {path}, it does not load: {error!r:.200}")
    if paths:
        sys.exit(f"no checkpoint in {log_dir} loads; start anew with --init_from=scratch")
    print(f"no checkpoint in {log_dir} yet: starting from scratch")

def check_resume(config, saved):
    """Exits if a resumed run would have another model, optimizer or order of data."""
    fixed = ["data_checksum", "encoding", "seed", "T", "total_batch_size", "n_layer", "n_head",
             "n_embd", "optimizer"]
    changed = [f"{k} was {saved[k]}, is {config[k]}" for k in fixed if saved[k] != config[k]]
    if changed:
        sys.exit(f"can't resume: {'; '.join(changed)}; set it back, or start from scratch")

# the launch ------------------------------------------------------------------
def parse_flag(arg):
    """Turns "--B=16" into ("B", 16). Exits if the name or the type is wrong."""
    name, _, text = arg.removeprefix("--").partition("=")
    if name not in constants:
        nearest = difflib.get_close_matches(name, constants, n=1, cutoff=0)[0]
        sys.exit(f"{arg}: no such constant; the nearest is --{nearest}={constants[nearest]}")
    kind = type(constants[name])
    try:
        value = text if kind is str else json.loads(text.lower())
        assert arg == f"--{name}={text}" and kind(value) == value
        assert kind is str or value >= 0
        assert name not in CHOICES or value in CHOICES[name]
    except Exception:
        expected = " or ".join(CHOICES.get(name, [kind.__name__]))
        sys.exit(f"{arg}: expected {expected}, as in --{name}={constants[name]}")
    return name, kind(value)

def constants_of_launch(args):
    """The constants above, overridden by the defaults for a text file, then by the flags."""
    flags = dict(parse_flag(arg) for arg in args if arg != "--help")
    launch = constants | flags
    if not os.path.isdir(launch["data"]):
        small = launch["init_from"] in ("scratch", "resume") and flags.get("encoding") != "gpt2"
        launch = constants | (small_gpt if small else fine_tuning) | flags
    if "--help" in args:
        print(__doc__, *(f"--{name}={value!r}" for name, value in launch.items()), sep="\n")
        sys.exit()
    return launch

def default_dtype(device):
    """The fastest dtype that the device supports natively; old GPUs emulate bfloat16."""
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float16"
    native = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"

def torchrun_store():
    """Where the processes that torchrun starts find each other's addresses. A restart on one
    machine would find the old ones, so each attempt has its own prefix (pytorch#135712)."""
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    return store

def fit_batch(B, T, total_batch_size, world_size):
    """The largest B, up to the one asked for, that divides a process's share of a step."""
    share, rest = divmod(total_batch_size, T * world_size)
    if share == 0 or rest != 0:
        sys.exit(f"{total_batch_size=} is no multiple of T * processes = {T * world_size}")
    largest = max(b for b in range(1, min(B, share) + 1) if share % b == 0)
    if largest < B:
        print(f"lowered --B={B} to {largest}: a step has {share} sequences for each process")
    return largest

stop_signals = []  # when they came
def on_stop_signal(number, frame):
    """Lets the step finish and be saved. A second signal after 0.5 s exits at once."""
    stop_signals.append(time.monotonic())
    if stop_signals[-1] - stop_signals[0] > 0.5:
        os._exit(1)

# the run ---------------------------------------------------------------------
if __name__ == "__main__":
    constants = constants_of_launch(sys.argv[1:])
    globals().update(constants)
    if min(B, T, n_head, n_embd, val_steps) == 0 or n_embd % n_head != 0:
        sys.exit(f"{B=}, {T=}, {n_head=}, {val_steps=} must be > 0, {n_embd=} a multiple of n_head")

    # torchrun starts a process for each GPU and numbers them; plain python is rank 0 of 1
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # its number on this machine
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    ddp = world_size > 1
    master_process = rank == 0  # it prints, logs and saves
    if not master_process:  # remove this to see what the other processes print
        sys.stdout = open(os.devnull, "w")

    if device == "cuda":
        n_gpus = torch.cuda.device_count()
        if local_rank >= n_gpus:
            n_processes = os.environ.get("LOCAL_WORLD_SIZE", 1)
            sys.exit(f"--device=cuda: {n_processes} processes, but only {n_gpus} GPUs")
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")  # TF32 for what remains in float32
    if ddp:
        # connect the processes, so that they can average gradients
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=torchrun_store(), rank=rank,
                                world_size=world_size, timeout=timedelta(seconds=timeout))
        # gloo's threads can crash Python's exit (pytorch#190489): leave them time to finish
        atexit.register(time.sleep, 0.2)

    # precision: products in 16 bits where the device is fast at them
    if dtype == "auto":
        dtype = default_dtype(device)
    autocast = torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")
    # float16 would round small gradients to 0, so scale the loss up. Other dtypes don't
    scaler = torch.amp.GradScaler(device, enabled=dtype == "float16")
    device_name = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"{world_size} x {device_name}, {dtype}")

    # data: shards or a text, needed to train and to evaluate
    B = fit_batch(B, T, total_batch_size, world_size)
    windows_per_step = total_batch_size // T
    grad_accum_steps = windows_per_step // (B * world_size)
    config = constants | {"device": device_name, "dtype": dtype}
    if max_steps > 0:
        shards = load_split(data, "train", encoding)
        train_loader = TokenLoader(shards, B, T, rank, world_size, device, seed)
        # a resumed run notices other data by the names and lengths of the shards
        lengths = [(name, len(tokens)) for name, tokens in shards]
        config["data_checksum"] = zlib.crc32(repr(lengths).encode())
        if train_loader.n_windows < windows_per_step:
            sys.exit(f"{data}: {train_loader.n_windows} windows of {T} tokens, but a step takes "
                     f"{windows_per_step}; lower --total_batch_size")
    if val_every > 0:
        shards = load_split(data, "val", encoding)
        val_loader = TokenLoader(shards, B, T, rank, world_size, device)
        # whole steps, so that any number of processes evaluates on the same tokens
        val_steps = max(1, min(val_steps, val_loader.n_windows // windows_per_step))

    # log_dir: nothing in it changes before all ranks are ready
    log_dir = os.path.normpath(log_dir)
    writes_files = master_process and max_steps > 0
    if writes_files:
        os.makedirs(log_dir, exist_ok=True)
        lock_file = lock(f"{log_dir}.lock")
        if wandb_log:
            import wandb
            wandb.init(project=wandb_project, name=log_dir, config=config)

    # model: from the newest checkpoint, from scratch, or from somebody's weights
    torch.manual_seed(seed)
    start_step = log_size = 0
    checkpoint = load_checkpoint(log_dir) if init_from == "resume" else None
    if checkpoint is not None:
        if max_steps > 0:
            check_resume(config, checkpoint["config"])
        start_step, log_size = checkpoint["step"], checkpoint["log_size"]
        max_steps = max(max_steps, start_step)  # a run past its end is only evaluated
        raw_model = GPT(GPTConfig(**checkpoint["config"]["model"] | {"dropout": dropout}))
        raw_model.load_state_dict(checkpoint["model"])
        print(f"resuming at step {start_step}")
    elif init_from in ("scratch", "resume"):
        vocab_size = 256 if encoding == "bytes" else 50304  # 393 * 128 is faster than 50257
        raw_model = GPT(GPTConfig(T, vocab_size, n_layer, n_head, n_embd, dropout))
    else:
        try:
            raw_model = GPT.from_pretrained(init_from, dropout)
        except OSError as error:
            reason = str(error).splitlines()[0]
            sys.exit(f"--init_from={init_from}: no GPT-2 in such a folder or on the hub: {reason}")
    if T > raw_model.config.block_size:
        sys.exit(f"--T={T}: use --T={raw_model.config.block_size}, which is the model's context")
    if mean_over_ranks([start_step], device) != [start_step]:
        sys.exit(f"rank {rank} found another checkpoint than others: do all see {log_dir}?")

    raw_model.to(device)
    optimizers = make_optimizers(raw_model, optimizer, weight_decay, momentum)
    if checkpoint is not None:
        for opt, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
            # only the state; settings like the weight decay come from this launch
            opt.load_state_dict(opt.state_dict() | {"state": saved["state"]})
        scaler.load_state_dict(scaler.state_dict() | checkpoint["scaler"])  # {} if not float16
        del checkpoint

    # model trains and validates; raw_model, with the same weights, does everything else
    model = torch.compile(raw_model) if compile else raw_model
    if ddp:
        model = DDP(model, gradient_as_bucket_view=True)  # averages gradients in backward
    config["model"] = vars(raw_model.config)
    n_params = sum(p.numel() for p in raw_model.parameters())
    # FLOP per parameter: 2 forward, 4 backward (positions: none). Attention: 12 L C T
    c = raw_model.config
    flops_per_token = 6 * (n_params - c.block_size * c.n_embd) + 12 * c.n_layer * c.n_embd * T
    peak = get_peak_flops(device_name) if dtype != "float32" else None
    print(f"{n_params:,} parameters, {grad_accum_steps} micro-steps of {B} x {T} tokens "
          f"(for less memory, lower --B={B})")

    # log.jsonl: the constants, then a line for each event
    if writes_files:
        if init_from != "resume" and os.listdir(log_dir):
            move_aside(log_dir)
        log_file = open(f"{log_dir}/log.jsonl", "a", buffering=1)
        # a resumed run repeats the steps after its checkpoint, so it drops their lines
        log_file.truncate(min(log_size, os.path.getsize(log_file.name)))
        if log_size == 0:
            log_file.write(json.dumps({"constants": config, "torch": torch.__version__}) + "\n")

    def log(line, **event):
        print(f"step {step:5d} | {line}", flush=True)
        if writes_files:
            log_file.write(json.dumps({"step": step, **event}) + "\n")
            if wandb_log:
                wandb.log(event, step=step)

    # for HellaSwag and samples; if a download fails, training goes on without them
    encoding = "bytes" if raw_model.config.vocab_size == 256 else "gpt2"
    examples = tokenizer = None
    if hella_every > 0 and encoding == "gpt2":
        examples = hellaswag.load_examples(skip=True)
    try:
        if sample_every > 0 and n_samples > 0:
            tokenizer = get_tokenizer(encoding)
    except (OSError, ValueError) as error:
        print(f"no samples, GPT-2's tokenizer can't be downloaded: {error!r:.200}")

    def due(every):
        """True every so many steps, and at the last one."""
        return every > 0 and (last_step or step % every == 0)

    signal.signal(signal.SIGINT, on_stop_signal)
    signal.signal(signal.SIGTERM, on_stop_signal)
    stopping = False
    results = {}  # for the last line that is printed
    t_start = time.perf_counter()
    # at this point, the run has made `step` updates; the last round only saves and evaluates
    for step in range(start_step, max_steps + 1):
        last_step = step == max_steps

        # once in a while, at the end, and when asked to stop: save
        if writes_files and step > start_step and (stopping or due(save_every)):
            checkpoint = dict(model=raw_model.state_dict(), step=step, config=config,
                              optimizers=[opt.state_dict() for opt in optimizers],
                              scaler=scaler.state_dict(), log_size=os.path.getsize(log_file.name))
            save_checkpoint(log_dir, checkpoint, keep, final=stopping or last_step)
        if stopping:
            break

        # once in a while: the loss on the validation set
        if due(val_every):
            with autocast:
                val_loss = evaluate(model, val_loader, val_steps * grad_accum_steps)
            log(f"val loss {val_loss:.4f}", val_loss=val_loss)
            results["val loss"] = val_loss

        # once in a while: HellaSwag
        if due(hella_every) and examples is not None:
            with autocast, sdpa_kernel(ANY_LENGTH):
                acc_norm = hellaswag.evaluate(raw_model, examples, B * T)["acc_norm"]
            log(f"HellaSwag acc_norm {acc_norm:.4f}", hellaswag=acc_norm)
            results["HellaSwag"] = acc_norm

        # once in a while: samples
        if due(sample_every) and tokenizer is not None and master_process:
            with autocast, sdpa_kernel(ANY_LENGTH):
                for text in sample(raw_model, tokenizer, prompt, n_samples, seed):
                    log(f"sample: {text}\n", sample=text)
        if last_step:
            break

        # one step of the optimization
        t0 = time.perf_counter()
        lr = get_lr(step, max_lr, min_lr, warmup_steps, max_steps)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr
        torch.manual_seed(seed + step * world_size + rank)  # for dropout: same after resuming

        # a whole batch would need too much memory: add up the gradients of micro-batches
        loss_accum = 0.0
        for micro_step in range(grad_accum_steps):
            x, y = train_loader.batch(step * grad_accum_steps + micro_step)
            if ddp:
                # DDP averages gradients over all ranks in the last backward only
                model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            with autocast:
                # divide, so that they add up to the mean over the whole batch
                loss = model(x, y) / grad_accum_steps
            loss_accum += loss.detach()
            scaler.scale(loss).backward()

        # clip the gradients, so that a bad batch does not move the weights far
        for opt in optimizers:
            scaler.unscale_(opt)  # in float16, they are scaled like the loss
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf).item()

        # the mean loss of all ranks; if one of them got a signal, all stop
        train_loss, signals = mean_over_ranks([loss_accum.item(), len(stop_signals)], device)
        stopping = signals > 0

        # infinities would ruin the weights: stop. But float16 has a scale above 1, which may
        # have been too large: skip the update, and update() halves the scale
        finite = math.isfinite(train_loss + norm)
        if not finite and scaler.get_scale() <= 1:
            sys.exit(f"step {step}: loss {train_loss}, gradient norm {norm}; lower --max_lr")
        if finite:
            with autocast:  # for the matrix products of Muon
                for opt in optimizers:
                    scaler.step(opt)
        scaler.update()
        raw_model.zero_grad()

        dt = time.perf_counter() - t0
        if due(log_every):
            tokens_per_sec = total_batch_size / dt
            mfu = tokens_per_sec * flops_per_token / (world_size * peak) if peak else None
            line = (f"loss {train_loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | "
                    f"{1000 * dt:.0f} ms | {tokens_per_sec:,.0f} tokens/s")
            if mfu is not None:
                line += f" | mfu {mfu:.1%}"
            log(line, train_loss=train_loss, lr=lr, grad_norm=norm, dt=dt,
                tokens_per_sec=tokens_per_sec, mfu=mfu)

    if stopping:
        print(f"stopped at step {step}; to continue, use the same flags, "
              f"with --init_from=resume --encoding={encoding}")
    elif writes_files:
        if encoding == "gpt2":
            raw_model.save_pretrained(f"{log_dir}/hf")
        tokens = (step - start_step) * total_batch_size
        minutes = (time.perf_counter() - t_start) / 60
        results = [f"{name} {value:.4f}" for name, value in results.items()]
        if device == "cuda":
            results.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory")
        done = f"done: {step} steps, {tokens:,} tokens, {minutes:.1f} minutes"
        print(done, *results, log_dir, sep=", ")
    if ddp:
        mean_over_ranks([0], device)  # wait for all: rank 0 may still be saving
        dist.destroy_process_group()
