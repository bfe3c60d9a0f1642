"""
Text in, token shards for train_gpt2.py out: FineWeb-Edu from the hub, or text of your own.
    python fineweb.py                               10B tokens: 28.5 GB to download, 20 GB of shards
    python fineweb.py --shards=2                    one for validation, one to train on
    python fineweb.py --pretokenized --shards=10    shards that others have made, in minutes
    python fineweb.py --source=my_texts --out=my_shards --shard_size=1000000

A document (a row of a .parquet or a line of a .jsonl file that has a field "text", or a .txt file)
becomes <|endoftext|> and the tokens of its text. In the order of the files, all are cut into shards
of shard_size tokens, the first for validation. Stop it at will: the same command goes on.
"""
import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from itertools import accumulate, islice
from multiprocessing.pool import ThreadPool
from pathlib import Path

import huggingface_hub as hub
import numpy as np
import tiktoken
from tqdm import tqdm

keep_downloads = True  # False removes a file of the hub once it is read: 30 GB of disk will do
batch_size = 256       # documents in a worker's task: about a quarter of a million tokens
EOT = 50256            # <|endoftext|> in GPT-2's vocabulary

def list_files(source, subset, suffixes, commit=None):
    """-> (commit, {name: bytes}) of a dataset's subset on the hub, or (None, ...) of a folder."""
    try:
        if os.path.exists(source):
            files = [(str(p), p.stat().st_size) for p in Path(source).rglob("*") if p.is_file()]
        else:
            commit = hub.dataset_info(source, revision=commit).sha
            tree = hub.list_repo_tree(source, subset, revision=commit, repo_type="dataset")
            files = [(entry.path, getattr(entry, "size", 0)) for entry in tree]
    except Exception as error:  # the client's errors have no common base
        sys.exit(f"{source}: no such folder, and from the hub: {' '.join(str(error).split())}")
    files = {name: size for name, size in sorted(files) if name.endswith(suffixes)}
    return commit, files or sys.exit(f"{source}: there are no {', '.join(suffixes)} files")

def download(source, commit, name, folder=None):
    """The local path of a file. The client takes up what breaks off; where it gives up, we do."""
    for pause in (0, 1, 5, 25):
        time.sleep(pause)
        try:
            return name if commit is None else hub.hf_hub_download(
                source, name, revision=commit, repo_type="dataset", local_dir=folder)
        except Exception as error:
            reason = " ".join(str(error).split())
    raise OSError(f"{source}: {reason}")

def read_file(path):
    """Yields (texts of batch_size documents, their share of the file's bytes)."""
    size = os.path.getsize(path)
    if path.endswith(".parquet"):
        import pyarrow.parquet
        file = pyarrow.parquet.ParquetFile(path, buffer_size=2**20, page_checksum_verification=True)
        for rows in file.iter_batches(batch_size, columns=["text"]):
            yield rows.column("text").to_pylist(), size * len(rows) // file.metadata.num_rows
    elif path.endswith(".jsonl"):
        with open(path, "rb") as file:
            while rows := list(islice(file, batch_size)):
                yield [json.loads(row)["text"] for row in rows if row.strip()], sum(map(len, rows))
    else:
        yield [Path(path).read_bytes().decode()], size

def read_source(fetch, names, first, batch):
    """Yields (file, batch, its bytes, its texts), from a batch of a file on."""
    for file in range(first, len(names)):
        if file > first and not os.path.exists(names[file]):
            yield file, 0, 0, []  # before we wait for the hub, let all before get into shards
        try:
            path = fetch(file).get()
            for n, (texts, size) in islice(enumerate(read_file(path), 1), batch, None):
                "".join(text for text in texts if text is not None)  # TypeError: not all are str
                yield file, (batch := n) - 1, size, texts
        except (OSError, ValueError, LookupError, TypeError) as error:
            yield file, batch, 0, []
            raise OSError(f"{names[file]}, after {batch * batch_size} documents: {error}") from None
        if not keep_downloads and path != names[file]:
            os.remove(os.path.realpath(path))  # the client's cache has links to its files
        batch = 0
    yield len(names), 0, 0, []

def work(pipe):
    """A worker: texts in, a uint16 array out: the tokens of each after an EOT; a null has none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    encode = tiktoken.get_encoding("gpt2").encode_to_numpy
    with contextlib.suppress(EOFError, OSError):  # until the parent is gone
        while True:
            parts = [np.empty(0, np.uint16)]
            for text in (text for text in pipe.recv() if text is not None):
                # half of a surrogate pair, which JSON can spell, is U+FFFD, as in encode_ordinary
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                parts += [EOT], encode(text, disallowed_special=())  # "<|endoftext|>" is mere text
            pipe.send(np.concatenate(parts, dtype=np.uint16, casting="unsafe"))

def tokenize(thread, batch):
    """-> (batch, its tokens), made by the worker of this thread, which the first call starts."""
    with contextlib.suppress(EOFError, OSError):
        if not hasattr(thread, "pipe"):
            spawn = multiprocessing.get_context("spawn")
            thread.pipe, its_end = spawn.Pipe()
            spawn.Process(target=work, args=[its_end], daemon=True).start()
            its_end.close()  # so that once the worker is gone, recv fails, and does not wait
        thread.pipe.send(batch[3])
        return batch, thread.pipe.recv()
    raise ChildProcessError("a worker died or did not start; for memory, try fewer --workers")

def in_order(batches, workers):
    """Yields (batch, its tokens) in order, up to 4 a worker ahead; an empty one drains them all."""
    waiting, threads, thread = [], ThreadPool(workers), threading.local()
    for batch in batches:
        waiting.append(threads.apply_async(tokenize, (thread, batch)))
        while len(waiting) > 4 * workers or waiting and not batch[3]:
            yield waiting.pop(0).get()

if __name__ == "__main__":
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"{message}; --help lists what there is")
    flag = parser.add_argument
    flag("--source", default="HuggingFaceFW/fineweb-edu", help="dataset on the hub, or folder here")
    flag("--subset", default="sample/10BT", help="the dataset's folder to take (%(default)s)")
    flag("--shard_size", type=int, default=100_000_000, help="tokens in a shard (%(default)s)")
    flag("--pretokenized", nargs="?", const="kjj0/finewebedu10B-gpt2", help="take .bin shards")
    flag("--out", default=Path(__file__).with_name("edu_fineweb10B"), help="folder (%(default)s)")
    flag("--shards", type=int, default=sys.maxsize, help="stop when there are so many")
    flag("--workers", type=int, default=cores, help="processes that tokenize (%(default)s)")
    source, subset, shard_size, ready, out, shards, workers = vars(parser.parse_args()).values()
    if min(shard_size, workers, shards) < 1:
        parser.error("--shard_size, --workers and --shards have to be positive")
    suffixes = (".bin",) if ready else (".parquet", ".jsonl", ".txt")
    if os.path.exists(source):  # a folder here: none of its files may come or go on the way
        source, subset = os.path.abspath(source), f"{len(list_files(source, 0, suffixes)[1])} files"
    made_of = [ready] if ready else [source, subset, shard_size, batch_size]

    def explain(kind, error, trace):  # one line where the reason lies outside the program
        reasons = {KeyboardInterrupt: "stopped", BlockingIOError: "another run is writing there"}
        if not issubclass(kind, (OSError, *reasons)):
            return sys.__excepthook__(kind, error, trace)
        print(f"--out={out}: {reasons.get(kind, error)}; the same command goes on", file=sys.stderr)
    sys.excepthook = explain
    def shard_path(n):
        return os.path.join(out, f"edufineweb_{'train' if n else 'val'}_{n:06d}.npy")

    progress, held = os.path.join(out, "progress.log"), any(Path(out).glob("*.[bn]??"))
    log = open(progress) if held and os.path.exists(progress) else ()  # where each shard begins
    lines = [json.loads(line) for line in log if line.endswith("}\n")]  # not what a kill has torn
    places = [p for p in lines if all(os.path.exists(shard_path(n)) for n in range(p["shard"]))]
    here = argparse.Namespace(**places[-1] if places else dict(
        made_of="unknown shards" if held else made_of,
        commit=None, end=False, shard=0, file=0, batch=0, skip=0, documents=0, nulls=0, bytes=0))
    if here.made_of != made_of:
        sys.exit(f"--out={out} holds {here.made_of}, not {made_of}; choose another folder")
    if here.end or here.shard >= shards:
        sys.exit(print(f"nothing to do: {out} has its {here.shard} shards"))
    here.commit, files = list_files(ready or source, not ready and subset, suffixes, here.commit)
    try:
        ready or tiktoken.get_encoding("gpt2")
    except Exception as error:
        sys.exit(f"no tokenizer; set TIKTOKEN_CACHE_DIR to a folder with GPT-2's: {error!r:.200}")
    os.makedirs(out, exist_ok=True)
    log = open(progress, "a")
    if os.name == "posix":
        import fcntl
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("\n" + json.dumps(vars(here)), file=log, flush=True)
    if ready:
        for name in sorted(files, key=lambda name: "val" not in name)[:shards]:
            print(download(ready, here.commit, name, out))
        sys.exit()

    def finish(tokens):  # notes where the next shard begins, then lets this one appear, whole
        path = shard_path(here.shard)
        here.shard, here.end = here.shard + (len(tokens) > 0), len(tokens) < shard_size
        here.documents += int(np.count_nonzero(tokens == EOT))
        print(json.dumps(vars(here)), file=log, flush=True)
        try:
            if len(tokens):
                with open(path + ".tmp", "wb") as file:
                    np.save(file, tokens)
                    os.fsync(file.fileno())
                os.replace(path + ".tmp", path)
        except OSError as error:
            Path(path + ".tmp").unlink(missing_ok=True)
            raise OSError(f"{path}: {error}") from None
    names, ends, loader = list(files), [*accumulate([*files.values(), 0])], ThreadPool(1)
    fetch = functools.cache(lambda n: loader.apply_async(download, (source, here.commit, names[n])))
    shard, start = np.empty(shard_size, np.uint16), time.time()
    total = had = here.shard * shard_size
    with tqdm(desc="read", unit="B", unit_scale=True, total=ends[-1], initial=here.bytes) as read, \
         tqdm(desc="made", unit=" tokens", unit_scale=True, initial=had) as made:
        results = in_order(read_source(fetch, names, here.file, here.batch), workers)
        while here.shard < shards and (result := next(results, None)):
            (here.file, here.batch, size, texts), tokens = result
            while here.skip < len(tokens) and here.shard < shards:
                part = tokens[here.skip:][:shard_size - total % shard_size]
                shard[total % shard_size:][:len(part)] = part
                total, here.skip = total + len(part), here.skip + len(part)
                made.update(len(part))
                if total % shard_size == 0:
                    finish(shard)
            read.update(size)
            here.skip, here.nulls, here.bytes = 0, here.nulls + texts.count(None), here.bytes + size
            made.total = min(total * ends[-1] // max(here.bytes, 1), shards * shard_size)
            if total * ends[here.file] < shards * shard_size * here.bytes:  # more files are needed
                fetch(min(here.file + 1, len(names) - 1))
        if here.shard < shards:
            finish(shard[:total % shard_size])
    print(f"{here.documents:,} documents, {here.nulls:,} null, {total:,} tokens, {here.shard} "
          f"shards, one for val; {(total - had) / (time.time() - start):,.0f} tokens/s")
