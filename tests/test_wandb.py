"""Weights & Biases: one run for one training, and training goes on without the service."""

import json
import struct

import pytest
from conftest import load, log_of, run, series, train

WANDB = ["--max_steps=2", "--wandb_log=1"]


def records(path):
    """The records of a .wandb file, which is LevelDB's log format: chunks with a checksum, a
    length and a kind, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2 as protobuf

    content, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield protobuf.Record.FromString(b"".join(parts))
            parts = []


def run_and_history(path):
    """What a launch has sent: the run, and [{name: value}] with _step."""
    launched, history = None, []
    for record in records(path):
        if record.WhichOneof("record_type") == "run":
            launched = record.run
        elif record.WhichOneof("record_type") == "history":
            items = {item.nested_key[0]: item.value_json for item in record.history.item}
            history.append({name: json.loads(value) for name, value in items.items()})
    return launched, history


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_one_run_for_one_training(text, tmp_path, offline):
    """Three launches: to step 10, from step 5 again (as after a kill), and with more steps. They
    have one id, and steps that are repeated have the same values."""
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--wandb_log=1", "--save_every=5"
    flags += "--sample_every=5", "--init_from=resume", "--warmup_steps=0", "--min_lr=8e-3"
    train(*flags, "--max_steps=10")
    (tmp_path / "log" / "ckpt_000010.pt").unlink()
    train(*flags, "--max_steps=10")
    train(*flags, "--max_steps=12")

    launches = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)
    assert len(launches) == 3
    runs, histories = zip(*map(run_and_history, launches), strict=True)
    ids = {launched.run_id for launched in runs}
    first_line = json.loads((tmp_path / "log" / "log.jsonl").read_text().splitlines()[0])
    assert ids == {first_line["run_id"], load(tmp_path / "log" / "ckpt_000012.pt")["run_id"]}
    assert {launched.project for launched in runs} == {"gpt2"}
    assert [history[0]["_step"] for history in histories] == [0, 5, 10]

    # what the service keeps: the first value that it gets for a step
    for name in ("train_loss", "val_loss", "grad_norm"):
        kept = {}
        for event in sum(histories, []):
            if name in event:
                assert kept.setdefault(event["_step"], event[name]) == event[name]
        assert kept == series(tmp_path / "log", name)


def test_all_samples_of_a_step_in_one_event(text, tmp_path, offline):
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", *WANDB, "--sample_every=2"
    train(*flags, "--n_samples=3")
    texts = [event["sample"] for event in log_of(tmp_path / "log") if "sample" in event]
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    _, history = run_and_history(path)
    assert [event["sample"] for event in history if "sample" in event] == ["\n\n".join(texts)]
    assert len(texts) == 3


def test_wandb_that_is_not_installed(text, tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "wandb.py").write_text("raise ImportError(\"No module named 'wandb'\")")
    path = {"PYTHONPATH": str(tmp_path / "path")}
    result = run(f"--data={text}", f"--log_dir={tmp_path}/log", *WANDB, env=path)
    assert result.returncode == 1 and "No module named 'wandb'" in result.stderr


def test_without_a_login(text, tmp_path):
    """A warning; the run goes on offline."""
    flags = [f"--data={text}", f"--log_dir={tmp_path}/log", *WANDB]
    home = {"HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "netrc")}
    result = train(*flags, env={**home, "WANDB_DIR": str(tmp_path)})
    assert "warning: Weights & Biases" in result.stdout and "wandb login" in result.stdout
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(series(tmp_path / "log", "train_loss")) == 2


def test_a_service_that_cannot_be_reached(text, tmp_path):
    """A warning after WANDB_INIT_TIMEOUT seconds; the run goes on offline."""
    flags = [f"--data={text}", f"--log_dir={tmp_path}/log", *WANDB]
    env = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    env |= {"WANDB_INIT_TIMEOUT": "2", "WANDB_DIR": str(tmp_path)}
    result = train(*flags, env=env)
    assert "warning: Weights & Biases" in result.stdout
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(series(tmp_path / "log", "train_loss")) == 2


def test_a_launch_that_is_refused_begins_no_run(text, tmp_path, offline):
    flags = f"--data={text}", f"--log_dir={tmp_path}/log", "--wandb_log=1"
    assert run(*flags, "--total_batch_size=65536000").returncode == 1
    assert not (tmp_path / "wandb").exists()
