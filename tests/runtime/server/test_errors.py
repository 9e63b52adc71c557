"""What the server answers when something is wrong: OpenAI's error bodies, right statuses, nobody left hanging."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.serving import SERVING, Running, serving

MODEL = SERVING.model_name
USER = [{"role": "user", "content": "hello"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def slowly(step: int) -> None:
    time.sleep(0.01)


@pytest.fixture(scope="module")
def server(tokenizer_path: Path) -> Iterator[Running]:
    with serving(tokenizer_path, before_step=slowly) as running:
        yield running


CASES: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (COMPLETIONS, {"prompt": "x", "temperature": -1}, 400, "temperature", "invalid_value"),
    (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, 400, "temperature", "invalid_type"),
    (COMPLETIONS, {"prompt": "x", "top_p": 0}, 400, "top_p", "invalid_value"),
    (COMPLETIONS, {"prompt": "x", "top_k": -5}, 400, "top_k", "invalid_value"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 5000}, 400, "max_tokens", "context_length_exceeded"),
    (COMPLETIONS, {"prompt": "x y" * 5000}, 400, "prompt", "context_length_exceeded"),
    (COMPLETIONS, {"prompt": [5, 100000]}, 400, "prompt", "invalid_value"),
    (COMPLETIONS, {"prompt": [5, "a"]}, 400, "prompt", "invalid_type"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "invalid_type"),
    (COMPLETIONS, {"prompt": None}, 400, "prompt", "invalid_type"),
    (COMPLETIONS, {"prompt": {"a": 1}}, 400, "prompt", "invalid_type"),
    (COMPLETIONS, {}, 400, "prompt", "invalid_type"),
    (COMPLETIONS, {"prompt": "x", "n": 0}, 400, "n", "invalid_value"),
    (COMPLETIONS, {"prompt": "x", "n": 1000}, 400, "n", "invalid_value"),
    (COMPLETIONS, {"prompt": ["x"] * 20, "n": 20}, 400, "n", "invalid_value"),
    (COMPLETIONS, {"prompt": "x", "stop": ["a"] * 20}, 400, "stop", "invalid_value"),
    (COMPLETIONS, {"prompt": "x", "logprobs": 50}, 400, "logprobs", "invalid_value"),
    (COMPLETIONS, {"prompt": "x", "seed": 2**70}, 400, "seed", "invalid_value"),
    (COMPLETIONS, {"prompt": "x", "presence_penalty": 1.5}, 400, "presence_penalty", "unsupported_parameter"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias", "unsupported_parameter"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, 400, "suffix", "unsupported_parameter"),
    (COMPLETIONS, {"prompt": "x", "best_of": 3}, 400, "best_of", "unsupported_parameter"),
    (COMPLETIONS, {"prompt": "x", "echo": True, "logprobs": 1}, 400, "echo", "unsupported_parameter"),
    (COMPLETIONS, {"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
    (COMPLETIONS, {"prompt": "x", "model": "gpt-9"}, 404, "model", "model_not_found"),
    (CHAT, {"messages": USER, "model": "gpt-9"}, 404, "model", "model_not_found"),
    (CHAT, {"messages": USER, "temperature": -1}, 400, "temperature", "invalid_value"),
    (CHAT, {"messages": []}, 400, "messages", "invalid_value"),
    (CHAT, {"messages": "hello"}, 400, "messages", "invalid_type"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages", "invalid_type"),
    (CHAT, {}, 400, "messages", "invalid_type"),
    (CHAT, {"messages": [{"role": "user", "content": "x " * 5000}]}, 400, "prompt", "context_length_exceeded"),
    (CHAT, {"messages": USER, "top_logprobs": 3}, 400, "top_logprobs", "invalid_value"),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 30}, 400, "top_logprobs", "invalid_value"),
    (CHAT, {"messages": USER, "response_format": {"type": "regex"}}, 400, "response_format", "unsupported_parameter"),
    (CHAT, {"messages": USER, "chat_template_kwargs": {"a": 1}}, 400, "chat_template_kwargs", "unsupported_parameter"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        400,
        "messages[0].content",
        "unsupported_content",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "param", "code"), CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(
    server: Running, path: str, body: dict[str, Any], status: int, param: str | None, code: str, stream: bool
) -> None:
    if stream and "stream_options" in body:
        pytest.skip("stream_options are right in a stream")
    answer = server.http.post(path, json={"model": MODEL, "stream": stream} | body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert not server.engine.active


@pytest.mark.parametrize("raw", [b"{bad", b"", b"[1]", b"\xff\xfe", b'{"prompt": "x"}', b'{"model": 3, "prompt": "x"}'])
def test_bodies_that_are_no_requests(server: Running, raw: bytes) -> None:
    answer = server.http.post(COMPLETIONS, content=raw)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_a_body_beyond_all_bounds(server: Running) -> None:
    answer = server.http.post(COMPLETIONS, content=b" " * (33 * 2**20))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_unknown_paths_and_methods(server: Running) -> None:
    assert server.http.get("/v2/nothing").status_code == 404
    assert server.http.get("/v2/nothing").json()["error"]["type"] == "invalid_request_error"
    assert server.http.get(COMPLETIONS).status_code == 405
    assert "error" in server.http.get(COMPLETIONS).json()


def test_openais_client_raises_its_own_errors(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        server.openai.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError, match=r"\[0, 2\]"):
        server.openai.completions.create(model=MODEL, prompt="x", temperature=-1)


def test_models_health_metrics(server: Running) -> None:
    assert [model.id for model in server.openai.models.list()] == [MODEL]
    assert server.openai.models.retrieve(MODEL).id == MODEL
    assert server.http.get("/v1/models/none").status_code == 404
    health = server.http.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "ready"})
    metrics = server.http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "atomc_requests_running" in metrics.text


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_requests(server: Running, path: str, stream: bool) -> None:
    what: dict[str, Any] = {"prompt": "x"} if path == COMPLETIONS else {"messages": USER}
    body = {"model": MODEL, "ignore_eos": True, "max_tokens": 2000, "n": 3, "stream": stream} | what
    before = server.engine.engine.metrics.registry.get_sample_value("atomc_requests_total", {"reason": "abort"}) or 0
    if stream:
        with server.http.stream("POST", path, json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(8):
                next(lines)
            assert server.engine.active == 3
    else:
        with pytest.raises(Exception, match="timed out"):
            server.http.post(path, json=body, timeout=0.3)
    server.wait_until_idle()
    after = server.engine.engine.metrics.registry.get_sample_value("atomc_requests_total", {"reason": "abort"}) or 0
    assert after == before + 3


def test_openais_client_cancels_a_stream(server: Running) -> None:
    stream = server.openai.completions.create(
        model=MODEL, prompt="x", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    next(stream)
    stream.close()
    server.wait_until_idle()


def failing(step: int) -> None:
    time.sleep(0.01)
    if step == 20:
        raise RuntimeError("the device is gone")


def test_an_engine_failure_reaches_running_clients_and_later_ones(tokenizer_path: Path) -> None:
    with serving(tokenizer_path, before_step=failing) as server:
        made: dict[str, Any] = {"model": MODEL, "prompt": "x", "max_tokens": 1000, "extra_body": {"ignore_eos": True}}

        def whole() -> Exception:
            with pytest.raises(openai.InternalServerError, match="the device is gone") as caught:
                server.openai.completions.create(**made)
            return caught.value

        def streamed() -> Exception:
            with pytest.raises(openai.APIError, match="the device is gone") as caught:
                list(server.openai.completions.create(**made, stream=True))
            return caught.value

        with ThreadPoolExecutor(6) as pool:
            jobs = [pool.submit(whole if number % 2 else streamed) for number in range(6)]
            errors = [job.result(timeout=20) for job in jobs]
        assert len(errors) == 6
        later = server.http.post(COMPLETIONS, json={"model": MODEL, "prompt": "x"})
        assert later.status_code == 503
        assert later.headers["retry-after"] == "1"
        health = server.http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed"})


def test_a_full_queue_is_503(tokenizer_path: Path) -> None:
    with serving(tokenizer_path, before_step=slowly, max_waiting=0) as server:
        many = server.http.post(COMPLETIONS, json={"model": MODEL, "prompt": "x", "n": SERVING.max_requests + 1})
        assert many.status_code == 503
        assert "full" in many.json()["error"]["message"]


@pytest.mark.parametrize("drain_seconds", [20.0, 0.0])
def test_shutdown_ends_answers_or_says_why_not(tokenizer_path: Path, drain_seconds: float) -> None:
    with serving(tokenizer_path, before_step=slowly, drain_seconds=drain_seconds) as server:
        body = {"model": MODEL, "prompt": "x", "ignore_eos": True, "max_tokens": 60, "stream": True}
        with server.http.stream("POST", COMPLETIONS, json=body) as answer:
            lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
            next(lines)
            server.server.should_exit = True
            events = list(lines)
        assert events[-1] == "[DONE]"
        last = json.loads(events[-2])
        if drain_seconds:
            assert last["choices"][0]["finish_reason"] == "length"
        else:
            assert last["error"]["message"] == "The server is shutting down."


def test_while_draining_new_requests_are_refused(tokenizer_path: Path) -> None:
    with serving(tokenizer_path, before_step=slowly, drain_seconds=20) as server:
        body = {"model": MODEL, "prompt": "x", "ignore_eos": True, "max_tokens": 100}
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.http.post, COMPLETIONS, json=body)
            while not server.engine.active:
                time.sleep(0.01)
            server.server.should_exit = True
            while server.engine.status == "ready":
                time.sleep(0.01)
            refused = server.http.post(COMPLETIONS, json=body)
            assert refused.status_code == 503
            assert server.http.get("/health").json() == {"status": "stopping"}
            assert running.result(timeout=20).status_code == 200
