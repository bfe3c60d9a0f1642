"""Makes token shards for train_gpt2.py: from FineWeb-Edu on the hub, or from your own text.

python fineweb.py                               10B tokens: downloads 28.5 GB, writes 20 GB
python fineweb.py --shards=2                    one shard for validation, one to train on
python fineweb.py --pretokenized --shards=10    ready-made shards, in minutes
python fineweb.py --source=my_texts --out=my_shards --shard_size=100000

A document is a row of a .parquet file, a line of a .jsonl file (both with a field "text"), or a
.txt file. It becomes <|endoftext|> and the tokens of its text. All documents, in order, are cut
into shards; the first is for validation. If you stop the script, run it again to continue.
"""
import argparse
import json
import multiprocessing
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from itertools import islice
from pathlib import Path

import huggingface_hub as hub
import numpy as np
import pyarrow.parquet as pq
import tiktoken
from filelock import FileLock, Timeout

batch_size = 256  # documents that a worker gets at a time, some 250,000 tokens
EOT = 50256       # <|endoftext|> in GPT-2's vocabulary
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends parent and workers at once

def list_files(source, subset, suffixes):
    """Returns the files of a folder or of a dataset on the hub, with its revision."""
    revision = None
    if Path(source).is_dir():
        names = [str(path) for path in Path(source).absolute().rglob("*") if path.is_file()]
    else:
        try:
            revision = hub.dataset_info(source).sha
            tree = hub.list_repo_tree(source, subset, revision=revision, repo_type="dataset")
            names = [entry.path for entry in tree]
        except Exception as error:  # the client's errors have no common base
            sys.exit(f"{source}: no such folder, and from the hub: {error!r:.200}")
    files = sorted(name for name in names if name.endswith(suffixes))
    if not files:
        sys.exit(f"{source}: there are no {', '.join(suffixes)} files")
    return files, revision

def download(source, name, **where):
    """Returns the local path of a file of the hub. A retry resumes the download."""
    for pause in (1, 5, 25):
        with suppress(Exception):
            return hub.hf_hub_download(source, name, repo_type="dataset", **where)
        time.sleep(pause)
    return hub.hf_hub_download(source, name, repo_type="dataset", **where)

def read_documents(path):
    """Yields the texts of a file; a null is None."""
    if path.endswith(".parquet"):
        # without a buffer, pyarrow would read a row group of gigabytes at once
        file = pq.ParquetFile(path, buffer_size=2**20, page_checksum_verification=True)
        for rows in file.iter_batches(batch_size, columns=["text"]):
            yield from rows.column("text").to_pylist()
    elif path.endswith(".jsonl"):
        with open(path, "rb") as file:
            yield from (json.loads(line)["text"] for line in file if line.strip())
    else:
        yield Path(path).read_bytes().decode()

def read_batches(source, progress):
    """Yields batches of texts, each with its place: where it begins in the source."""
    revision = progress["revision"]
    place = {key: progress[key] for key in ("file", "document", "nulls")}

    for name in progress["files"][place["file"] :]:
        try:
            path = download(source, name, revision=revision) if revision else name
            documents = islice(read_documents(path), place["document"], None)
            texts = list(islice(documents, batch_size))
            while texts:
                yield place.copy(), texts
                place["document"] += len(texts)
                place["nulls"] += texts.count(None)
                texts = list(islice(documents, batch_size))
        except Exception as error:
            sys.exit(f"{name}, after {place['document']} documents: {error!r:.200}")
        place["file"] += 1
        place["document"] = 0

    yield place, []  # the end

def work(pipe):
    """A worker process: receives texts and sends their tokens until the parent is gone."""
    encode = tiktoken.get_encoding("gpt2").encode_to_numpy
    with suppress(EOFError, OSError):
        while True:
            parts = [np.empty(0, np.uint16)]
            for text in pipe.recv():
                # JSON can hold half of a surrogate pair; it becomes U+FFFD
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                parts += [EOT], encode(text, disallowed_special=())
            pipe.send(np.concatenate(parts, dtype=np.uint16, casting="unsafe"))

def tokenize(batches, workers):
    """Yields (place, tokens) of each batch, in order. Each worker has a pipe of its own."""
    waiting = deque()
    for _ in range(workers):
        pipe, worker_end = multiprocessing.Pipe()
        multiprocessing.Process(target=work, args=[worker_end], daemon=True).start()
        worker_end.close()  # so that recv fails once the worker is gone
        pipe.send([])  # the first batch of each worker is empty
        waiting.append(({}, pipe))
    try:
        for place, texts in batches:
            # the workers take turns. Receive first: if both ends sent, both would hang
            earlier, pipe = waiting.popleft()
            yield earlier, pipe.recv()
            pipe.send([text for text in texts if text is not None])
            waiting.append((place, pipe))
        for place, pipe in waiting:
            yield place, pipe.recv()
    except (EOFError, OSError):
        sys.exit("a worker died; if memory is short, use fewer --workers; run it again to continue")

def cut(answers, progress, shard_size):
    """Yields shards. `progress` then says where in the source the next one begins."""
    shard = np.empty(shard_size, np.uint16)
    filled = 0
    for place, tokens in answers:
        progress.update(place)
        while progress["skip"] < len(tokens):
            part = tokens[progress["skip"] :][: shard_size - filled]
            shard[filled :][: len(part)] = part
            filled += len(part)
            progress["skip"] += len(part)
            if filled == shard_size:
                yield shard
                filled = 0
        progress["skip"] -= len(tokens)

    if filled:
        yield shard[:filled]

def save(path, content):
    """Writes a shard or the progress. The file gets its name only when it is complete."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            if path.suffix == ".npy":
                np.save(file, content)
            else:
                file.write(json.dumps(content).encode())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        sys.exit(f"{path}: {error}; run it again to continue")

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.error = sys.exit  # one line, without the usage
    parser.add_argument("--source", default="HuggingFaceFW/fineweb-edu", help="hub or folder")
    parser.add_argument("--subset", default="sample/10BT", help="folder of the dataset")
    parser.add_argument("--out", type=Path, default="edu_fineweb10B", help="for the shards")
    parser.add_argument("--shard_size", type=int, default=100_000_000, help="in tokens")
    parser.add_argument("--shards", type=int, default=sys.maxsize, help="how many to make")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--pretokenized", nargs="?", const="kjj0/finewebedu10B-gpt2")
    args = parser.parse_args()
    if min(args.shard_size, args.shards, args.workers) < 1:
        sys.exit("--shard_size, --shards and --workers have to be positive")
    if args.pretokenized:
        args.source, args.subset = args.pretokenized, ""

    # the list of files is saved, so that new files do not shift the others
    made_of = f"{args.source}, {args.subset}, {args.shard_size} tokens a shard"
    if (args.out / "progress.json").exists():
        progress = json.loads((args.out / "progress.json").read_text())
        if progress["made_of"] != made_of:
            sys.exit(f"--out={args.out} is for {progress['made_of']}; use another folder")
    elif any(args.out.glob("*.npy")) or any(args.out.glob("*.bin")):
        sys.exit(f"--out={args.out} holds unknown shards; use another folder")
    else:
        progress = dict.fromkeys("shard file document skip tokens documents nulls".split(), 0)
        progress["made_of"] = made_of
        suffixes = (".bin",) if args.pretokenized else (".parquet", ".jsonl", ".txt")
        progress["files"], progress["revision"] = list_files(args.source, args.subset, suffixes)

    args.out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(args.out / "lock").acquire(timeout=0)  # until this process ends
    except Timeout:
        sys.exit(f"--out={args.out}: another run is writing there; use another folder")
    save(args.out / "progress.json", progress)

    if args.pretokenized:
        for name in progress["files"][-1:] + progress["files"][:-1][: args.shards - 1]:  # val first
            print(download(args.source, name, revision=progress["revision"], local_dir=args.out))
        sys.exit()

    try:
        tiktoken.get_encoding("gpt2")
    except Exception as error:
        sys.exit(f"set TIKTOKEN_CACHE_DIR to a folder with GPT-2's tokenizer: {error!r:.200}")
    batches = read_batches(args.source, progress)
    shards = cut(tokenize(batches, args.workers), progress, args.shard_size)
    for tokens in islice(shards, max(0, args.shards - progress["shard"])):
        # after a kill between the two saves below, the shard is made again
        number = progress["shard"]
        path = args.out / f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"
        save(path, tokens)
        progress["shard"] += 1
        progress["tokens"] += len(tokens)
        progress["documents"] += int(np.count_nonzero(tokens == EOT))
        save(args.out / "progress.json", progress)
        print(f"{path}: {len(tokens):,} tokens", flush=True)

    report = "done: {documents:,} documents, {nulls:,} null, {tokens:,} tokens, {shard} shards"
    print(report.format_map(progress))
