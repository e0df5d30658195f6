"""API keys, limits and the access log, as the official clients meet them."""

import asyncio
import hashlib
import re
import signal

import anthropic
import openai
import pytest

from cluster import Cluster, stream, wait

ASK = [{"role": "user", "content": "What is a dog?"}]
DOG = "A dog is a member of the genus Canis."


def line(label, secret, limits=""):
    return f"{label}:{hashlib.sha256(secret.encode()).hexdigest()} {limits}\n"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# who may\n" + line("alice", "sk-alice") + line("bob", "sk-bob", "concurrency=1") +
                    line("carol", "sk-carol", "tokens_per_minute=30"))
    return path


@pytest.fixture(scope="module")
def served(keys):
    with Cluster("--api-key-file", keys, "--access-log", "on", "--cors-allow-origin", "*") as c:
        yield c
        c.wait_idle()


def chat(cluster, key, **kw):
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key=key, max_retries=0) as client:
        r = client.chat.completions.with_raw_response.create(
            model="demo-model", messages=ASK, temperature=0, **kw,
            extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        return r.parse(), r.headers


def test_keys(served):
    assert chat(served, "sk-alice")[0].choices[0].message.content == DOG
    with pytest.raises(openai.AuthenticationError) as e:
        chat(served, "sk-mallory")
    assert e.value.code == "invalid_api_key"
    with anthropic.Anthropic(base_url=served.url, api_key="sk-alice", max_retries=0) as client:
        m = client.messages.create(model="demo-model", max_tokens=50, messages=ASK, extra_body={"temperature": 0})
        assert m.content[0].text == DOG
        with pytest.raises(anthropic.AuthenticationError) as e:
            client.with_options(api_key="sk-mallory").messages.create(model="demo-model", max_tokens=5, messages=ASK)
        assert e.value.body["error"]["type"] == "authentication_error"
    assert served.get("/health")[0] == served.get("/ready")[0] == 200
    assert served.get("/metrics")[0] == served.get("/v1/models")[0] == 401


def test_one_at_a_time(served):
    """A second request of the key is refused while the first one runs, and not after it."""
    async def run():
        body = {"messages": ASK, "stream": True, "ignore_eos": True, "max_tokens": 4000}
        second = {}

        def on_event(a):
            if len(a.events) == 3:
                with pytest.raises(openai.RateLimitError) as e:
                    chat(served, "sk-bob")
                second["headers"] = e.value.response.headers
                second["code"] = e.value.code

        first = await stream(served, "/v1/chat/completions", body, leave_after=5, on_event=on_event,
                             headers={"Authorization": "Bearer sk-bob"})
        assert first.left
        return second

    second = asyncio.run(run())
    assert second["code"] == "rate_limit_exceeded" and int(second["headers"]["retry-after"]) >= 1
    assert second["headers"]["x-ratelimit-limit-requests"] == "1"
    served.wait_idle()
    assert chat(served, "sk-bob")[0].choices[0].message.content == DOG


def test_tokens_per_minute(served):
    left = []
    for _ in range(2):  # 24 tokens each
        left.append(int(chat(served, "sk-carol")[1]["x-ratelimit-remaining-tokens"]))
    assert left[0] == 30 and 6 <= left[1] <= 20
    with pytest.raises(openai.RateLimitError) as e:
        chat(served, "sk-carol")
    assert 1 <= int(e.value.response.headers["retry-after"]) <= 60
    assert "tokens per minute" in e.value.body["message"]


def test_reading_again(served, keys):
    text = keys.read_text()
    keys.write_text(text + line("dave", "sk-dave"))
    served.kill("router", signal.SIGHUP)
    wait(lambda: "keys=4 read again" in served.log(), 5, "the keys are read again", served.log)
    assert chat(served, "sk-dave")[0].choices[0].message.content == DOG
    keys.write_text("nonsense\n")
    served.kill("router", signal.SIGHUP)
    wait(lambda: "the old keys stay" in served.log(), 5, "the refusal is logged", served.log)
    assert chat(served, "sk-dave")[0].choices[0].message.content == DOG


def test_access_log(served):
    chat(served, "sk-alice", user="somebody", extra_headers={"X-Request-Id": "find-me"})

    def logged():
        return re.search(r"access req=find-me key=alice path=/v1/chat/completions status=200 stream=0 "
                         r"prompt=10 cached=\d+ output=14 ms=\d+", served.log())

    wait(logged, 5, "the request is in the log", served.log)
    log = served.log()
    assert re.search(r"access req=\S+ key=- path=/v1/chat/completions status=401 refused", log)
    for secret in ("sk-alice", "sk-mallory", "What is a dog", "genus", hashlib.sha256(b"sk-alice").hexdigest()):
        assert secret not in log


@pytest.mark.parametrize("text, why", [("", "no key"), ("nonsense\n", "line 1"), (None, "keys")])
def test_bad_files(tmp_path, start, text, why):
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    c = start("--api-key-file", path, wait=False)
    wait(lambda: c.process.poll() is not None or why in c.log(), 10, "the start fails", c.log)
    assert why in c.log()
