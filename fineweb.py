"""Makes token shards for train_gpt2.py: from FineWeb-Edu on the hub, or from your own text.

python fineweb.py                               10B tokens: downloads 28.5 GB, writes 20 GB
python fineweb.py --shards=2                    one shard for validation, one to train on
python fineweb.py --pretokenized --shards=10    ready-made shards, in minutes
python fineweb.py --source=my_texts --out=my_shards --shard_size=100000

A document is a row of a .parquet file or a line of a .jsonl, .jsonl.gz or .json file, both with a
field "text", or what stands between <|endoftext|> marks in a .txt file. It becomes <|endoftext|>
and the tokens of its text. All documents, in order, are cut into shards; the first is for
validation. The shards depend on nothing else: not on the workers, and not on interruptions. If you
stop the script, run it again to continue.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from itertools import islice
from pathlib import Path

import huggingface_hub as hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from filelock import FileLock, Timeout
from tqdm import tqdm

SUBSET = "sample/10BT"  # of FineWeb-Edu: 10B tokens
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".txt")
MARK, EOT = "<|endoftext|>", 50256
batch_size = 256  # documents that a worker gets at a time, some 250,000 tokens
piece = 1_000_000  # characters: longer documents of a .txt file come in pieces
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends parent and workers at once

# -----------------------------------------------------------------------------
# the files of a source


def list_folder(folder, subset):
    """All files of a folder and the folders below, except hidden ones. Links are followed; a
    broken one is an error."""
    if subset is None:
        subset = SUBSET if os.path.isdir(f"{folder}/{SUBSET}") else ""
    top = os.path.join(os.path.abspath(folder), subset).rstrip("/")
    if not os.path.isdir(top):
        sys.exit(f"--subset={subset}: there is no such folder in {folder}")
    names, seen = [], set()
    for where, folders, files in os.walk(top, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if name[0] != "."]
        for name in files:
            path = os.path.join(where, name)
            if name[0] == ".":
                continue
            if not os.path.exists(path):
                sys.exit(f"{path}: the link is broken")
            if os.path.isfile(path):
                names.append(path)
    return names


def list_hub(source, subset):
    """All files below a folder of a dataset on the hub, except hidden ones, and its revision."""
    subset = SUBSET if subset is None else subset
    try:
        revision = hub.dataset_info(source).sha
        tree = hub.list_repo_tree(
            source, subset or None, recursive=True, revision=revision, repo_type="dataset"
        )
        names = [entry.path for entry in tree if isinstance(entry, hub.hf_api.RepoFile)]
        return [name for name in names if "/." not in f"/{name}"], revision
    except hub.errors.EntryNotFoundError:
        sys.exit(f"--subset={subset}: there is no such folder in {source}")
    except Exception as error:  # the client's errors have no common base
        sys.exit(f"{source}: no such folder, and from the hub: {one_line(error)}")


def list_files(source, subset, suffixes, out):
    """The files of a source that hold documents, in order; the other files, but for those in
    `out`; and the revision of a dataset on the hub."""
    revision = None
    if os.path.isdir(source):
        own = os.path.join(os.path.abspath(out), "")  # what this script writes
        names = [name for name in list_folder(source, subset) if not name.startswith(own)]
    else:
        names, revision = list_hub(source, subset)
    files = sorted(name for name in names if name.lower().endswith(suffixes))
    others = sorted(os.path.basename(name) for name in set(names).difference(files))
    if not files:
        sys.exit(f"{source}: there are no {', '.join(suffixes)} files")
    return files, others, revision


def one_line(error):
    return " ".join(str(error).split()) or repr(error)


def download(source, name, **how):
    """The local path of a file of the hub. A retry continues the download, if one can help."""
    for pause in (1, 5, 25, None):
        try:
            return hub.hf_hub_download(source, name, repo_type="dataset", **how)
        except Exception as error:
            cause = error.__cause__ or error  # the client hides some answers behind its advice
            status = getattr(getattr(cause, "response", None), "status_code", None)
            will_stay = status is not None and status < 500 and status not in (408, 429)
            if will_stay or pause is None or hub.constants.HF_HUB_OFFLINE:
                sys.exit(
                    f"{source}, {name}: {' '.join(map(one_line, dict.fromkeys([error, cause])))}"
                )
        time.sleep(pause)


# -----------------------------------------------------------------------------
# the documents of a file


def read_documents(path):
    """Yields (text, is_start) for each document: text is None for a null, and is_start is False
    for a later piece of a long document."""
    kind = path.lower()
    if kind.endswith(".txt"):
        yield from read_txt(path)
    elif kind.endswith(".parquet"):
        # without a buffer, pyarrow would read a row group of gigabytes at once
        file = pq.ParquetFile(path, buffer_size=2**20, page_checksum_verification=True)
        for rows in file.iter_batches(batch_size, columns=["text"]):
            for text in rows.column("text").to_pylist():
                yield as_text(text), True
    else:
        with gzip.open(path, "rb") if kind.endswith(".gz") else open(path, "rb") as file:
            for line in file:
                if line.strip():
                    fields = json.loads(line)
                    if "text" not in fields:
                        raise ValueError('there is no field "text"')
                    yield as_text(fields["text"]), True


def as_text(value):
    if isinstance(value, bytes):  # some write text as binary
        return value.decode()
    if value is not None and not isinstance(value, str):
        raise ValueError(f'"text" is {type(value).__name__}, not a string')
    return value


def read_txt(path):
    """Yields what stands between the marks. Line ends next to a mark are dropped with it."""
    rest, is_start, after_mark = "", True, False
    with open(path, encoding="utf-8", newline="") as file:
        while chunk := file.read(piece):
            *before_marks, rest = (rest + chunk).split(MARK)
            for text in before_marks:
                text = text.rstrip("\r\n")
                if is_start and after_mark:
                    text = text.lstrip("\r\n")
                if text:
                    yield text, is_start
                is_start = after_mark = True
            if is_start and after_mark:
                rest = rest.lstrip("\r\n")
            if len(rest) > piece:
                # the last characters may be line ends or half a mark
                text, rest = rest[:-1000], rest[-1000:]
                yield text, is_start
                is_start = False
    if rest:
        yield rest, is_start


# -----------------------------------------------------------------------------
# from documents to shards


def read_batches(source, files, revision, place):
    """Yields batches of documents, from a place on, each with the place where it begins: the
    file's number, the document's number in it, and how many nulls came before."""
    file, document, nulls = place["file"], place["document"], place["nulls"]
    for number in range(file, len(files)):
        documents = open_file(source, files[number], revision, document)
        while batch := list(islice(documents, batch_size)):
            yield {"file": number, "document": document, "nulls": nulls}, batch
            document += len(batch)
            nulls += batch.count((None, True))
        document = 0
    yield {"file": len(files), "document": 0, "nulls": nulls}, []  # the end


def open_file(source, name, revision, first):
    """Yields the documents of a file from the first on. A damaged download is made anew, once."""
    for again in (False, True):
        path = name
        if revision is not None:
            path = download(source, name, revision=revision, force_download=again)
        try:
            for document in islice(read_documents(path), first, None):
                yield document
                first += 1
            return
        except Exception as error:
            is_damaged = isinstance(error, (pa.ArrowException, OSError, EOFError))
            if again or revision is None or not is_damaged:
                sys.exit(f"{path}, document {first + 1}: {one_line(error)}")
            print(f"{path} is damaged: {one_line(error)}. Downloading it again")


def work(pipe):
    """A worker process: receives documents and sends their tokens until the parent is gone."""
    tokenizer = tiktoken.get_encoding("gpt2")
    with suppress(EOFError, OSError):
        while True:
            parts = [np.empty(0, np.uint16)]
            for text, is_start in pipe.recv():
                if not text.isascii():
                    # JSON can hold half of a surrogate pair; it becomes U+FFFD
                    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                parts += [[EOT]] if is_start else []
                parts += encode(tokenizer, text)
            pipe.send(np.concatenate(parts, dtype=np.uint16, casting="unsafe"))


def encode(tokenizer, text):
    try:
        return [tokenizer.encode_to_numpy(text, disallowed_special=())]
    except ValueError:  # it gives up on a million spaces in a row: cut the text
        pieces = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
        return [tokenizer.encode_to_numpy(each, disallowed_special=()) for each in pieces]


def tokenize(batches, workers):
    """Yields (place, tokens) of each batch, in order. The workers are processes, since threads
    share the interpreter's lock. Each has a pipe of its own. The workers of a pool share one, and
    after a kill -9 some of them would wait on it forever."""
    waiting = deque()
    try:
        for _ in range(workers):
            pipe, worker_end = multiprocessing.Pipe()
            multiprocessing.Process(target=work, args=[worker_end], daemon=True).start()
            worker_end.close()  # so that recv fails once the worker is gone
            pipe.send([])  # the first batch of each worker is empty
            waiting.append((None, pipe))
    except OSError as error:
        sys.exit(f"{workers} workers can't be started, use fewer --workers: {error}")
    try:
        for place, batch in batches:
            # the workers take turns. Receive first: if both ends sent, both would hang
            earlier, pipe = waiting.popleft()
            yield earlier, pipe.recv()
            pipe.send([document for document in batch if document[0] is not None])
            waiting.append((place, pipe))
        for place, pipe in waiting:
            yield place, pipe.recv()
    except (EOFError, OSError):
        sys.exit("a worker died; if memory is short, use fewer --workers; run it again to continue")


def cut(batches, skip, shard_size):
    """Joins the tokens of batches, except the first `skip`, and cuts them into shards. Yields
    each shard with the place where the next one begins: a batch's, and the tokens to skip."""
    shard = np.empty(shard_size, np.uint16)
    filled = 0
    for place, tokens in batches:
        at = min(skip, len(tokens))
        skip -= at
        while at < len(tokens):
            part = tokens[at : at + shard_size - filled]
            shard[filled : filled + len(part)] = part
            filled += len(part)
            at += len(part)
            if filled == shard_size:
                yield shard, {**place, "skip": at}
                filled = 0
    yield shard[:filled], {**place, "skip": 0}  # the last one may be short, or empty


def make_shards(args, progress, start):
    """Yields (tokens, place of the next shard) for the shards from a place on."""
    batches = read_batches(args.source, progress["files"], progress["revision"], start)
    batches = watch(tokenize(batches, args.workers), progress["files"])
    return cut(batches, start["skip"], args.shard_size)


def watch(batches, files):
    """Shows the tokens and the current file, on a terminal only."""
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill would leave behind
    with tqdm(unit=" tokens", unit_scale=True, disable=None, leave=False) as bar:
        for place, tokens in batches:
            if place is not None and place["file"] < len(files):
                bar.set_description(os.path.basename(files[place["file"]]), refresh=False)
            bar.update(len(tokens))
            yield place, tokens


# -----------------------------------------------------------------------------
# the folder of shards


def shard_path(out, number):
    return out / f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"


def save(path, content):
    """Writes a shard or the progress. The file gets its name only when it is on the disk."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            if path.suffix == ".npy":
                np.save(file, content)
            else:
                file.write(json.dumps(content).encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        sys.exit(f"{path}: is the disk full? {error}; run it again to continue")


def begin(args):
    """The progress in --out, or a new one. Its list of files stays, so that new files do not shift
    the others. Exits if the folder holds anything else."""
    suffixes = (".bin",) if args.pretokenized else SUFFIXES
    made_of = f"{args.source}, {args.subset}, {args.shard_size} tokens a shard"
    path = args.out / "progress.json"
    if path.exists():
        progress = json.loads(path.read_text())
        if progress["made_of"] != made_of or "shards" not in progress:
            sys.exit(f"--out={args.out} is for {progress['made_of']}; use another folder")
        return progress
    if any(args.out.glob("*.npy")) or any(args.out.glob("*.bin")):
        sys.exit(f"--out={args.out} holds unknown shards; use another folder")
    files, others, revision = list_files(args.source, args.subset, suffixes, args.out)
    if others:
        more = ", ..." if len(others) > 5 else ""
        print(f"ignoring {len(others)} other files: {', '.join(others[:5])}{more}")
    start = dict(file=0, document=0, nulls=0, skip=0)
    return dict(
        made_of=made_of,
        files=files,
        revision=revision,
        shards=[],
        next=start,
        documents=0,
        done=False,
    )


def repair(args, progress):
    """Makes finished shards again that are no longer there, or have another size."""
    for number, shard in enumerate(progress["shards"]):
        path = shard_path(args.out, number)
        if path.exists() and path.stat().st_size == shard["bytes"]:
            continue
        print(f"{path} is missing or damaged: making it again", flush=True)
        tokens, _ = next(make_shards(args, progress, shard["start"]))
        if len(tokens) != shard["tokens"]:
            sys.exit(
                f"{args.source} has changed: {path} had {shard['tokens']:,} tokens, now "
                f"{len(tokens):,}; use another --out"
            )
        save(path, tokens)


def make(args, progress):
    """Makes the shards that are left, and counts each in the progress once it is on the disk."""
    shards = make_shards(args, progress, progress["next"])
    while len(progress["shards"]) < args.shards and not progress["done"]:
        tokens, following = next(shards)
        if len(tokens) > 0:
            # after a kill between the two saves below, the shard is made again
            path = shard_path(args.out, len(progress["shards"]))
            save(path, tokens)
            progress["shards"].append(
                dict(start=progress["next"], tokens=len(tokens), bytes=path.stat().st_size)
            )
            progress["documents"] += int(np.count_nonzero(tokens == EOT))
            tqdm.write(f"{path}: {len(tokens):,} tokens")
        progress["next"] = following
        progress["done"] = len(tokens) < args.shard_size
        save(args.out / "progress.json", progress)


def n_cores():
    """How many cores this process may use, up to 16: one reader can't feed more workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, 16)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.error = sys.exit  # one line, without the usage
    parser.add_argument("--source", default="HuggingFaceFW/fineweb-edu", help="hub or folder")
    parser.add_argument("--subset", help=f"folder in the source (default: {SUBSET}, if it exists)")
    parser.add_argument("--out", type=Path, help="folder for the shards (of a hub: edu_fineweb10B)")
    parser.add_argument("--shard_size", type=int, default=100_000_000, help="in tokens")
    parser.add_argument("--shards", type=int, default=sys.maxsize, help="how many to make")
    parser.add_argument("--workers", type=int, default=n_cores(), help="processes that tokenize")
    parser.add_argument(
        "--pretokenized", nargs="?", const="kjj0/finewebedu10B-gpt2", help="download ready shards"
    )
    args = parser.parse_args()
    if min(args.shard_size, args.shards, args.workers) < 1:
        sys.exit("--shard_size, --shards and --workers have to be positive")
    if args.pretokenized:
        if os.path.isdir(args.pretokenized):
            sys.exit(f"--pretokenized={args.pretokenized} is a folder: train on it as it is")
        args.source, args.subset = args.pretokenized, ""
    if args.out is None and os.path.isdir(args.source):
        sys.exit(f"--out: choose a folder for the shards of {args.source}")
    args.out = args.out or Path("edu_fineweb10B")

    progress = begin(args)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(args.out / "lock").acquire(timeout=0)  # until this process ends
    except Timeout:
        sys.exit(f"--out={args.out}: another run is writing there; use another folder")
    except OSError as error:  # some network drives have no locks
        print(f"warning: --out={args.out} can't be locked: {error}")
    if (args.out / "progress.json").exists():
        progress = begin(args)  # once more: another run may have gone on until now
    save(args.out / "progress.json", progress)

    if args.pretokenized:
        files = progress["files"][-1:] + progress["files"][:-1]  # the one for validation is first
        for name in files[: args.shards]:
            print(download(args.source, name, revision=progress["revision"], local_dir=args.out))
        sys.exit()

    try:
        tiktoken.get_encoding("gpt2")
    except Exception as error:
        sys.exit(f"set TIKTOKEN_CACHE_DIR to a folder with GPT-2's tokenizer: {error!r:.200}")
    repair(args, progress)
    make(args, progress)
    if not progress["shards"]:
        sys.exit(f"{args.source}: there are no documents in its {len(progress['files'])} files")

    if progress["done"] and os.path.isdir(args.source):
        files, _, _ = list_files(args.source, args.subset, SUFFIXES, args.out)
        new = [name for name in files if name not in progress["files"]]
        if new:
            print(f"{new[0]} and so on: {len(new)} new files are not part of these shards")
    tokens = sum(shard["tokens"] for shard in progress["shards"])
    print(
        f"done: {progress['documents']:,} documents, {progress['next']['nulls']:,} null, "
        f"{tokens:,} tokens, {len(progress['shards'])} shards"
    )
    if progress["done"] and len(progress["shards"]) == 1:
        print("this one is for validation; for shards to train on, choose a smaller --shard_size")
