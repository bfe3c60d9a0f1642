"""hellaswag.py: against a plain reference, as a command, in the loop, and on bad data."""

import hashlib
import http.server
import importlib.util
import json
import random
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT, TINY, finish, log_of, series, train
from torch.nn import functional as F


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 made examples of mixed length."""
    lines = [line for line in (ROOT / "input.txt").read_text().split("\n") if len(line) > 10]
    chance, path = random.Random(0), tmp_path_factory.mktemp("hellaswag") / "made.jsonl"
    with open(path, "w") as file:
        for i in range(60):
            context, *endings = (
                " ".join(chance.choices(lines, k=k))
                for k in [chance.randrange(1, 6), *chance.choices([1, 1, 1, 2], k=4)]
            )
            example = {"ind": i, "ctx": context, "endings": endings, "label": chance.randrange(4)}
            file.write(json.dumps(example) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random GPT-2 of 4 layers, as transformers saves it; peaky, so that there are no ties."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=4, n_embd=128, initializer_range=0.1))
    path = tmp_path_factory.mktemp("hf")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(data, folder):
    """The right ones by sum and by mean, one row at a time."""
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


def run(*flags, processes=1, script=ROOT / "hellaswag.py"):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), str(script), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def score(*flags, **how):
    result = finish(run(*flags, **how))
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()


def fail(*flags, **how):
    """Exit status 1, and the last line of stderr."""
    result = finish(run(*flags, **how))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("processes, batch_tokens", [(1, 16384), (2, 3000)])
def test_the_command_counts_as_the_reference(data, folder, reference, processes, batch_tokens):
    flags = folder, f"--data={data}", f"--batch_tokens={batch_tokens}", "--device=cpu"
    last = score(*flags, processes=processes)[-1]
    correct, correct_norm = reference
    assert f"acc {correct}/60={correct / 60:.4f} +- " in last
    assert f"acc_norm {correct_norm}/60={correct_norm / 60:.4f} +- " in last
    p = correct / 60
    assert f"+- {(p * (1 - p) / 60) ** 0.5:.4f}, " in last


def test_our_model_counts_as_the_reference(data, folder, reference):
    """Also with rows of padding behind the vocabulary, which must not count."""
    import hellaswag
    from train_gpt2 import GPT, GPTConfig

    theirs = GPT.from_pretrained(str(folder))
    examples = hellaswag.read(data)
    model = GPT(GPTConfig(1024, 50304, 4, 4, 128))
    state = theirs.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        padding = torch.randn(50304 - 50257, 128)
        state[name] = torch.cat([state[name], padding])
    model.load_state_dict(state)
    for each in (theirs, model):
        each.train()
        found = hellaswag.evaluate(each, examples)
        assert (found["correct"], found["correct_norm"]) == reference
        assert (found["total"], found["cut"]) == (60, 0) and each.training
    few = [hellaswag.evaluate(model, examples[:20], n) for n in (1, 1000)]  # one at a time, or more
    assert few[0] == few[1] and few[0]["total"] == 20


def test_another_activation_in_half_precision(tmp_path, data, folder, reference):
    """What the folder says is what is scored; in float32, whatever it was saved in."""
    from transformers import GPT2LMHeadModel

    import hellaswag

    model = GPT2LMHeadModel.from_pretrained(folder, activation_function="relu").bfloat16()
    model.save_pretrained(tmp_path)
    examples = hellaswag.read(data)
    found = hellaswag.evaluate(model.float(), examples)
    assert (found["correct"], found["correct_norm"]) != reference
    sums, counts = hellaswag.score(model, examples[:1])
    *_, a, b, c, d, last = score(tmp_path, f"--data={data}", "--show=1", "--device=cpu")
    shown = [float(line[7:].split()[0]) for line in (a, b, c, d)]
    assert shown == pytest.approx((sums / counts)[0].tolist(), abs=2e-4)
    assert f"acc {found['correct']}/60" in last and f"acc_norm {found['correct_norm']}/60" in last


def test_show(data, folder):
    lines = score(folder, f"--data={data}", "--limit=4", "--show=2", "--device=cpu")
    examples = [json.loads(line) for line in data.read_text().splitlines()[:2]]
    for example in examples:
        at = lines.index(example["ctx"])
        for i, ending in enumerate(example["endings"]):
            assert lines[at + 1 + i].endswith(ending)
            assert lines[at + 1 + i].startswith(" right") == (i == example["label"])


def test_rows_too_long_keep_their_right_end(tmp_path, data):
    """Counted, told, and scored as the reference scores what is left."""
    from transformers import GPT2Config, GPT2LMHeadModel

    import hellaswag

    torch.manual_seed(0)
    small = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=1, n_embd=32, n_positions=32, initializer_range=0.1)
    )
    small.save_pretrained(tmp_path / "hf")
    examples = hellaswag.read(data, 30)
    rows = [e.context + ending for e in examples for ending in e.endings]
    cut = sum(len(row) > 33 for row in rows)
    assert 0 < cut < len(rows)
    right = 0
    for example in examples:
        losses = []
        for ending in example.endings:
            row = torch.tensor([(example.context + ending)[-33:]])
            n = min(len(ending), 32)
            with torch.no_grad():
                logits = small.eval()(row[:, :-1]).logits[0, -n:]
            losses.append(F.cross_entropy(logits, row[0, -n:]).item())
        right += losses.index(min(losses)) == example.label
    lines = score(tmp_path / "hf", f"--data={data}", "--limit=30", "--device=cpu")
    assert f"{cut} of 120 rows" in lines[-2]
    assert f"acc_norm {right}/30" in lines[-1]


GOOD = {"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}


@pytest.mark.parametrize(
    "bad",
    [
        '{"ctx": "a", "endings": ["b",',
        json.dumps({"endings": GOOD["endings"], "label": 0}),
        json.dumps({**GOOD, "endings": ["b", "c", "d"]}),
        json.dumps({**GOOD, "label": 4}),
        json.dumps({**GOOD, "label": "0"}),
        json.dumps({**GOOD, "endings": ["b", "", "d", "e"]}),
        json.dumps({**GOOD, "endings": ["b", 5, "d", "e"]}),
        '{"ctx": "caf\udce9"}',
        "[]",
    ],
)
def test_bad_lines_are_numbered(tmp_path, bad):
    import hellaswag

    path = tmp_path / "bad.jsonl"
    lines = [json.dumps(GOOD), json.dumps(GOOD), bad, json.dumps(GOOD)]
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")  # or not quite
    with pytest.raises(ValueError, match="bad.jsonl, line 3: "):
        hellaswag.read(path)


def test_mistakes(tmp_path, data, folder):
    """One line each; a folder of another architecture is not scored by chance."""
    (tmp_path / "bad.jsonl").write_text("{}\n")
    assert "bad.jsonl, line 1" in fail(folder, f"--data={tmp_path / 'bad.jsonl'}")
    assert "none.jsonl" in fail(folder, f"--data={tmp_path / 'none.jsonl'}")
    assert "--limits=3" in fail("no/such", "--limits=3")
    assert "--limit" in fail("no/such", "--limit=-2")
    assert "no/such" in fail("no/such", f"--data={data}")
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    size = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **size)).save_pretrained(tmp_path / "llama")
    assert "not a GPT-2" in fail(tmp_path / "llama", f"--data={data}")
    small = GPT2Config(vocab_size=100, n_layer=1, n_head=1, n_embd=8)
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "small")
    assert "lacks tokens" in fail(tmp_path / "small", f"--data={data}")


def test_losses_that_are_not_finite(tmp_path, data, folder):
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder)
    model.transformer.wte.weight.data[50000] = float("nan")
    model.save_pretrained(tmp_path / "hf")
    assert "not finite" in fail(tmp_path / "hf", f"--data={data}", "--limit=4", "--device=cpu")


class Site(http.server.ThreadingHTTPServer):
    """Answers with one content after another, the last one for ever."""

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
def copy(tmp_path, data):
    """A copy of the scripts, for which the made examples are the validation set; its site."""
    content = data.read_bytes()
    sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def make(*contents):
        site = Site(*contents)
        text = (ROOT / "hellaswag.py").read_text()
        lines = text.splitlines()
        for i, line in enumerate(lines):
            if line.startswith("URL = "):
                lines[i] = f'URL = "{site.url}"'
            if line.startswith("SHA1, N_EXAMPLES"):
                lines[i] = f'SHA1, N_EXAMPLES = "{sha1}", 60'
        (tmp_path / "hellaswag.py").write_text("\n".join(lines) + "\n")
        (tmp_path / "train_gpt2.py").write_text((ROOT / "train_gpt2.py").read_text())
        return site

    make.right = (200, len(content), content)
    return make


def test_only_the_right_file_is_kept(tmp_path, copy, folder):
    """An error page, one that pretends to be fine, and a file cut off are not; the right one is."""
    _, length, content = copy.right
    page = b"<html>come back later</html>"
    half = content[: length // 2]
    wrong = [(503, len(page), page), (200, len(page), page), (200, length, half)]
    site = copy(*wrong, (200, len(half), half), copy.right)
    how = dict(script=tmp_path / "hellaswag.py")
    assert site.url in fail(folder, "--device=cpu", **how)
    spec = importlib.util.spec_from_file_location("copied", tmp_path / "hellaswag.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    for _ in range(3):
        with pytest.raises(OSError, match="hellaswag_val.jsonl"):
            copied.load()
        assert not list(tmp_path.glob("hellaswag_val*"))
    assert "/60=" in score(folder, "--device=cpu", **how)[-1]
    path = tmp_path / "hellaswag_val.jsonl"
    assert path.read_bytes() == content
    assert len(copied.load()) == 60 and site.asked == 5
    for changed in (content + content.splitlines()[0], content[: content[:-1].rindex(b"\n")]):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="examples, not 60"):
            copied.load()


def test_ranks_download_once_and_score_every_example_once(tmp_path, copy, folder):
    """Three ranks, and a number that does not divide by three."""
    site = copy(copy.right)
    flags, script = (folder, "--limit=40", "--device=cpu"), tmp_path / "hellaswag.py"
    last = score(*flags, script=script, processes=3)[-1]
    assert site.asked == 1 and "/40=" in last
    assert last == score(*flags, script=script)[-1]


@pytest.mark.parametrize("compile", [0, 1])
def test_in_the_loop(tmp_path, copy, shards, compile):
    """Logged every hella_every steps and at the end, with compile on or off; and the last figure
    is that of the saved folder."""
    copy(copy.right)
    how = [sys.executable, str(tmp_path / "train_gpt2.py"), *TINY, f"--data={shards[0]}"]
    more = [
        f"--log_dir={tmp_path / 'run'}",
        "--T=64",
        f"--compile={compile}",
        "--max_steps=5",
        "--hella_every=2",
    ]
    result = subprocess.run([*how, *more], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = series(tmp_path / "run", "hellaswag")
    assert sorted(found) == [0, 2, 4, 5]
    assert result.stdout.count("HellaSwag acc_norm") == 4
    last = [event for event in log_of(tmp_path / "run") if "hellaswag" in event][-1]
    lines = score(tmp_path / "run" / "hf", "--device=cpu", script=tmp_path / "hellaswag.py")
    assert f"acc_norm {round(60 * last['hellaswag'])}/60" in lines[-1]


def test_training_goes_on_without(tmp_path, copy, shards, text):
    """Told once at start; a text file has nothing to do with it."""
    site = copy((404, 0, b""))
    for data, told in ((shards[0], 1), (text, 0)):
        how = [sys.executable, str(tmp_path / "train_gpt2.py"), *TINY, f"--data={data}"]
        more = [f"--log_dir={tmp_path / 'run'}", "--max_steps=2", "--hella_every=1"]
        result = subprocess.run([*how, *more], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("no HellaSwag: ") == told
        assert not series(tmp_path / "run", "hellaswag")
    assert site.asked == 1


def test_does_not_import_the_training_script():
    code = "import sys, hellaswag; sys.exit('train_gpt2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_two_ranks_in_the_loop(tmp_path, shards):
    """Without the file: both go on."""
    train(f"--data={shards[0]}", f"--log_dir={tmp_path / 'run'}", "--max_steps=2", processes=2)
    assert len(series(tmp_path / "run", "train_loss")) == 2
