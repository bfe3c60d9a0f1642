"""The order of the data: each window once per epoch, the same for any number of processes."""

import numpy as np
import pytest
from conftest import mistake, train, write_bin

from train_gpt2 import TokenLoader, load_split, open_shard

VOCAB = 50257


def loader(data, split, T, seed=None, encoding="gpt2", **how):
    """A loader of one process and one row, or as asked for."""
    how = {"rows": how.pop("B", 1), "rank": 0, "world_size": 1, "vocab_size": VOCAB, **how}
    return TokenLoader(load_split(str(data), split, encoding), T=T, seed=seed, device="cpu", **how)


def windows_of_step(data, step, per_step, world_size, B):
    """What all processes together read in a step, by the same calls as in the training loop."""
    numbers = range(step * per_step, (step + 1) * per_step)
    found = []
    for rank in range(world_size):
        tokens = loader(data, "train", 32, seed=7, B=B, rank=rank, world_size=world_size)
        for i in range(tokens.n_batches(numbers)):
            for x, y in zip(*tokens.batch(numbers, i), strict=True):
                if (y == -100).all():  # beyond the last window
                    assert (x == 0).all()
                else:
                    found.append((*x.tolist(), y[-1].item()))
    return sorted(found)


def test_every_window_once_an_epoch(shards):
    """Each epoch moves all windows by another offset. The last of a shard moves less, to fit."""
    T = 32
    tokens = loader(shards[0], "train", T, seed=7)
    flat = [np.load(path) for path in sorted(shards[0].glob("*train*"))]
    assert tokens.n_windows == sum((len(part) - 1) // T for part in flat)

    unshuffled = []
    for offset in range(T):
        starts = [
            (part, min(i * T + offset, len(part) - T - 1))
            for part in flat
            for i in range((len(part) - 1) // T)
        ]
        unshuffled.append([tuple(part[start : start + T + 1]) for part, start in starts])

    offsets = []
    for epoch in range(4):
        first = epoch * tokens.n_windows
        windows = [tuple(tokens.window(first + i)) for i in range(tokens.n_windows)]
        offsets += [i for i in range(T) if sorted(windows) == sorted(unshuffled[i])]
        assert windows not in unshuffled
    assert len(offsets) == len(set(offsets)) == 4


def test_the_order_is_new_in_each_epoch(tmp_path):
    """Five shards of 20 windows. All windows are shuffled, across the shards."""
    for i in range(5):
        tokens = 1000 * i + np.arange(161)  # a number tells shard and place
        np.save(tmp_path / f"train_{i}.npy", tokens.astype(np.uint16))
    tokens = loader(tmp_path, "train", 8, seed=7)
    orders = []
    for epoch in range(4):
        firsts = [int(tokens.window(100 * epoch + i)[0]) for i in range(100)]
        orders.append(tuple(first // 1000 * 20 + first % 1000 // 8 for first in firsts))
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len(set(orders)) == 4
    assert len({window // 20 for window in orders[0][:20]}) > 2  # shards among the first


@pytest.mark.parametrize("step", [0, 3, 40])  # the last is in another epoch
def test_the_same_windows_for_any_topology(shards, step):
    expected = windows_of_step(shards[0], step, 32, 1, 32)
    assert len(set(expected)) == 32
    for world_size in (1, 2, 3, 5, 7, 8, 40):
        for B in (1, 3, 5, 8, 64):
            assert windows_of_step(shards[0], step, 32, world_size, B) == expected


def test_targets_are_the_inputs_one_place_on(shards):
    x, y = loader(shards[0], "train", 32, seed=7, B=4).batch(range(40), 5)
    assert x.shape == y.shape == (4, 32)
    assert (x[:, 1:] == y[:, :-1]).all()


def test_npy_and_bin_give_the_same_windows(shards):
    a, b = (loader(folder, "train", 32, seed=7) for folder in shards)
    assert a.starts.tolist() == b.starts.tolist()
    for i in range(a.n_windows):
        assert (a.window(i) == b.window(i)).all()


def test_the_seed_shuffles_train_and_not_val(shards):
    first = [loader(shards[0], "train", 32, seed).window(0).tolist() for seed in (1, 2, 1)]
    assert first[0] == first[2] != first[1]
    val = loader(shards[0], "val", 32)
    expected = np.load(next(shards[0].glob("*val*")))
    assert all(
        (val.window(i) == expected[i * 32 : i * 32 + 33]).all() for i in range(val.n_windows)
    )


def test_a_split_is_a_word_of_the_name(tmp_path):
    for i, name in enumerate(["retrieval_train_0.npy", "constraints_val_0.npy", "val_2.npy.tmp"]):
        with open(tmp_path / name, "wb") as file:
            np.save(file, np.full(100, i, np.uint16))
    for split, token in (("train", 0), ("val", 1)):
        tokens = loader(tmp_path, split, 9)
        assert tokens.n_windows == 11 and set(tokens.window(0)) == {token}


def test_text_is_bytes_and_the_last_tenth_is_val(tmp_path):
    (tmp_path / "any.txt").write_bytes(bytes(range(256)) * 4)
    train_split, val = (
        loader(tmp_path / "any.txt", split, 4, encoding="bytes") for split in ("train", "val")
    )
    assert train_split.window(0).tolist() == [0, 1, 2, 3, 4]
    assert val.window(0)[0] == (1024 - 102) % 256
    assert train_split.n_windows == 230 and val.n_windows == 25


# bad data


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, n in [("val_0", 3000), ("train_1", 20000)]:
        np.save(tmp_path / f"{name}.npy", rng.integers(0, VOCAB, n, dtype=np.uint16))
    return tmp_path


def problem(folder, *flags):
    return mistake(f"--data={folder}", f"--log_dir={folder}-log", "--max_steps=40", *flags)


def test_shard_of_another_length_than_its_header_says(folder):
    path = folder / "train_1.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2000])
    line = problem(folder)
    assert str(path) in line and "20000" in line and "19000" in line
    path.write_bytes(whole + b"12")
    with pytest.raises(SystemExit, match=rf"{path}: .*expected \(20000,\) .*found 20001"):
        open_shard(str(path))
    write_bin(folder / "train_1.bin", range(20000))
    path = folder / "train_1.bin"
    path.write_bytes(path.read_bytes()[:-11])
    with pytest.raises(SystemExit, match=rf"{path}: .*expected \(20000,\) .*found 19994.5"):
        open_shard(str(path))


@pytest.mark.parametrize(
    "shape, dtype", [((9000,), "<i4"), ((9000,), ">u2"), ((90, 100), "<u2"), ((), "<u2")]
)
def test_shard_of_another_type(folder, shape, dtype):
    np.save(folder / "train_1.npy", np.zeros(shape, dtype))
    with pytest.raises(SystemExit, match="train_1.npy: not a shard"):
        open_shard(str(folder / "train_1.npy"))


@pytest.mark.parametrize("place, value", [(0, 20240521), (1, 2)])
def test_shard_with_another_header_than_llm_c_s(folder, place, value):
    """A file of the right length, but of another kind or version."""
    path = folder / "train_1.bin"
    write_bin(path, range(20000))
    assert len(open_shard(str(path))) == 20000
    header = np.fromfile(path, "<i4", 256)
    header[place] = value
    path.write_bytes(header.tobytes() + path.read_bytes()[1024:])
    with pytest.raises(SystemExit, match="train_1.bin: not a shard"):
        open_shard(str(path))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"<html>404</html>" * 100, bytes(4096)])
@pytest.mark.parametrize("name", ["train_1.npy", "train_1.bin"])
def test_a_file_that_is_no_shard_is_refused(folder, content, name):
    (folder / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"{name}: not a shard"):
        open_shard(str(folder / name))


def test_token_beyond_the_vocabulary(folder):
    tokens = np.load(folder / "train_1.npy")
    tokens[12345] = 50257
    np.save(folder / "train_1.npy", tokens)
    line = problem(folder)
    assert "train_1.npy" in line and "12345" in line and "50257" in line


def test_folder_without_shards(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert "fineweb.py" in problem(empty)
    assert "fineweb.py" in problem(empty / "missing")
    (folder / "val_0.npy").unlink()
    line = problem(folder)
    assert "val" in line and "fineweb.py" in line
    assert "fineweb.py" in problem(folder / "train_1.npy")  # a shard is not a text


def test_short_shards_and_unfinished_files_are_passed_over(folder):
    np.save(folder / "train_0.npy", np.arange(0, dtype=np.uint16))
    np.save(folder / "train_2.npy", np.arange(32, dtype=np.uint16))  # one token less than a window
    (folder / "train_3.npy.tmp").write_bytes(b"half a shard")
    result = train(f"--data={folder}", f"--log_dir={folder}-log", "--max_steps=1")
    assert "loss" in result.stdout
    (folder / "train_1.npy").unlink()
    assert "T + 1 = 33" in problem(folder)


def test_fewer_windows_than_a_step_needs(folder):
    line = problem(folder, "--total_batch_size=32768", "--max_steps=1")
    assert "1024" in line and "624" in line


@pytest.mark.parametrize("content", [b"", b"To be"])
def test_text_too_short(tmp_path, content):
    (tmp_path / "short.txt").write_bytes(content)
    assert "short.txt" in mistake(f"--data={tmp_path}/short.txt", f"--log_dir={tmp_path}/log")


def test_any_bytes_train(tmp_path):
    """As bytes. To be tokenized, a text has to be UTF-8: the first bad byte is named."""
    noise = np.random.default_rng(0).bytes(30000)
    (tmp_path / "noise.txt").write_bytes(b"caf\xc3\xa9 caf\xe9 " + noise)
    flags = f"--data={tmp_path}/noise.txt", f"--log_dir={tmp_path}/log", "--max_steps=2"
    assert "sample: " in train(*flags, "--sample_every=2").stdout
    line = mistake(*flags, "--encoding=gpt2")
    assert "noise.txt: byte 0xe9 at 9 is not UTF-8" in line and "--encoding=bytes" in line


def read(tmp_path, content, encoding="gpt2"):
    """The tokens of a text file with this content."""
    from train_gpt2 import read_text

    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.txt"
    path.write_bytes(content)
    return read_text(str(path), encoding).tolist()


def test_end_of_text_in_a_text_is_the_separator(tmp_path):
    """As in a prompt. In bytes, it is thirteen bytes."""
    text = b"To be,<|endoftext|>or not"
    tokens = read(tmp_path, text)
    assert tokens.count(50256) == 1 and len(tokens) < 10
    assert read(tmp_path, text, "bytes") == list(text)


def test_line_ends_of_windows_and_old_macs(tmp_path):
    """Tokens are those of plain lines; samples of a model of bytes show lines."""
    from train_gpt2 import printable

    plain = b"To be,\nor not\n"
    assert read(tmp_path, plain.replace(b"\n", b"\r\n")) == read(tmp_path, plain)
    assert printable("To be,\r\nor not\rto be\x07\n") == "To be,\nor not\nto be?\n"


@pytest.mark.parametrize("run", [b" ", b"\n", b" \n", "\u3000".encode()])
def test_a_text_with_a_million_spaces(tmp_path, run):
    """tiktoken's regular expression gives up on it, so it is cut. Nothing is lost."""
    import tiktoken

    text = b"To be," + run * 1_000_000 + b"or<|endoftext|>not"
    encoding = tiktoken.get_encoding("gpt2")
    with pytest.raises(ValueError, match="stack"):
        encoding.encode(text.decode(), allowed_special="all")
    tokens = read(tmp_path, text)
    assert encoding.decode(tokens).encode() == text and tokens.count(50256) == 1
