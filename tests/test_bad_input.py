"""Bad input of every kind: a clear error, exit code ≠ 0 or HTTP 4xx, no traceback, nothing half written."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.artifact import ONE_LAYER, write_checkpoint
from tests.support.cli import PROGRAM, Cli, environment, run_apart, start


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


# -- the command line itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["compil"], 2, "Did you mean 'compile'?"),
        (["compile"], 2, "Missing argument"),
        (["compile", "m", "--targt", "cpu"], 2, "--targt"),
        (["compile", "m", "--max-context", "many"], 2, "--max-context"),
        (["compile", "m", "--max-context", "0"], 2, "--max-context 0 is out of range"),
        (["compile", "m", "--max-requests", "-3"], 2, "--max-requests -3 is out of range"),
        (["compile", "no-such-model"], 3, "Bundled: deepseek-v4-flash"),
        (["compile", "m", "--target", "mi355"], 1, "Did you mean mi355x? Known targets: cpu"),
        (["compile", "deepseek-v4-flash"], 3, "--no-weights"),
        (["compile", "m", "--stop-after", "fuse_nothing"], 2, "choose one of canonicalize"),
        (["inspect", "nowhere.atom"], 1, "is not an artifact folder"),
        (["explain", "nowhere.atom"], 1, "is not an artifact folder"),
        (["generate", "nowhere.atom", "hi"], 1, "is not an artifact folder"),
        (["eval", "nowhere.atom", "text.txt"], 2, "text.txt cannot be read: No such file"),
        (["serve", "nowhere.atom", "--port", "0"], 1, "is not an artifact folder"),
        (["serve", "a.atom", "--host", "203.0.113.7"], 2, "cannot listen on 203.0.113.7"),
        (["serve", "a.atom", "--log-level", "loud"], 2, "--log-level loud"),
    ],
)
def test_bad_arguments(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cli(*args).failed(code, said)
    assert names(tmp_path) == []
    error = cli(*args, "--json")
    if "serve" not in args:  # it has no --json
        assert error.err == ""
        assert error.code == code
        assert error.json["error"]["exit_code"] == code
        assert said in error.json["error"]["message"]


def test_outputs_that_cannot_be_written(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    model, file = write_checkpoint(tmp_path / "model", **ONE_LAYER), tmp_path / "file"
    file.write_text("mine")
    cli("compile", model, "-o", file).failed(1, "is not an artifact; choose another output path")
    cli("compile", model, "-o", file / "x.atom").failed(1, "cannot write")
    cli("compile", model, "-o", tmp_path / "x.atom", "--dump-ir", file).failed(2, "--dump-ir", "is a file")
    cli("inspect", artifact, "--html", tmp_path / "no" / "x.html").failed(2, "--html", "does not exist")
    cli("inspect", artifact, "--html", tmp_path).failed(2, "--html", "is a folder")
    assert names(tmp_path) == ["file", "model"]
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--temperature", "-1"], "temperature is -1; it must be in [0, 2]"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-p", "0"], "top_p is 0; it must be in (0, 1]"),
        (["--top-k", "-2"], "top_k is -2"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--stop", ""], "each stop string must have 1 to"),
        (["--memory", "lots"], "--memory lots"),
        (["--memory", "1K"], "do not hold the state"),
        (["--max-tokens", "400"], "the model's context holds 320 tokens"),
    ],
)
def test_bad_sampling(cli: Cli, artifact: Path, args: list[str], said: str) -> None:
    ran = cli("generate", artifact, "hello", *args)
    ran.failed(2 if "lots" in args else 1, said)


def test_a_prompt_longer_than_the_context(cli: Cli, artifact: Path) -> None:
    cli("generate", artifact, "q" * 500).failed(1, "501 tokens", "the model's context holds 320 tokens")
    cli("generate", artifact, "fine", "q" * 500).failed(1, "501 tokens")  # before the first is answered
    error = cli("generate", artifact, "q" * 500, "--json").json["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"\xff\xfe", "is not UTF-8 at byte 0"),
        ("a.txt", b"", "no text to score"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}\n', "line 2"),
        ("a.jsonl", b'{"text": "x"\n', "line 1"),
        ("a.jsonl.xz", b"not xz", "is no whole xz file"),
        ("a.csv", b"x", "give a .txt, .jsonl or .jsonl.xz file"),
    ],
)
def test_bad_texts(cli: Cli, artifact: Path, tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    ran = cli("eval", artifact, tmp_path / name)
    ran.failed(1 if not data else 2, said)


# -- models ------------------------------------------------------------------------------------------------------------


def test_an_illegal_value_in_the_configuration(cli: Cli, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", **ONE_LAYER)
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_attention_heads": -8, "sliding_window": "wide"}))
    ran = cli("compile", model, "-o", tmp_path / "x.atom")
    ran.failed(3, "num_attention_heads", "-8", "sliding_window", "wide")
    error = cli("compile", model, "-o", tmp_path / "x.atom", "--json").json["error"]
    assert len(error["problems"]) == 2
    path.write_text("{")
    cli("compile", model, "-o", tmp_path / "x.atom").failed(3, "config.json")
    path.unlink()
    cli("compile", model, "-o", tmp_path / "x.atom").failed(3, "config.json")
    assert names(tmp_path) == ["model"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _break_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 0x80
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _break_header, Path.unlink])
def test_a_corrupt_shard(cli: Cli, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    model = write_checkpoint(tmp_path / "model", **ONE_LAYER)
    shard = sorted(model.glob("*.safetensors"))[0]
    damage(shard)
    cli("compile", model, "-o", tmp_path / "x.atom").failed(4, shard.name)
    assert names(tmp_path) == ["model"]


# -- damaged artifacts -------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    """One bit, anywhere."""
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": _truncate, "flipped": _flip, "removed": Path.unlink}


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(artifact, tmp_path / "copy.atom")


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_found(cli: Cli, copy: Path, damage: str) -> None:
    files = sorted(f for f in copy.rglob("*") if f.is_file())
    assert len(files) > 15
    for file in files:
        whole = file.read_bytes()
        DAMAGES[damage](file)
        for args in (("inspect", copy), ("explain", copy), ("generate", copy, "hello", "--max-tokens", "1")):
            cli(*args).failed(1, file.relative_to(copy).as_posix())
        file.write_bytes(whole)
    assert cli("inspect", copy).code == 0


def test_any_flipped_bit_of_the_manifest_is_found(cli: Cli, copy: Path) -> None:
    """The manifest has no hash in a manifest: it must notice by itself."""
    path = copy / "manifest.json"
    whole = path.read_bytes()
    for _ in range(40):
        _flip(path)
        cli("inspect", copy).failed(1, "manifest.json")
        path.write_bytes(whole)


def test_a_file_too_many_is_found(cli: Cli, copy: Path) -> None:
    (copy / "plan" / "extra.json").write_text("{}")
    cli("inspect", copy).failed(1, "plan/extra.json: not part of the artifact")


def test_an_artifact_for_another_use(cli: Cli, copy: Path, tmp_path: Path) -> None:
    cli("inspect", tmp_path).failed(1, "is not a whole artifact")
    cli("inspect", copy, "--plan", "layer_nine").failed(2, "choose one of prologue")
    cli("explain", copy, "--region", "layer_nine").failed(2, "choose one of prologue")
    cli("explain", copy, "--pass", "fuse_nothing").failed(2, "choose one of canonicalize")


# -- no room, no reader, no patience -----------------------------------------------------------------------------------


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.slow
def test_no_disk_space_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the write fails in the same way, in the middle."""
    model = write_checkpoint(tmp_path / "model", **ONE_LAYER)
    ran = run_apart("compile", model, "-o", tmp_path / "x.atom", before=_small_files)
    ran.failed(1, "cannot write")
    assert names(tmp_path) == ["model"]


def test_no_disk_space_for_a_picture_leaves_nothing(artifact: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    run_apart("inspect", artifact, "--html", tmp_path / "x.html", before=limit).failed(1, "cannot write")
    assert names(tmp_path) == []


def test_a_full_device_as_standard_output() -> None:
    with open("/dev/full", "w") as full:
        ran = run_apart("targets", stdout=full)
    assert ran.code == 1
    assert ran.err == "error: cannot write the output: No space left on device.\n"


def test_a_reader_that_leaves_ends_the_command_quietly(artifact: Path) -> None:
    process = start("inspect", artifact, "--plan", "layer_csa_topk")
    process.stdout.close()  # type: ignore[union-attr]
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_compile_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    model, dump = write_checkpoint(tmp_path / "model", **ONE_LAYER), tmp_path / "ir"
    process = start("compile", model, "-o", tmp_path / "x.atom", "--dump-ir", dump)
    deadline = time.monotonic() + 60
    while not dump.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert out == ""
    assert names(tmp_path) == ["ir", "model"]


# -- HTTP --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[str]:
    """The address of a server that every test of this file may use at once."""
    command = [*PROGRAM, "serve", str(artifact), "--port", "0", "--name", "tiny", "--log-level", "warning"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline() for _ in range(3)]  # type: ignore[union-attr]
        assert "/v1/completions" in lines[2], process.stderr.read()  # type: ignore[union-attr]
        url = lines[2].split()[0].removesuffix("/v1/completions")
        while not _is_up(url):
            assert process.poll() is None
            time.sleep(0.05)
        yield url
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health"):
            return True
    except OSError:
        return False


def _post(url: str, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"{url}/v1/completions", data) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"temperature": -1}, 400, "invalid_value", "temperature"),
        ({"prompt": "q" * 500}, 400, "context_length_exceeded", "prompt"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": "three"}, 400, "invalid_type", "max_tokens"),
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"prompt": [999]}, 400, "invalid_value", "prompt"),
        ({"logit_bias": {"1": 2}}, 400, "unsupported_parameter", "logit_bias"),
    ],
)
def test_bad_requests_get_openais_error(
    server: str, change: dict[str, Any], status: int, code: str, param: str
) -> None:
    found, body = _post(server, {"model": "tiny", "prompt": "hello", "max_tokens": 2, **change})
    assert found == status
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)


def test_a_body_that_is_no_json(server: str) -> None:
    status, body = _post(server, b"{")
    assert (status, body["error"]["code"]) == (400, "invalid_json")


def test_a_client_that_leaves_frees_its_request(server: str) -> None:
    """Every slot is taken by a stream that would last; all clients hang up; the next request is served at once."""
    host, port = server.removeprefix("http://").split(":")
    fields = {"model": "tiny", "prompt": "hello", "max_tokens": 300, "stream": True, "ignore_eos": True}
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    clients = [socket.create_connection((host, int(port))) for _ in range(4)]
    for client in clients:
        client.sendall(head + body)
        assert client.recv(200).startswith(b"HTTP/1.1 200")
        client.close()
    deadline = time.monotonic() + 30
    while (running := _running(server)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running == 0
    status, answer = _post(server, {"model": "tiny", "prompt": "hello", "max_tokens": 2, "ignore_eos": True})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 2)


def _running(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("atomc_requests_running"))
