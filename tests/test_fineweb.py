"""fineweb.py, run as a person would: real parquet, the real tokenizer, the hub's real client."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, finish, series, train, variant, write_bin
from hub import COMMIT, Hub

REPO = "HuggingFaceFW/fineweb-edu"
SIZE = 100_000  # tokens in a shard


def start(*flags, env=None, script=ROOT / "fineweb.py", **options):
    """Ctrl-C has its default effect, even if the tests run in the background and ignore it."""
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **(env or {})},
        **options,
    )


def make(*flags, **options):
    """Runs the script, which must succeed; returns what it prints."""
    result = finish(start(*flags, **options))
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(*flags, **options):
    """Runs the script, which must fail with exit status 1 and one line, which it returns."""
    result = finish(start(*flags, **options))
    assert result.returncode == 1, result.stdout + result.stderr
    return last_line(result.stderr)


def last_line(stderr):
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip(" \x1b[A")]
    assert len(lines) == 1, stderr
    return lines[0]


def shards_of(out):
    """The shards in the order of their numbers."""
    paths = sorted(out.glob("edufineweb_*.npy"), key=lambda path: path.name[-10:])
    names = [f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy" for i in range(len(paths))]
    assert [path.name for path in paths] == names
    return paths


def assert_tokens(out, tokens, size=SIZE):
    """The shards hold exactly these tokens; all but the last have `size` tokens."""
    shards = [np.load(path) for path in shards_of(out)]
    assert all(shard.dtype == np.uint16 for shard in shards)
    assert [len(shard) for shard in shards[:-1]] == [size] * (len(shards) - 1)
    assert 0 < len(shards[-1]) <= size
    assert np.array_equal(np.concatenate(shards), tokens)
    assert not list(out.glob("*.tmp"))


def reference(texts):
    """The expected tokens, in three lines of code."""
    import tiktoken

    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    tokens = [[50256] + encode(text) for text in texts if text is not None]
    return np.concatenate(tokens).astype(np.uint16)


def write_parquet(path, texts, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = list(range(len(texts)))
    pq.write_table(pa.table({"id": ids, "text": texts, "url": ["x"] * len(ids)}), path, **options)


@pytest.fixture(scope="module")
def texts():
    """3,000 documents of mixed length, some of them awkward."""
    play, chance = (ROOT / "input.txt").read_text(), random.Random(0)
    texts = []
    for _ in range(3000):
        start = chance.randrange(len(play) - 3000)
        texts.append(play[start : start + chance.randrange(1, 3000)])
    awkward = ["", None, play[:400_000], "a\0b\0\0", "😀👩‍👩‍👧‍👦" * 50, "a" * 20_000, "\ufeffBOM"]
    awkward += ["before <|endoftext|> after", "<|endoftext|>", None, " " * 5000, "\r\n\r\n"]
    awkward += ["漢字É" * 500]
    for i, text in enumerate(awkward):
        texts[200 * i] = text
    return texts + [None, "the end"]


@pytest.fixture(scope="module")
def tokens(texts):
    return reference(texts)


@pytest.fixture(scope="module")
def source(texts, tmp_path_factory):
    """These texts in two files, one with many row groups and one with a single one."""
    folder = tmp_path_factory.mktemp("source")
    write_parquet(folder / "000.parquet", texts[:1000], row_group_size=137)
    write_parquet(folder / "001.parquet", texts[1000:], compression="zstd")
    return folder


@pytest.fixture(scope="module")
def long(source, tokens, tmp_path_factory):
    """A source that takes seconds (the files three times over), and its tokens."""
    folder = tmp_path_factory.mktemp("long")
    for i in range(3):
        for path in source.iterdir():
            os.link(path, folder / f"{i}-{path.name}")
    return folder, np.tile(tokens, 3)


@pytest.fixture
def hub(source, tmp_path):
    """The same source on the hub."""
    root = tmp_path / "hub"
    (root / "sample").mkdir(parents=True)
    (root / "sample" / "10BT").symlink_to(source)
    (root / "README.md").write_text("not a parquet file")
    with Hub(root, REPO) as server:
        yield server


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_tokens_equal_a_reference(source, texts, tokens, tmp_path, workers):
    out = tmp_path / "out"
    flags = f"--source={source}", f"--out={out}", f"--shard_size={SIZE}"
    said = make(*flags, f"--workers={workers}")
    assert_tokens(out, tokens)
    n = sum(text is not None for text in texts)
    assert f"{n:,} documents, {len(texts) - n} null, " in said
    assert f"{len(tokens):,} tokens, {len(shards_of(out))} shards" in said


@pytest.mark.parametrize("size", [5, 11, 22, 100])
def test_documents_on_the_edge_of_a_shard(tmp_path, size):
    """The documents have 1, 11 and 10 tokens, 22 in all. Some are longer than a shard of 5."""
    texts = ["", " a" * 10, " b" * 9]
    write_parquet(tmp_path / "source" / "a.parquet", texts)
    flags = f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'out'}", f"--shard_size={size}"
    said = make(*flags)
    report = said[said.index("done: ") :]
    assert report.startswith("done: 3 documents, 0 null, 22 tokens, ")
    assert_tokens(tmp_path / "out", reference(texts), size)
    assert make(*flags) == report  # and nothing else: no shard is made again


def test_long_runs_do_not_hang(tmp_path):
    texts = ["a" * 1_000_000, "\n" * 1_000_000, "😀" * 1_000_000]
    write_parquet(tmp_path / "source" / "a.parquet", texts)
    make(f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'out'}")
    assert_tokens(tmp_path / "out", reference(texts), 100_000_000)


def test_a_folder_of_own_text(tmp_path):
    """A line of .jsonl is a document, and so is a .txt file; one has half a surrogate pair."""
    plays = ["a\r\nb", "ü\0"]
    folder = tmp_path / "source"
    (folder / "deeper").mkdir(parents=True)
    lines = ["one", "", None, "half \ud83d of a pair", "a pair \ud83d\ude00"] * 200
    records = [json.dumps({"id": 1, "text": line}) for line in lines]
    (folder / "deeper" / "a.jsonl").write_text("\n".join([*records, "", ""]))
    for i, play in enumerate(plays):
        (folder / f"{i}.txt").write_bytes(play.encode())
    (folder / "notes.md").write_text("not a document")
    (folder / ".#0.txt").symlink_to("an editor's lock")
    os.mkfifo(folder / "fifo.txt")
    for shards in ("--shards=2", "--shards=1000"):  # --out may be inside the source
        make(f"--source={folder}", f"--out={folder / 'out'}", "--shard_size=1000", shards)
    assert_tokens(folder / "out", reference([*plays, *lines]), 1000)


def workers_of(process):
    """The pids of the workers, which are started by spawn."""
    ps = subprocess.run(["ps", "-Aww", "-o", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in ps.stdout.splitlines()]
    return [int(row[0]) for row in rows if row[1] == str(process.pid) and "spawn_main" in row[2]]


def state(pid):
    """The state that ps shows: R, S, ...; Z for a zombie; "" if there is no such process."""
    ps = ["ps", "-o", "stat=", "-p", str(pid)]
    return subprocess.run(ps, capture_output=True, text=True).stdout[:1]


def assert_gone(pids):
    deadline = time.monotonic() + 10
    while any(state(pid) not in ("", "Z") for pid in pids):
        assert time.monotonic() < deadline, "workers are left behind"
        time.sleep(0.05)


def wait_for_shards(process, out, n):
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.npy"))) < n:
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.002)


def n_counted(out):
    """How many shards the progress counts."""
    return len(json.loads((out / "progress.json").read_text())["shards"])


def times(out):
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}


@pytest.mark.parametrize("seed", range(2))
def test_shards_after_kill_9_are_the_same(long, tmp_path, seed):
    """Killed twice at random moments, it leaves no worker behind, and makes no shard again that the
    progress counts. (A shard that was saved but not yet counted is for the next test.)"""
    source, tokens = long
    flags = f"--source={source}", f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}"
    chance, kept = random.Random(seed), {}
    for n in sorted(chance.sample(range(1, 25), 2)):
        process = start(*flags, "--workers=2")
        wait_for_shards(process, tmp_path / "out", max(n, len(kept) + 2))
        workers = workers_of(process)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()  # don't wait for its output: a worker left behind would keep it open
        assert workers
        assert_gone(workers)
        now = times(tmp_path / "out")
        assert now.items() >= kept.items()
        assert {len(np.load(path)) for path in shards_of(tmp_path / "out")} == {SIZE}
        counted = n_counted(tmp_path / "out")
        assert len(now) - 1 <= counted <= len(now)
        kept = {path.name: now[path.name] for path in shards_of(tmp_path / "out")[:counted]}
    make(*flags)
    assert_tokens(tmp_path / "out", tokens)
    assert times(tmp_path / "out").items() >= kept.items()


@pytest.mark.parametrize("shard", [0, 3])
def test_killed_between_a_shard_and_its_progress(source, tokens, tmp_path, shard):
    """The shard is made again with the same bytes, even by other workers with other batches."""
    flags = f"--source={source}", f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}"
    line = '            progress["shards"].append(\n'
    kill = f'            if path.stem[-1] == "{shard}":\n                signal.raise_signal(9)\n'
    process = start(
        *flags, script=variant(tmp_path / "killed.py", "fineweb.py", (line, kill + line))
    )
    assert finish(process).returncode == -signal.SIGKILL
    assert_tokens(tmp_path / "out", tokens[: (shard + 1) * SIZE])
    assert n_counted(tmp_path / "out") == shard
    script = variant(tmp_path / "other.py", "fineweb.py", ("batch_size = 256", "batch_size = 99"))
    make(*flags, "--workers=3", script=script)
    assert_tokens(tmp_path / "out", tokens)


@pytest.mark.parametrize(
    "whole, half, which",
    [
        ("np.save(file, content)", "np.save(file, content[:2])", 'path.stem[-1] == "2"'),
        (
            "file.write(json.dumps(content).encode())",
            "file.write(json.dumps(content).encode()[:9])",
            'len(content["shards"]) == 2',
        ),
    ],
)
def test_killed_in_the_middle_of_a_file(tmp_path, whole, half, which):
    """Of the third shard, or of the progress after the second: no half file has a name."""
    texts = ["", " a" * 10, " b" * 9]
    write_parquet(tmp_path / "source" / "a.parquet", texts)
    flags = f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'out'}", "--shard_size=5"
    kill = f"(({half}, file.flush(), signal.raise_signal(9)) if {which} else {whole})"
    process = start(*flags, script=variant(tmp_path / "killed.py", "fineweb.py", (whole, kill)))
    assert finish(process).returncode == -signal.SIGKILL
    assert [len(np.load(path)) for path in shards_of(tmp_path / "out")] == [5, 5]
    make(*flags)
    assert_tokens(tmp_path / "out", reference(texts), 5)


def test_shards_and_a_second_run(source, tokens, tmp_path):
    flags = f"--source={source}", f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}"
    assert f"{3 * SIZE:,} tokens, 3 shards" in make(*flags, "--shards=3")
    assert_tokens(tmp_path / "out", tokens[: 3 * SIZE])
    first = times(tmp_path / "out")
    for shards in (3, 2):
        said = make(*flags, f"--shards={shards}")
        assert said.count("\n") == 1 and said.endswith("3 shards\n")
    make(*flags)
    assert_tokens(tmp_path / "out", tokens)
    done = times(tmp_path / "out")
    assert done.items() > first.items()
    said = make(*flags)
    assert said.count("\n") == 1 and said.endswith(f"{len(tokens):,} tokens, {len(done)} shards\n")
    assert times(tmp_path / "out") == done


@pytest.mark.parametrize("sending", [False, True])
def test_a_worker_is_killed(long, tmp_path, sending):
    """If `sending`, it is killed while it sends: the stopped parent receives nothing."""
    source, tokens = long
    flags = f"--source={source}", f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}"
    process = start(*flags, "--workers=2")
    wait_for_shards(process, tmp_path / "out", 1)
    worker = workers_of(process)[0]
    if sending:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1)
    os.kill(worker, signal.SIGKILL)
    os.kill(process.pid, signal.SIGCONT)
    result = finish(process, timeout=10)
    assert result.returncode == 1 and "--workers" in last_line(result.stderr)
    make(*flags)
    assert_tokens(tmp_path / "out", tokens)


def test_ctrl_c(long, tmp_path):
    """A terminal sends it to the parent and to its workers."""
    source, tokens = long
    flags = f"--source={source}", f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}"
    process = start(*flags)
    wait_for_shards(process, tmp_path / "out", 1)
    workers = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)
    result = finish(process, timeout=10)
    assert result.returncode == -signal.SIGINT and result.stderr == ""
    assert_gone(workers)
    make(*flags)
    assert_tokens(tmp_path / "out", tokens)


def test_full_disk(source, tokens, tmp_path):
    """No file may grow beyond half a shard."""
    flags = f"--source={source}", f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}"
    make(*flags, "--shards=2")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, SIZE))  # noqa: E731
    assert "edufineweb_train_000002.npy" in fail(*flags, preexec_fn=limit)
    assert_tokens(tmp_path / "out", tokens[: 2 * SIZE])
    make(*flags)
    assert_tokens(tmp_path / "out", tokens)


def test_shards_of_two_sources_are_never_mixed(source, tokens, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "no text").mkdir()
    (tmp_path / "no text" / "a.jsonl").write_text("{}")
    fail(f"--source={tmp_path / 'no text'}", f"--out={tmp_path / 'none'}")
    make(f"--source={source}", f"--out={out}", f"--shard_size={SIZE}", "--shards=2")
    write_parquet(tmp_path / "other" / "000.parquet", ["other"])
    size = f"--shard_size={SIZE}"
    assert str(SIZE) in fail(f"--source={source}", f"--out={out}", f"--shard_size={SIZE + 1}")
    assert str(source) in fail(f"--source={tmp_path / 'other'}", f"--out={out}", size)
    assert str(source) in fail("--pretokenized", f"--out={out}")
    # a new file would shift all the files after it
    (source / "000-new.txt").write_text("new")
    make(f"--source={source}", f"--out={out}", f"--shard_size={SIZE}", "--shards=4")
    (source / "000-new.txt").unlink()
    (out / "progress.json").unlink()
    assert "unknown shards" in fail(f"--source={source}", f"--out={out}", size)
    assert_tokens(out, tokens[: 4 * SIZE])


def test_two_at_once_in_one_folder(long, tmp_path):
    source, tokens = long
    flags = f"--source={source}", f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}"
    process = start(*flags)
    wait_for_shards(process, tmp_path / "out", 1)
    os.kill(process.pid, signal.SIGSTOP)
    assert "another run" in fail(*flags)
    os.kill(process.pid, signal.SIGCONT)
    assert finish(process).returncode == 0
    assert_tokens(tmp_path / "out", tokens)


def test_a_file_system_without_locks(tmp_path):
    write_parquet(tmp_path / "source" / "a.parquet", ["one"])
    (tmp_path / "fcntl.py").write_text(
        "LOCK_EX = LOCK_NB = LOCK_UN = 0\n"
        "def flock(*_):\n    raise OSError(38, 'Function not implemented')\n"
    )
    flags = f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'out'}"
    make(*flags, env={"PYTHONPATH": str(tmp_path)})
    assert_tokens(tmp_path / "out", reference(["one"]), 100_000_000)


def test_damaged_files(source, texts, tmp_path):
    """A file that is cut off or damaged is named; the documents before it are in shards."""
    folder, out = tmp_path / "source", tmp_path / "out"
    write_parquet(folder / "000.parquet", texts)
    whole = (source / "001.parquet").read_bytes()
    middle = len(whole) // 2
    damages = [whole[:-100], whole[:middle] + bytes(100) + whole[middle + 100 :], b""]
    flags = f"--source={folder}", f"--out={out}", "--shard_size=20000", "--workers=1"
    before = reference(texts[: 256 * (len(texts) // 256 - 5)])  # the last may be on their way
    for damage in damages:
        (folder / "001.parquet").write_bytes(damage)
        assert str(folder / "001.parquet") in fail(*flags)
        assert len(shards_of(out)) >= len(before) // 20000
    (folder / "001.parquet").write_bytes(whole)  # once it is repaired, the rest follows
    make(*flags)
    assert_tokens(out, reference(texts + texts[1000:]), 20000)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.md", b"no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n'),
        ("a.jsonl", b'{"txt": "a"}\n'),
        ("a.jsonl", b"[1, 2]\n"),
        ("a.txt", "café".encode("latin-1")),
    ],
)
def test_bad_source_files_are_named(tmp_path, name, content):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_bytes(content)
    message = fail(f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'out'}")
    assert str(tmp_path / "source") in message
    assert b"txt" not in content or 'a.jsonl, document 1: there is no field "text"' in message
    assert name in message or "no .parquet, .jsonl, .jsonl.gz, .json, .txt" in message


def test_a_bad_line_is_looked_for_where_the_message_says(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 299 + '{"text": "b')
    message = fail(f"--source={tmp_path}", f"--out={tmp_path / 'out'}")
    assert "a.jsonl, document 300: " in message


@pytest.mark.parametrize(
    "column, values, message",
    [
        ("body", ["a"], "text"),
        ("text", [1, 2], 'document 1: "text" is int, not a string'),
        ("text", [["a"], ["b"]], 'document 1: "text" is list, not a string'),
        ("text", [b"a", None, b"\xff"], "document 3: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_parquet_without_text(tmp_path, column, values, message):
    """One line with the file and the document."""
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table({column: values}), tmp_path / "source" / "a.parquet")
    line = fail(f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'out'}")
    assert "a.parquet, document " in line and message in line


@pytest.mark.parametrize("value", ["5", '["a"]', '{"a": 1}'])
def test_json_whose_text_is_no_string(tmp_path, value):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": %s}\n' % value)
    line = fail(f"--source={tmp_path}", f"--out={tmp_path / 'out'}")
    assert 'a.jsonl, document 2: "text" is' in line and "worker" not in line


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sorce=x"], "--sorce=x"),
        (["--workers=many"], "--workers"),
        (["--shard_size=1e8"], "--shard_size"),
        (["--shards=0"], "positive"),
        (["--workers=0"], "positive"),
        (["--source=no/such/folder"], "no/such/folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, message):
    assert message in fail(f"--out={tmp_path / 'out'}", *flags)
    assert not (tmp_path / "out").exists()


def test_help():
    said = make("--help")
    for flag in "source subset shard_size pretokenized out shards workers".split():
        assert f"--{flag}" in said


def test_no_tokenizer(hub, tmp_path):
    """It says so before anything is downloaded."""
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "none"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    message = fail(f"--out={tmp_path / 'out'}", env={**hub.env(tmp_path / "home"), **env})
    assert "TIKTOKEN_CACHE_DIR" in message
    assert hub.fetched() == [] and not list((tmp_path / "out").glob("*.npy"))


@pytest.mark.parametrize("reset", [False, True])
def test_a_dataset_on_the_hub(hub, tokens, tmp_path, reset):
    """The connection breaks off in the middle of a file."""
    hub.drops, hub.reset = {"sample/10BT/001.parquet": [300_000]}, reset
    flags = f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}"
    make(*flags, env=hub.env(tmp_path / "home"))
    assert_tokens(tmp_path / "out", tokens)
    assert hub.drops == {"sample/10BT/001.parquet": []}
    assert hub.fetched() == ["sample/10BT/000.parquet", "sample/10BT/001.parquet"]
    assert COMMIT in (tmp_path / "out" / "progress.json").read_text()
    hub.shutdown()  # complete shards need no network
    assert make(*flags, env=hub.env(tmp_path / "home")).startswith("done: 2,999 documents, ")


def test_downloads_what_is_needed(texts, tokens, tmp_path):
    for i, content in enumerate([texts, texts[:10]]):
        write_parquet(tmp_path / "hub" / "sample" / "10BT" / f"{i}.parquet", content)
    flags = f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}", "--shards=2", "--workers=1"
    with Hub(tmp_path / "hub", REPO) as hub:
        make(*flags, env=hub.env(tmp_path / "home"))
        assert hub.fetched() == ["sample/10BT/0.parquet"]
    assert_tokens(tmp_path / "out", tokens[: 2 * SIZE])


def test_ctrl_c_while_a_download_stalls(texts, tmp_path):
    """It does not wait, and complete files are not fetched again."""
    for i, content in enumerate([texts * 3, texts]):
        write_parquet(tmp_path / "hub" / "sample" / "10BT" / f"{i}.parquet", content)
    flags = f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}", "--workers=2"
    with Hub(tmp_path / "hub", REPO, stalled=["sample/10BT/1.parquet"]) as hub:
        process = start(*flags, env=hub.env(tmp_path / "home"))
        wait_for_shards(process, tmp_path / "out", 33)
        deadline = time.monotonic() + 60
        while "sample/10BT/1.parquet" not in hub.fetched():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        assert finish(process, timeout=10).returncode == -signal.SIGINT
        hub.stalled, hub.requests = [], []
        make(*flags, env=hub.env(tmp_path / "home"))
        assert hub.fetched() == ["sample/10BT/1.parquet"]
    assert_tokens(tmp_path / "out", reference(texts * 4))


@pytest.mark.parametrize("name", ["finewebedu", "fineweb"])
def test_pretokenized(tmp_path, name):
    """It fetches the validation shard first, then as many as wanted. It never mixes sources. A
    download that breaks off resumes where it was."""
    (tmp_path / "hub").mkdir()
    names = [f"{name}_{'train' if i else 'val'}_{i:06d}.bin" for i in range(4)]
    for i, file in enumerate(names):
        write_bin(tmp_path / "hub" / file, np.arange(6_000_000 if i == 1 else 5000) % 50257)
    out, repo, others = tmp_path / "out", f"kjj0/{name}10B-gpt2", tmp_path / "others"
    flag = "--pretokenized" if name == "finewebedu" else f"--pretokenized={repo}"
    with Hub(tmp_path / "hub", repo, {names[1]: [11_000_000]}) as hub:
        env = hub.env(tmp_path / "home")
        make(flag, f"--out={out}", "--shards=3", env=env)
        assert hub.fetched() == names[:3]
        assert any(wanted and wanted != "bytes=0-" for _, _, wanted in hub.requests)
        hub.requests = []
        make(flag, f"--out={out}", "--shards=3", env=env)
        assert hub.fetched() == []
        assert "some/body" in fail("--pretokenized=some/body", f"--out={others}", env=env)
        assert repo in fail("--pretokenized=some/body", f"--out={out}", env=env)
        assert repo in fail(f"--source={tmp_path}", f"--out={out}", env=env)
    assert sorted(path.name for path in out.glob("*.bin")) == sorted(names[:3])
    for file in names[:3]:
        assert (out / file).read_bytes() == (tmp_path / "hub" / file).read_bytes()
    (out / "progress.json").unlink()
    assert "unknown shards" in fail(flag, f"--out={out}")


# sources as people have them


def write_documents(path, *texts):
    """A file with these documents, of the kind that its name says."""
    import gzip

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        write_parquet(path, list(texts))
    elif path.suffix.lower() == ".txt":
        path.write_text("<|endoftext|>".join(texts))
    else:
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_every_kind_of_file(tmp_path):
    """Also with capital letters and compressed. The others are named once."""
    names = "a.parquet b.jsonl c.jsonl.gz d.json e.txt f.TXT g.Parquet".split()
    for name in names:
        write_documents(tmp_path / "source" / name.replace("Parquet", "parquet"), f"in {name}")
    (tmp_path / "source" / "g.parquet").rename(tmp_path / "source" / "g.Parquet")
    for name in ("README.md", "notes.docx"):
        (tmp_path / "source" / name).write_text("not a document")
    flags = f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'out'}"
    said = make(*flags)
    assert_tokens(tmp_path / "out", reference([f"in {name}" for name in names]), 100_000_000)
    assert "ignoring 2 other files: README.md, notes.docx" in said
    assert "ignoring" not in make(*flags)


def test_hidden_files_are_not_documents(tmp_path):
    for name in (".a.jsonl", "._b.jsonl", ".ipynb_checkpoints/c.jsonl", "d/.cache/e.jsonl"):
        write_documents(tmp_path / "source" / name, "hidden")
    write_documents(tmp_path / "source" / "d" / "f.jsonl", "seen")
    said = make(f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'out'}")
    assert_tokens(tmp_path / "out", reference(["seen"]), 100_000_000)
    assert "ignoring" not in said


def test_links_are_followed(tmp_path):
    """To files, to folders, and once where they lead in a circle. A broken one is an error."""
    write_documents(tmp_path / "disk" / "a.jsonl", "a")
    write_documents(tmp_path / "elsewhere.jsonl", "b")
    source = tmp_path / "source"
    source.mkdir()
    (source / "1").symlink_to(tmp_path / "disk")
    (source / "2.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    (tmp_path / "disk" / "circle").symlink_to(tmp_path / "disk")
    flags = f"--source={source}", "--shard_size=1000"
    make(*flags, f"--out={tmp_path / 'out'}")
    assert_tokens(tmp_path / "out", reference(["a", "b"]), 1000)
    (source / "3.jsonl").symlink_to(tmp_path / "gone")
    line = fail(*flags, f"--out={tmp_path / 'other'}")
    assert "3.jsonl: the link is broken" in line


def test_a_mirror_of_the_dataset(tmp_path):
    """The subset is that of the hub by default, and goes into folders below."""
    for name in ("data/CC-1/a.parquet", "sample/10BT/b.parquet", "sample/100BT/c.parquet"):
        write_documents(tmp_path / "mirror" / name, name)
    source = f"--source={tmp_path / 'mirror'}"
    for subset, name in (
        ([], "sample/10BT/b.parquet"),
        (["--subset=data"], "data/CC-1/a.parquet"),
        (["--subset=sample/100BT"], "sample/100BT/c.parquet"),
    ):
        out = tmp_path / name.replace("/", "-")
        make(source, *subset, f"--out={out}")
        assert_tokens(out, reference([name]), 100_000_000)
    assert "--subset=none" in fail(source, "--subset=none", f"--out={tmp_path / 'none'}")


def test_subsets_on_the_hub(tmp_path):
    """As in a folder; one that is not there is named."""
    for name in ("data/CC-1/a.parquet", "data/.hidden/b.parquet", "sample/10BT/c.parquet"):
        write_documents(tmp_path / "hub" / name, name)
    with Hub(tmp_path / "hub", REPO) as hub:
        env = hub.env(tmp_path / "home")
        make("--subset=data", f"--out={tmp_path / 'out'}", env=env)
        line = fail("--subset=none", f"--out={tmp_path / 'none'}", env=env)
    assert_tokens(tmp_path / "out", reference(["data/CC-1/a.parquet"]), 100_000_000)
    assert "--subset=none" in line and REPO in line


MARK = "<|endoftext|>"


@pytest.mark.parametrize("separator", [MARK, f"\n{MARK}\n", f"\r\n{MARK}\r\n"])
@pytest.mark.parametrize("piece", [1_000_000, 1100])
def test_a_text_of_many_documents(tmp_path, separator, piece):
    """As in TinyStories: marks between documents, wherever the pieces end that are read at a time.
    In other files, the mark stays ordinary text."""
    play = (ROOT / "input.txt").read_text()
    stories = [play[i : i + 900] for i in range(0, 90_000, 900)]
    stories = [story.strip("\n") for story in stories] + ["short", " a space, and one line end\n"]
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "stories.txt").write_bytes(separator.join(["", *stories]).encode())
    script = variant(tmp_path / "s.py", "fineweb.py", ("piece = 1_000_000", f"piece = {piece}"))
    flags = f"--source={folder}", "--shard_size=10000", "--workers=2"
    make(*flags, f"--out={tmp_path / 'out'}", script=script)
    assert_tokens(tmp_path / "out", reference(stories), 10000)
    (folder / "stories.txt").unlink()
    write_documents(folder / "a.jsonl", separator.join(stories))
    make(*flags, f"--out={tmp_path / 'plain'}", script=script)
    assert_tokens(tmp_path / "plain", reference([separator.join(stories)]), 10000)


def test_a_text_larger_than_memory(tmp_path):
    """One document of 64 MB, without a mark, with little memory: it comes in pieces, which make one
    document. Another text, without marks, stays as it is."""
    line = "Now is the winter of our discontent\n"
    n = 64_000_000 // len(line)
    (tmp_path / "a.txt").write_text(line * n)
    (tmp_path / "b.txt").write_text("\n\nb\n\n")
    out = tmp_path / "out"
    process = start(f"--source={tmp_path}", f"--out={out}", "--workers=1")
    peak = 0
    while process.poll() is None:
        try:
            status = open(f"/proc/{process.pid}/status").read()
            peak = max(peak, int(status.partition("VmHWM:")[2].split()[0]))  # kB
        except (OSError, IndexError):
            pass
        time.sleep(0.05)
    assert finish(process).returncode == 0
    tokens = np.concatenate([np.load(path) for path in shards_of(out)])
    assert (tokens == 50256).sum() == 2
    assert abs(len(tokens) / (n * len(reference([line])[1:])) - 1) < 1e-3
    assert np.array_equal(tokens[-len(reference(["\n\nb\n\n"])) :], reference(["\n\nb\n\n"]))
    # Python with its packages, the shard of 200 MB that is being filled, and some pieces
    assert peak < 600_000, f"{peak} kB"


@pytest.mark.parametrize("workers", [1, 3])
def test_a_million_spaces(tmp_path, workers):
    """tiktoken's regular expression gives up on them: they are cut, and nothing is lost."""
    import tiktoken

    texts = ["before", "a" + " " * 999_999 + "b", "c" + "\n" * 999_999 + "d", "after"]
    write_documents(tmp_path / "source" / "a.jsonl", *texts)
    out = tmp_path / "out"
    make(f"--source={tmp_path / 'source'}", f"--out={out}", f"--workers={workers}")
    (shard,) = shards_of(out)
    text = tiktoken.get_encoding("gpt2").decode(np.load(shard).tolist())
    assert text == "".join("<|endoftext|>" + each for each in texts)


def test_text_as_binary(tmp_path):
    """As Spark and Impala write it."""
    texts = ["one", None, "zwei \u00fc"]
    values = pa.array([text and text.encode() for text in texts], pa.binary())
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table({"text": values}), tmp_path / "source" / "a.parquet")
    make(f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'out'}")
    assert_tokens(tmp_path / "out", reference(texts), 100_000_000)


def test_a_lost_shard_is_made_again(source, tokens, tmp_path):
    """So is one of another size, at the next start, and nothing else."""
    flags = f"--source={source}", f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}"
    make(*flags)
    paths = shards_of(tmp_path / "out")
    before = times(tmp_path / "out")
    paths[1].unlink()
    paths[3].write_bytes(b"")
    paths[-1].write_bytes(paths[-1].read_bytes()[:-2])
    said = make(*flags)
    assert said.count("making it again") == 3
    assert_tokens(tmp_path / "out", tokens)
    after = times(tmp_path / "out")
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {paths[1].name, paths[3].name, paths[-1].name}
    assert "again" not in make(*flags)


def test_a_lost_shard_whose_source_has_changed(tmp_path):
    """What can't be made again is said, and the other shards stay."""
    write_documents(tmp_path / "source" / "a.jsonl", *["one two three"] * 20)
    flags = f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'out'}", "--shard_size=50"
    make(*flags)
    last = shards_of(tmp_path / "out")[-1]
    last.unlink()
    write_documents(tmp_path / "source" / "a.jsonl", *["one two three"] * 10)
    assert "has changed" in fail(*flags)
    assert len(shards_of(tmp_path / "out")) == 1


def test_shards_of_own_text_need_a_folder_of_their_own(source, tmp_path):
    """Those of FineWeb-Edu have a default. A text of one shard has none to train on."""
    assert "--out: choose a folder" in fail(f"--source={source}")
    assert "this one is for validation" in make(f"--source={source}", f"--out={tmp_path}/out")


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": null}\n{"text": null}\n'])
def test_a_source_without_documents(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    assert "no documents" in fail(f"--source={tmp_path}", f"--out={tmp_path / 'out'}")
    assert not list((tmp_path / "out").glob("*.npy"))


def test_new_files_after_the_end(tmp_path):
    write_documents(tmp_path / "source" / "b.jsonl", "one")
    flags = f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'source' / 'out'}"
    assert "new files" not in make(*flags)
    write_documents(tmp_path / "source" / "a.jsonl", "two")
    said = make(*flags)
    assert "a.jsonl and so on: 1 new files are not part of these shards" in said
    assert_tokens(tmp_path / "source" / "out", reference(["one"]), 100_000_000)


def test_no_more_workers_than_cores(tmp_path):
    """The default counts the cores that the process may use."""
    import fineweb

    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert fineweb.n_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # fineweb.py sets its own


def test_too_many_workers(tmp_path):
    write_documents(tmp_path / "source" / "a.jsonl", "one")
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))  # noqa: E731
    flags = f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'out'}", "--workers=40"
    assert "fewer --workers" in fail(*flags, preexec_fn=limit)


def test_a_gated_dataset(tmp_path):
    """The hub's advice is shown whole, at once."""
    (tmp_path / "hub").mkdir()
    began = time.monotonic()
    with Hub(tmp_path / "hub", REPO, gated=True) as hub:
        line = fail(f"--out={tmp_path / 'out'}", env=hub.env(tmp_path / "home"))
    assert "restricted" in line and "log in" in line and time.monotonic() - began < 15


def test_only_what_can_pass_is_tried_again(texts, tmp_path):
    """A file that is forbidden is not; an overloaded hub is."""
    for status, times in ((403, 100), (503, 2)):
        write_parquet(tmp_path / "hub" / "sample" / "10BT" / "a.parquet", texts[:10])
        with Hub(tmp_path / "hub", REPO) as hub:
            hub.failures = [status] * times
            flags = f"--out={tmp_path / str(status)}", "--workers=1"
            began = time.monotonic()
            result = finish(start(*flags, env=hub.env(tmp_path / f"home-{status}")))
        assert result.returncode == (1 if status == 403 else 0), result.stderr
        if status == 403:
            assert "403" in last_line(result.stderr) and time.monotonic() - began < 20


def test_a_damaged_download_is_made_anew(texts, tokens, tmp_path):
    """Once, from the place where it was damaged."""
    name = "sample/10BT/a.parquet"
    write_parquet(tmp_path / "hub" / name, texts, row_group_size=500)
    flags = f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}", "--workers=1"
    with Hub(tmp_path / "hub", REPO) as hub:
        env = hub.env(tmp_path / "home")
        make(*flags, "--shards=1", env=env)
        (cached,) = tmp_path.glob("home/hub/datasets--*/blobs/*")
        content = cached.read_bytes()
        cached.write_bytes(content[: len(content) // 2] + bytes(10_000) + content[-1000:])
        said = make(*flags, env=env)
    assert "is damaged" in said and said.count("again") == 1
    assert_tokens(tmp_path / "out", tokens)


def test_offline_with_a_full_cache(texts, tokens, tmp_path):
    write_parquet(tmp_path / "hub" / "sample" / "10BT" / "a.parquet", texts)
    flags = f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}", "--workers=1"
    with Hub(tmp_path / "hub", REPO) as hub:
        env = hub.env(tmp_path / "home")
        make(*flags, "--shards=2", env=env)
    make(*flags, env={**env, "HF_HUB_OFFLINE": "1"})
    assert_tokens(tmp_path / "out", tokens)


def test_pretokenized_with_a_folder(tmp_path):
    (tmp_path / "shards").mkdir()
    line = fail(f"--pretokenized={tmp_path / 'shards'}", f"--out={tmp_path / 'out'}")
    assert "is a folder" in line


def test_progress_on_a_terminal(source, tmp_path):
    """A bar with tokens and their rate, which other outputs don't get."""
    import fcntl
    import pty
    import struct
    import termios

    flags = f"--source={source}", f"--out={tmp_path / 'out'}", f"--shard_size={SIZE}"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, str(ROOT / "fineweb.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # the terminal is closed
        pass
    assert process.wait() == 0
    assert b"tokens/s" in shown and b"001.parquet" in shown, shown
    assert "tokens/s" not in make(*flags[:1], f"--out={tmp_path / 'quiet'}", flags[2])


def test_training_on_the_result(source, tmp_path):
    out = tmp_path / "out"
    make(f"--source={source}", f"--out={out}", f"--shard_size={SIZE}", "--shards=3")
    train(f"--data={out}", f"--log_dir={tmp_path / 'run'}", "--max_steps=4")
    losses = series(tmp_path / "run", "train_loss")
    assert len(losses) == 4 and abs(losses[0] - np.log(50257)) < 0.5
