"""
Turns text into token shards for train_gpt2.py: FineWeb-Edu from the hub, or text of your own.

python fineweb.py                               10B tokens: downloads 28.5 GB, writes 20 GB
python fineweb.py --shards=2                    one shard for validation, one to train on
python fineweb.py --pretokenized --shards=10    shards that others have made, in minutes
python fineweb.py --source=my_texts --out=my_shards --shard_size=1000000

A document is a row of a .parquet or a line of a .jsonl file, with a field "text", or a .txt file.
It becomes <|endoftext|> and the tokens of its text. All documents, in order, are cut into shards
of shard_size tokens, the first for validation. Stop when you like: the same command goes on.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections import deque, namedtuple
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path

import huggingface_hub as hub
import numpy as np
import pyarrow.parquet as pq
import tiktoken
from tqdm import tqdm

keep_downloads = True  # False removes a file of the hub once it is read, and saves 28 GB
batch_size = 256       # documents that a worker gets at a time, some 250,000 tokens
EOT = 50256            # <|endoftext|> in GPT-2's vocabulary

# document: the number of the first one in its file
Batch = namedtuple("Batch", "file document texts")

def list_files(source, subset, suffixes, revision):
    """Returns (revision, files) of a dataset on the hub; a folder has no revision."""
    if os.path.isdir(source):
        names = [str(path) for path in Path(source).rglob("*") if path.is_file()]
    else:
        try:
            revision = hub.dataset_info(source, revision=revision).sha
            tree = hub.list_repo_tree(source, subset, revision=revision, repo_type="dataset")
            names = [entry.path for entry in tree]
        except Exception as error:  # the client's errors have no common base
            sys.exit(f"{source}: no such folder, and from the hub: {error!r:.200}")
    files = sorted(name for name in names if name.endswith(suffixes))
    if not files:
        sys.exit(f"{source}: there are no {', '.join(suffixes)} files")
    return revision, files

def download(source, revision, name, folder=None):
    """Returns the local path of a file; tries again where the hub's client gives up."""
    where = {"revision": revision, "repo_type": "dataset", "local_dir": folder}
    for pause in (1, 5, 25, 0):
        try:
            return hub.hf_hub_download(source, name, **where)
        except Exception as error:
            reason = f"{error!r:.200}"
            time.sleep(pause)
    raise OSError(f"{source}/{name}: {reason}")

def read_documents(path):
    """Yields the texts of a file; a null is None."""
    if path.endswith(".parquet"):
        # with a buffer, a row group of gigabytes is not read at once
        file = pq.ParquetFile(path, buffer_size=2**20, page_checksum_verification=True)
        for rows in file.iter_batches(batch_size, columns=["text"]):
            yield from rows.column("text").to_pylist()
    elif path.endswith(".jsonl"):
        with open(path, "rb") as file:
            yield from (json.loads(line)["text"] for line in file if line.strip())
    else:
        yield Path(path).read_bytes().decode()

def read_batches(args, files, progress):
    """Yields batches of documents, from the one in which the next shard begins."""
    background = ThreadPool(1)
    document = progress.document
    for n in range(progress.file, len(files)):
        path = files[n]
        if progress.revision:
            path = download(args.source, progress.revision, path)
            # the next file comes meanwhile, and is waited for when its turn comes (the client locks
            # it); but where --shards are counted, nothing is downloaded that may not be needed
            if args.shards == sys.maxsize and n + 1 < len(files):
                background.apply_async(download, [args.source, progress.revision, files[n + 1]])

        try:
            documents = islice(read_documents(path), document, None)
            texts = list(islice(documents, batch_size))
            while texts:
                if not all(isinstance(text, str | None) for text in texts):
                    raise TypeError("a text is not a string")
                yield Batch(n, document, texts)
                document += len(texts)
                texts = list(islice(documents, batch_size))
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"{files[n]}, after {document} documents: {error!r:.200}")

        document = 0
        if progress.revision and not keep_downloads:
            os.remove(os.path.realpath(path))  # the path is a link into the hub's cache

def work(pipe):
    """A worker process: gets texts and sends their tokens, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    encode = tiktoken.get_encoding("gpt2").encode_to_numpy
    with contextlib.suppress(EOFError, OSError):
        while True:
            parts = [np.empty(0, np.uint16)]
            for text in pipe.recv():
                # JSON can spell half of a surrogate pair: it is U+FFFD, as in encode_ordinary
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                parts += [EOT], encode(text, disallowed_special=())
            pipe.send(np.concatenate(parts, dtype=np.uint16, casting="unsafe"))

def tokenize(batches, workers):
    """Yields (batch, its tokens) in the order of the batches, of which some are read ahead."""
    # Each worker has a pipe of its own, and a thread here that waits for its answer. In
    # multiprocessing.Pool all share one: a worker killed while it writes stops it forever.
    idle = queue.SimpleQueue()
    for _ in range(workers):
        pipe, worker_end = multiprocessing.Pipe()
        multiprocessing.Process(target=work, args=[worker_end], daemon=True).start()
        worker_end.close()  # so that recv fails, and doesn't wait, once the worker is gone
        idle.put(pipe)

    def ask(batch):
        pipe = idle.get()
        try:
            pipe.send([text for text in batch.texts if text is not None])
            tokens = pipe.recv()
        except (EOFError, OSError):
            raise OSError("a worker died; if memory is short, use fewer --workers") from None
        idle.put(pipe)
        return batch, tokens

    threads = ThreadPool(workers)
    waiting = deque()
    for batch in batches:
        waiting.append(threads.apply_async(ask, [batch]))
        if len(waiting) > 4 * workers:
            yield waiting.popleft().get()
    for answer in waiting:
        yield answer.get()

def cut(answers, progress, shard_size, bar):
    """Yields shards; at each, progress is where the next one begins in the source."""
    shard = np.empty(shard_size, np.uint16)
    filled = 0
    for batch, tokens in answers:
        progress.file = batch.file
        progress.document = batch.document
        while progress.skip < len(tokens):
            part = tokens[progress.skip :][: shard_size - filled]
            shard[filled :][: len(part)] = part
            filled += len(part)
            progress.skip += len(part)
            bar.update(len(part))
            if filled == shard_size:
                yield shard
                filled = 0
        progress.skip -= len(tokens)
        progress.nulls += batch.texts.count(None)

    progress.file = progress.files
    if filled:
        yield shard[:filled]

def write_shard(out, tokens, progress):
    """Writes a shard, then progress.json. After a kill in between, it is made again."""
    split = "train" if progress.shard else "val"
    path = Path(out, f"edufineweb_{split}_{progress.shard:06d}.npy")
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, tokens)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: {error}") from None

    progress.shard += 1
    progress.tokens += len(tokens)
    progress.documents += int(np.count_nonzero(tokens == EOT))
    save_progress(out, progress)

def save_progress(out, progress):
    temporary = Path(out, "progress.json.tmp")
    temporary.write_text(json.dumps(vars(progress)))
    os.replace(temporary, Path(out, "progress.json"))

def load_progress(out, made_of):
    """Returns how far a folder is; exits if its shards are made of something else."""
    counts = dict.fromkeys("shard file document skip tokens documents nulls".split(), 0)
    progress = argparse.Namespace(made_of=made_of, revision=None, files=None, **counts)
    shards = [*Path(out).glob("*.npy"), *Path(out).glob("*.bin")]
    path = Path(out, "progress.json")
    if shards:
        text = path.read_text() if path.exists() else '{"made_of": "unknown shards"}'
        progress = argparse.Namespace(**json.loads(text))
    if progress.made_of != made_of:
        sys.exit(f"--out={out} holds {progress.made_of}, not {made_of}; use another folder")
    if progress.shard > len(shards):
        sys.exit(f"--out={out} lacks some of its {progress.shard} shards; use another")
    return progress

def claim(out):
    """Makes the folder, and locks it until this process ends."""
    os.makedirs(out, exist_ok=True)
    lock = os.open(Path(out, "lock"), os.O_CREAT | os.O_RDWR)
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"--out={out}: another run is writing there; use another folder")
    except (ImportError, OSError):
        pass  # Windows has no such lock, and neither have some file systems

def fetch_pretokenized(args):
    """Downloads shards that others have made, the one for validation first."""
    progress = load_progress(args.out, {"source": args.pretokenized})
    progress.revision, files = list_files(args.pretokenized, "", ".bin", progress.revision)
    claim(args.out)
    save_progress(args.out, progress)
    val = [name for name in files if "val" in name]
    train = [name for name in files if "val" not in name]
    for name in (val + train)[: args.shards]:
        print(download(args.pretokenized, progress.revision, name, args.out))

def make_shards(args):
    """Reads the documents, tokenizes them in order, and writes the shards."""
    made_of = {"source": args.source, "subset": args.subset, "shard_size": args.shard_size}
    progress = load_progress(args.out, made_of)
    if progress.file == progress.files or progress.shard >= args.shards:
        print(f"nothing to do: {args.out} has its {progress.shard} shards")
        return

    suffixes = (".parquet", ".jsonl", ".txt")
    revision, files = list_files(args.source, args.subset, suffixes, progress.revision)
    if progress.files not in (None, len(files)):
        sys.exit(f"{args.source} had {progress.files} files, now {len(files)}; use another --out")
    try:
        tiktoken.get_encoding("gpt2")
    except Exception as error:
        sys.exit(f"set TIKTOKEN_CACHE_DIR to a folder with GPT-2's tokenizer: {error!r:.200}")
    claim(args.out)
    progress.revision = revision
    progress.files = len(files)
    save_progress(args.out, progress)

    batches = read_batches(args, files, progress)
    answers = tokenize(batches, args.workers)
    with tqdm(desc="made", unit=" tokens", unit_scale=True, initial=progress.tokens) as bar:
        for shard in cut(answers, progress, args.shard_size, bar):
            write_shard(args.out, shard, progress)
            if progress.shard == args.shards:
                break
    save_progress(args.out, progress)
    report = "{documents:,} documents, {nulls:,} null, {tokens:,} tokens, {shard} shards"
    print(report.format_map(vars(progress)))

def main():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.error = sys.exit  # one line, without the usage
    flag = parser.add_argument
    flag("--source", default="HuggingFaceFW/fineweb-edu", help="dataset on the hub, or folder")
    flag("--subset", default="sample/10BT", help="folder of a dataset (%(default)s)")
    flag("--out", default="edu_fineweb10B", help="folder for the shards (%(default)s)")
    flag("--shard_size", type=int, default=100_000_000, help="tokens in each (%(default)s)")
    flag("--shards", type=int, default=sys.maxsize, help="stop after so many")
    flag("--workers", type=int, default=cores, help="processes that tokenize (%(default)s)")
    flag("--pretokenized", nargs="?", const="kjj0/finewebedu10B-gpt2", help="take .bin")
    args = parser.parse_args()
    if min(args.shard_size, args.shards, args.workers) < 1:
        sys.exit("--shard_size, --shards and --workers have to be positive")
    if os.path.isdir(args.source):
        args.source = os.path.abspath(args.source)

    run = fetch_pretokenized if args.pretokenized else make_shards
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    except OSError as error:
        sys.exit(f"{error}; the same command goes on")

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
