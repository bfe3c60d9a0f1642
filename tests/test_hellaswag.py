"""hellaswag.py: compared with a plain reference, as a command, in the loop, and on bad data."""

import functools
import hashlib
import http.server
import json
import multiprocessing
import os
import random
import re
import runpy
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, fork, log_of, series, train
from torch.nn import functional as F

import hellaswag

# forks need no second import of torch
forks = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 made-up examples of mixed length."""
    lines = [line for line in (ROOT / "input.txt").read_text().split("\n") if len(line) > 10]
    chance, path = random.Random(0), tmp_path_factory.mktemp("hellaswag") / "made.jsonl"
    with open(path, "w") as file:
        for i in range(60):
            context, *endings = (
                " ".join(chance.choices(lines, k=k))
                for k in [chance.randrange(1, 6), *chance.choices([1, 1, 1, 2], k=4)]
            )
            # often the shortest: it has the lowest sum but not the lowest mean, so acc != acc_norm
            label = endings.index(min(endings, key=len)) if i % 2 else chance.randrange(4)
            example = {"ind": i, "ctx": context, "endings": endings, "label": label}
            file.write(json.dumps(example) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random GPT-2 of 2 layers, saved by transformers. Large weights prevent ties."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=64, initializer_range=0.1))
    path = tmp_path_factory.mktemp("hf")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(data, folder):
    """How many examples are right by sum and by mean, computed one row at a time."""
    import tiktoken
    from transformers import GPT2LMHeadModel

    encode = tiktoken.get_encoding("gpt2").encode
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    correct = correct_norm = 0
    for line in data.read_text().splitlines():
        example = json.loads(line)
        context, sums, means = encode(example["ctx"]), [], []
        for ending in example["endings"]:
            ending = encode(" " + ending)
            with torch.no_grad():
                logits = model(torch.tensor([context + ending])).logits[0, len(context) - 1 : -1]
            losses = F.cross_entropy(logits, torch.tensor(ending), reduction="none")
            sums.append(losses.sum().item())
            means.append(losses.mean().item())
        correct += sums.index(min(sums)) == example["label"]
        correct_norm += means.index(min(means)) == example["label"]
    return correct, correct_norm


def run(folder, flags, script):
    """Runs the script in a process of its own, as a person would call it."""
    sys.stdout = open(folder / "stdout", "w")
    sys.stderr = open(folder / "stderr", "w")
    sys.argv = [str(script), *map(str, flags)]
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture
def command(tmp_path_factory):
    """Calls hellaswag.py -> exit status, lines of stdout, lines of stderr."""
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401, once for all forks

    def call(*flags, script=ROOT / "hellaswag.py"):
        folder = tmp_path_factory.mktemp("command")
        process = forks.Process(target=run, args=(folder, flags, script))
        process.start()
        process.join(120)
        assert process.exitcode is not None, process.kill()
        out, err = ((folder / name).read_text() for name in ("stdout", "stderr"))
        return process.exitcode, out.strip().splitlines(), err.strip().splitlines()

    return call


@pytest.fixture
def score(command):
    """Calls hellaswag.py, which must succeed -> lines of stdout."""

    def call(*flags, **how):
        status, out, err = command(*flags, "--device=cpu", **how)
        assert status == 0, err
        return out

    return call


@pytest.fixture
def fail(command):
    """Calls hellaswag.py, which must find a mistake -> the last line of stderr. The lines above
    it come from transformers: progress bars and a table of missing weights."""

    def call(*flags, **how):
        status, out, err = command(*flags, **how)
        assert status == 1 and not out, (status, out, err)
        assert "Traceback" not in "".join(err)
        return err[-1]

    return call


@pytest.mark.parametrize("batch_tokens", [16384, 3000])
def test_the_command_counts_as_the_reference(data, folder, reference, score, batch_tokens):
    *_, acc, acc_norm = score(folder, f"--data={data}", f"--batch_tokens={batch_tokens}")
    correct, correct_norm = reference
    assert acc == f"acc {correct}/60={correct / 60:.4f}"
    assert acc_norm == f"acc_norm {correct_norm}/60={correct_norm / 60:.4f}"


def test_our_model_counts_as_the_reference(data, folder, reference):
    """Whatever the rows of padding behind the vocabulary are: they must not count."""
    from train_gpt2 import from_pretrained

    examples = hellaswag.load_examples(data)
    model = from_pretrained(str(folder))
    for padding in (0.0, 10.0):
        each = model
        with torch.no_grad():
            each.lm_head.weight[50257:] = padding
        each.train()
        found = hellaswag.evaluate(each, examples)
        assert (found["total"], found["cut"]) == (60, 0) and each.training
        assert (found["acc"], found["acc_norm"]) == (reference[0] / 60, reference[1] / 60)
    few = [hellaswag.evaluate(model, examples[:20], n) for n in (1, 1000)]  # one at a time, or more
    assert few[0] == few[1] and few[0]["total"] == 20
    widths = [max(map(len, e.rows)) for batch in hellaswag.batches(examples, 1000) for e in batch]
    assert widths == sorted(widths, reverse=True)  # if the first batch fits in memory, all do


def test_weights_in_half_precision(tmp_path, data, folder, score):
    """Scores are in float32, whatever dtype was saved."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).bfloat16()
    model.save_pretrained(tmp_path)
    examples = hellaswag.load_examples(data)
    found = hellaswag.evaluate(model.float(), examples)
    _, means = hellaswag.ending_losses(model, examples[:1])
    *_, a, b, c, d, acc, acc_norm = score(tmp_path, f"--data={data}", "--show=1")
    shown = [float(line[7:].split()[0]) for line in (a, b, c, d)]
    assert shown == pytest.approx(means[0].tolist(), abs=2e-4)
    assert acc.startswith(f"acc {round(60 * found['acc'])}/60=")
    assert acc_norm.startswith(f"acc_norm {round(60 * found['acc_norm'])}/60=")


def test_the_folder_of_a_run(tmp_path, data, shards, score, fail, text):
    """Its newest checkpoint and its hf/ have the same scores. A run on bytes has none."""
    train(f"--data={shards[0]}", f"--log_dir={tmp_path}/run", "--max_steps=2", "--T=64")
    assert score(tmp_path / "run", f"--data={data}") == score(
        tmp_path / "run" / "hf", f"--data={data}"
    )
    train(f"--data={text}", f"--log_dir={tmp_path}/bytes", "--max_steps=2")
    assert "has 256 tokens" in fail(tmp_path / "bytes", f"--data={data}")


def test_show_prints_examples_and_marks_the_right_ending(data, folder, score):
    lines = score(folder, f"--data={data}", "--limit=4", "--show=2")
    examples = [json.loads(line) for line in data.read_text().splitlines()[:2]]
    for example in examples:
        at = lines.index(example["ctx"])
        for i, ending in enumerate(example["endings"]):
            assert lines[at + 1 + i].endswith(" " + ending)
            assert lines[at + 1 + i].startswith(" right") == (i == example["label"])
    assert "acc_norm " in lines[-1] and "/4=" in lines[-1]


def test_rows_too_long_keep_their_right_end(tmp_path, data, score):
    """Such rows are counted and reported, and what is left is scored as by the reference. Some
    endings alone are longer than the model's context."""
    import tiktoken
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=1, n_embd=32, n_positions=16, initializer_range=0.1)
    )
    small.save_pretrained(tmp_path / "hf")
    encode = tiktoken.get_encoding("gpt2").encode
    cut = right = long_endings = 0
    means = []
    for line in data.read_text().splitlines()[:30]:
        example = json.loads(line)
        losses = []
        for ending in example["endings"]:
            ending = encode(" " + ending)
            row = encode(example["ctx"]) + ending
            cut += len(row) > 17
            long_endings += len(ending) > 16
            row = torch.tensor([row[-17:]])
            n = min(len(ending), 16)
            with torch.no_grad():
                logits = small.eval()(row[:, :-1]).logits[0, -n:]
            losses.append(F.cross_entropy(logits, row[0, -n:]).item())
        means += losses
        right += losses.index(min(losses)) == example["label"]
    assert 0 < long_endings < cut < 120
    lines = score(tmp_path / "hf", f"--data={data}", "--limit=30", "--show=30")
    shown = re.findall(r"^ (?:right|     ) (\d+\.\d{4}) ", "\n".join(lines), re.MULTILINE)
    assert [float(mean) for mean in shown] == pytest.approx(means, abs=2e-4)
    assert lines[-3].startswith(f"{cut} rows are too long")
    assert lines[-1].startswith(f"acc_norm {right}/30=")


GOOD = {"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}


@pytest.mark.parametrize(
    "bad",
    [
        '{"ctx": "a", "endings": ["b",',
        json.dumps({"endings": GOOD["endings"], "label": 0}),
        json.dumps({**GOOD, "endings": ["b", "c", "d"]}),
        json.dumps({**GOOD, "label": 4}),
        json.dumps({**GOOD, "label": ""}),
        json.dumps({**GOOD, "label": "-1"}),
        json.dumps({**GOOD, "endings": "bcde"}),
        json.dumps({**GOOD, "endings": ["b", "", "d", "e"]}),
        json.dumps({**GOOD, "ctx": " "}),
        json.dumps({**GOOD, "endings": ["b", 5, "d", "e"]}),
        '{"ctx": "caf\udce9"}',
        "[]",
    ],
)
def test_bad_lines_are_numbered(tmp_path, bad):
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps(GOOD), json.dumps(GOOD), bad, json.dumps(GOOD)]
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")  # maybe invalid
    with pytest.raises(ValueError, match="bad.jsonl: line 3: ") as error:
        hellaswag.load_examples(path)
    assert "\n" not in str(error.value)


def test_labels_as_strings_and_blank_lines(tmp_path):
    """The hub's exports have them."""
    lines = [json.dumps({**GOOD, "label": label}) for label in (3, "3", 0, "0")]
    path = tmp_path / "hub.jsonl"
    path.write_text("\r\n".join(lines) + "\r\n\n \n\n")
    assert [example.label for example in hellaswag.load_examples(path)] == [3, 3, 0, 0]


def test_mistakes_are_one_line(tmp_path, data, folder, fail):
    """Each gives one line. A folder of another architecture is not scored as if it were GPT-2."""
    (tmp_path / "bad.jsonl").write_text("{}\n")
    (tmp_path / "empty.jsonl").write_text("")
    assert "bad.jsonl: line 1" in fail(folder, f"--data={tmp_path / 'bad.jsonl'}")
    assert "there are no examples" in fail(folder, f"--data={tmp_path / 'empty.jsonl'}")
    assert "none.jsonl" in fail(folder, f"--data={tmp_path / 'none.jsonl'}")
    assert "--limits=3" in fail("no/such", "--limits=3")
    assert "--limit" in fail("no/such", "--limit=-2")
    assert "--batch_tokens" in fail("no/such", "--batch_tokens=many")
    assert "no/such" in fail("no/such", f"--data={data}")
    assert "gpu" in fail(folder, f"--data={data}", "--device=gpu")
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    size = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    LlamaForCausalLM(LlamaConfig(vocab_size=50257, **size)).save_pretrained(tmp_path / "llama")
    assert "model_type is llama" in fail(tmp_path / "llama", f"--data={data}")
    small = GPT2Config(vocab_size=100, n_layer=1, n_head=1, n_embd=8)
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "small")
    assert "has 100 tokens" in fail(tmp_path / "small", f"--data={data}")
    weights = (tmp_path / "small" / "model.safetensors").read_bytes()
    (tmp_path / "small" / "model.safetensors").write_bytes(weights[:100])
    assert str(tmp_path / "small") in fail(tmp_path / "small", f"--data={data}")


def test_losses_that_are_not_finite(tmp_path, data, folder, fail):
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder)
    model.transformer.wte.weight.data[50000] = float("nan")
    model.save_pretrained(tmp_path / "hf")
    assert "not finite" in fail(tmp_path / "hf", f"--data={data}", "--limit=4", "--device=cpu")


class Site(http.server.ThreadingHTTPServer):
    """Answers each request with the next content, and repeats the last one for ever."""

    def __init__(self, *contents):
        super().__init__(("127.0.0.1", 0), Page)
        self.contents, self.asked = list(contents), 0
        self.url = f"http://127.0.0.1:{self.server_port}/hellaswag_val.jsonl"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Page(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked += 1
        contents = self.server.contents
        status, length, body = contents.pop(0) if len(contents) > 1 else contents[0]
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def right(data):
    """The right answer of a site: the made-up examples."""
    content = data.read_bytes()
    return 200, len(content), content


@pytest.fixture
def site(tmp_path, monkeypatch, right):
    """In hellaswag, also as its forks import it, the made-up examples replace the validation set.
    It downloads them to tmp_path from a site that gives the answers it was told to give."""
    file = tmp_path / "hellaswag_val.jsonl"
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(right[2]).hexdigest())
    monkeypatch.setattr(hellaswag, "FILE", file)
    monkeypatch.setattr(hellaswag.load_examples, "__defaults__", (file,))

    def make(*contents):
        site = Site(*contents)
        monkeypatch.setattr(hellaswag, "URL", site.url)
        return site

    return make


def test_only_the_right_file_is_kept(tmp_path, site, right):
    """Error pages (with status 503 and 200) and a file cut off are not kept; the right file is."""
    _, length, content = right
    page = b"<html>come back later</html>"
    half = content[: length // 2]
    wrong = [(503, len(page), page), (200, len(page), page), (200, length, half)]
    server = site(*wrong, (200, len(half), half), right)
    for _ in range(4):
        with pytest.raises(ValueError, match="hellaswag_val.jsonl: ") as error:
            hellaswag.load_examples()
        assert "\n" not in str(error.value)
        assert not list(tmp_path.iterdir())
    assert len(hellaswag.load_examples()) == 60
    assert [path.name for path in tmp_path.iterdir()] == ["hellaswag_val.jsonl"]
    assert hellaswag.FILE.read_bytes() == content
    assert len(hellaswag.load_examples()) == 60 and server.asked == 5
    for changed in (content + content.splitlines()[0], content[: content[:-1].rindex(b"\n")]):
        hellaswag.FILE.write_bytes(changed)
        with pytest.raises(ValueError, match="not HellaSwag's validation set"):
            hellaswag.load_examples()


def test_the_command_downloads(tmp_path, right, folder, score, fail):
    """It saves the file beside the script; if that fails, it says so in one line."""
    server = Site((404, 0, b""), right)
    lines = (ROOT / "hellaswag.py").read_text().splitlines()
    changed = {
        "URL = ": f'URL = "{server.url}"',
        "SHA256 = ": f'SHA256 = "{hashlib.sha256(right[2]).hexdigest()}"',
    }
    for i, line in enumerate(lines):
        for start, new in changed.items():
            if line.startswith(start):
                lines[i] = new
    script = tmp_path / "hellaswag.py"
    script.write_text("\n".join(lines) + "\n")
    assert "hellaswag_val.jsonl: HTTP Error 404" in fail(folder, script=script)
    assert "/60=" in score(folder, script=script)[-1]
    assert "/60=" in score(folder, script=script)[-1] and server.asked == 2
    assert (tmp_path / "hellaswag_val.jsonl").read_bytes() == right[2]


def rank_of(function, rank, n, folder):
    """Runs one of n ranks in its own process. Writes what the function returns, or its error."""
    sys.stderr = open(os.devnull, "w")
    store = dist.FileStore(str(folder / "store"), n)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
    try:
        result = function()
    except (ValueError, SystemExit) as error:
        result = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)


@pytest.fixture
def ranks(tmp_path_factory):
    """Calls a function on n ranks -> the list of what each returned."""

    def call(n, function):
        folder = tmp_path_factory.mktemp("ranks")
        processes = [
            forks.Process(target=rank_of, args=(function, rank, n, folder)) for rank in range(n)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0, [process.kill() for process in processes]
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(n)]

    return call


def test_eight_ranks_download_once(site, ranks, right, data):
    """All get the same examples; an error never stays on a single rank."""
    server = site((404, 0, b""), right)
    first, *others = ranks(8, hellaswag.load_examples)
    assert "ValueError: " in first and "404" in first and others == [first] * 7
    first, *others = ranks(8, hellaswag.load_examples)
    assert first == json.loads(json.dumps(hellaswag.load_examples(data)))
    assert others == [first] * 7 and server.asked == 2


@pytest.mark.parametrize("n_ranks, n_examples", [(2, 60), (3, 40), (8, 5)])
def test_ranks_score_every_example_once(data, folder, ranks, n_ranks, n_examples):
    """Even if the ranks can't share them equally, or some ranks get none."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder)
    examples = hellaswag.load_examples(data)[:n_examples]
    alone = hellaswag.evaluate(model, examples)
    assert alone["total"] == n_examples
    found = ranks(n_ranks, functools.partial(hellaswag.evaluate, model, examples))
    assert found == [alone] * n_ranks


def test_a_loss_that_is_not_finite_ends_all_ranks(data, folder, ranks):
    """Even if only one of them meets it."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder)
    examples = hellaswag.load_examples(data)[:5]
    rare = set(examples[3].rows[0])
    for i in (0, 1, 2, 4):
        rare -= set(sum(examples[i].rows, []))
    with torch.no_grad():
        # only its embedding: in the logits, it would spoil every loss
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.transformer.wte.weight[rare.pop()] = float("nan")
    assert "acc" in ranks(1, functools.partial(hellaswag.evaluate, model, examples[:3]))[0]
    for found in ranks(3, functools.partial(hellaswag.evaluate, model, examples)):
        assert found.startswith("SystemExit: ") and "not finite" in found


def test_no_tokenizer(tmp_path, data, ranks, monkeypatch):
    """One line, on all ranks."""
    import tiktoken.registry

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for found in ranks(2, functools.partial(hellaswag.load_examples, data)):
        assert found.startswith("ValueError: ") and "vocab.bpe" in found and "\n" not in found


def in_the_loop(data, *flags):
    result = fork(*TINY, f"--data={data}", *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("compile", [0, 1])
def test_hellaswag_is_logged_in_the_loop(
    tmp_path, site, right, shards, data, score, compile, monkeypatch
):
    """It is logged every hella_every steps and at the end, with compile on or off. The last figure
    is that of the saved folder. (Other tests check what the compiler makes of the model and how
    long that takes: here, its graphs run as they are.)"""
    site(right)
    run = tmp_path / "run"
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    more = [f"--log_dir={run}", "--T=64", "--max_steps=5", "--hella_every=2"]
    told = in_the_loop(shards[0], *more, f"--compile={compile}")
    assert sorted(series(run, "hellaswag")) == [0, 2, 4, 5]
    assert told.count("HellaSwag acc_norm") == 4
    last = [event for event in log_of(run) if "hellaswag" in event][-1]
    correct_norm = round(60 * last["hellaswag"])
    assert last["hellaswag"] == correct_norm / 60
    *_, acc, acc_norm = score(run / "hf", f"--data={data}")
    assert acc_norm.startswith(f"acc_norm {correct_norm}/60=")
    assert not acc.startswith(f"acc {correct_norm}/60="), "acc could pass for acc_norm"


def test_training_goes_on_without_hellaswag(tmp_path, site, shards, text):
    """A run on shards says so once at the start. A run on a text file does not ask for it."""
    server = site((404, 0, b""))
    for data, told in ((shards[0], 1), (text, 0)):
        run = tmp_path / "run"
        out = in_the_loop(data, f"--log_dir={run}", "--max_steps=2", "--hella_every=1")
        assert out.count("no HellaSwag: ") == told
        assert not series(run, "hellaswag")
    assert server.asked == 1


def test_hellaswag_imports_alone():
    code = "import sys, hellaswag; sys.exit('train_gpt2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_two_ranks_train_without_hellaswag(tmp_path, shards):
    """Without the file, both go on."""
    train(f"--data={shards[0]}", f"--log_dir={tmp_path / 'run'}", "--max_steps=2", processes=2)
    assert len(series(tmp_path / "run", "train_loss")) == 2
