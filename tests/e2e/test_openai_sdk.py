"""The official OpenAI client, and every other route by hand."""

import json

import openai
import pytest

from cluster import gather

ASK = [{"role": "user", "content": "What is a dog?"}]
DOG = "A dog is a member of the genus Canis."
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture
def client(cluster):
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0) as c:
        yield c


def chat(client, messages=ASK, extra=NO_THINKING, **kw):
    return client.chat.completions.create(model="demo-model", messages=messages,
                                          **{"temperature": 0, "extra_body": extra, **kw})


def test_models(client):
    assert [m.id for m in client.models.list().data] == ["demo-model"]
    assert client.models.retrieve("demo-model").object == "model"


def test_chat(client):
    r = chat(client)
    assert r.object == "chat.completion" and r.model == "demo-model" and r.id
    assert r.choices[0].message.role == "assistant"
    assert r.choices[0].message.content == DOG
    assert r.choices[0].finish_reason == "stop"
    assert r.usage.prompt_tokens == 10 and r.usage.completion_tokens == 14
    assert r.usage.total_tokens == 24


def test_thinking(client):
    r = chat(client, [{"role": "user", "content": "Define computer."}], extra={})
    m = r.choices[0].message
    assert m.reasoning_content == "The user asks about the word computer. I will give its meaning."
    assert m.content.startswith("A compute") and "think>" not in m.content


def test_chat_stream(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == DOG
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 14
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_stream_without_usage(client):
    assert all(c.choices and c.usage is None for c in chat(client, stream=True))


def test_tool_call(client):
    tools = [{"type": "function", "function": {
        "name": "set_light", "description": "Switch a light", "parameters": {
            "type": "object", "properties": {"room": {"type": "string"}, "on": {"type": "boolean"}},
            "required": ["room", "on"]}}}]
    ask = [{"role": "user", "content": "Turn on the light in the garage."}]
    r = chat(client, ask, tools=tools)
    assert r.choices[0].finish_reason == "tool_calls"
    call = r.choices[0].message.tool_calls[0]
    assert call.type == "function" and call.function.name == "set_light"
    assert json.loads(call.function.arguments) == {"room": "garage", "on": True}

    name, arguments = "", ""
    for c in chat(client, ask, tools=tools, stream=True):
        for t in c.choices[0].delta.tool_calls or []:
            assert t.index == 0
            name += t.function.name or ""
            arguments += t.function.arguments or ""
    assert (name, json.loads(arguments)) == ("set_light", {"room": "garage", "on": True})


def test_helpers(client):
    kw = dict(model="demo-model", messages=ASK, temperature=0, extra_body=NO_THINKING)
    with client.chat.completions.stream(**kw, stream_options={"include_usage": True}) as s:
        kinds = {e.type for e in s}
        final = s.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == DOG and final.usage.completion_tokens == 14
    assert client.beta.chat.completions.parse(**kw).choices[0].message.content == DOG


def test_stop(client):
    r = chat(client, stop=["genus", "never"])
    assert r.choices[0].message.content == "A dog is a member of the "
    assert r.choices[0].finish_reason == "stop"
    streamed = "".join(c.choices[0].delta.content or "" for c in chat(client, stop="genus", stream=True))
    assert streamed == "A dog is a member of the "


def test_max_tokens(client):
    r = chat(client, max_tokens=3)
    assert r.choices[0].finish_reason == "length" and r.usage.completion_tokens == 3
    assert chat(client, max_completion_tokens=3).usage.completion_tokens == 3


def test_seed_and_n(client):
    story = [{"role": "user", "content": "Tell me a story about a fox."}]
    sampled = dict(messages=story, temperature=1, max_tokens=30)

    def texts(**kw):
        return [c.message.content for c in sorted(chat(client, **sampled, **kw).choices,
                                                  key=lambda c: c.index)]

    a, b, other = texts(seed=7, n=3), texts(seed=7, n=3), texts(seed=8, n=3)
    assert len(a) == 3 and a == b and a != other
    assert len(set(a)) > 1, "choices of one request differ"
    r = chat(client, **sampled, seed=7, n=3)
    assert r.usage.completion_tokens == 90


def test_logprobs(client):
    r = chat(client, logprobs=True, top_logprobs=3)
    tokens = r.choices[0].logprobs.content
    assert "".join(t.token for t in tokens).startswith(DOG)
    for t in tokens:
        assert -1e-2 < t.logprob <= 1e-6 and len(t.top_logprobs) == 3
        assert t.top_logprobs[0].token == t.token
        assert bytes(t.bytes).decode() == t.token


def ids_of(cluster, text):
    return cluster.post("/tokenize", {"prompt": text})[2]["tokens"]


def test_logit_bias(client, cluster):
    the, = ids_of(cluster, " the")
    without = chat(client, logit_bias={str(the): -100}, max_tokens=12).choices[0].message.content
    assert " the " not in without and without.startswith("A dog is a member of")
    always = chat(client, logit_bias={str(the): 100}, max_tokens=4)
    assert always.choices[0].message.content == " the" * 4
    assert chat(client, logit_bias={str(the): 0}).choices[0].message.content == DOG


def test_parts_roles_and_prefill(client):
    def parts(*texts):
        return [{"type": "text", "text": t} for t in texts]

    assert chat(client, [{"role": "user", "content": parts("What is ", "a dog?")}]).choices[0].message.content == DOG
    system, developer = (chat(client, [{"role": role, "content": "Be brief."}, *ASK]).usage.prompt_tokens
                         for role in ("system", "developer"))
    assert system == developer > 10
    prefill = {**NO_THINKING, "add_generation_prompt": False, "continue_final_message": True}
    r = chat(client, [*ASK, {"role": "assistant", "content": "A dog is a member"}], extra=prefill)
    assert r.choices[0].message.content == " of the genus Canis."


def test_tool_results(client):
    """A call and its answer go back, the result as a string and as parts."""
    tools = [{"type": "function", "function": {"name": "get_time", "description": "Get the current time",
                                               "parameters": {"type": "object", "properties": {}}}}]
    ask = [{"role": "user", "content": "What time is it?"}]
    message = chat(client, ask, tools=tools).choices[0].message
    assert [c.function.arguments for c in message.tool_calls] == ["{}"] and message.content is None
    texts = []
    for content in ('{"time": "12:34"}', [{"type": "text", "text": '{"time": '}, {"type": "text", "text": '"12:34"}'}]):
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": content}
        texts.append(chat(client, [*ask, message, result], tools=tools).choices[0].message.content)
    assert texts == ["It is 12:34."] * 2
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, ask, tool_choice="required")
    assert e.value.param == "tool_choice"


def test_accepted_and_ignored(client):
    r = chat(client, user="u", metadata={"a": "b"}, store=False, service_tier="auto")
    assert r.choices[0].message.content == DOG


def test_best_of(client):
    kw = dict(model="demo-model", prompt="Once upon ", temperature=1, max_tokens=16, seed=3, logprobs=0)

    def mean(choice):
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    all_ = client.completions.create(**kw, n=4).choices
    best = client.completions.create(**kw, n=2, best_of=4)
    assert [c.text for c in best.choices] == [c.text for c in sorted(all_, key=mean, reverse=True)[:2]]
    assert best.usage.completion_tokens == 64


def test_completions(client):
    r = client.completions.create(model="demo-model", prompt="What is AI? ", temperature=0, max_tokens=64)
    assert r.object == "text_completion"
    assert r.choices[0].text.startswith("AI is the branch of computer science")
    assert r.choices[0].finish_reason == "stop"
    several = client.completions.create(model="demo-model", prompt=["What is AI? ", "What is AI? "],
                                        temperature=0, max_tokens=8)
    assert [c.index for c in several.choices] == [0, 1]
    assert several.choices[0].text == several.choices[1].text
    echo = client.completions.create(model="demo-model", prompt="What is AI? ", temperature=0,
                                     max_tokens=2, echo=True)
    assert echo.choices[0].text.startswith("What is AI? AI")
    streamed = "".join(c.choices[0].text for c in client.completions.create(
        model="demo-model", prompt="What is AI? ", temperature=0, max_tokens=64, stream=True))
    assert streamed == r.choices[0].text


def test_prompt_of_ids(client):
    r = client.completions.create(model="demo-model", temperature=0, max_tokens=32,
                                  prompt=[3002, 3004, 3007, 434, 308, 262, 700, 30, 3008, 3022])
    assert r.choices[0].text == DOG


@pytest.mark.parametrize("bad, param", [
    (dict(temperature=-1), "temperature"),
    (dict(top_p=2), "top_p"),
    (dict(n=0), "n"),
    (dict(max_tokens=-5), "max_tokens"),
    (dict(presence_penalty=9), "presence_penalty"),
    (dict(top_logprobs=3), "top_logprobs"),
    (dict(stop=["a"] * 40), "stop"),
    (dict(messages=[]), "messages"),
])
def test_bad_request(client, bad, param):
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, **bad)
    assert e.value.param == param and e.value.body["message"]


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as e:
        client.chat.completions.create(model="gpt-9", messages=ASK)
    assert e.value.code == "model_not_found"


def test_too_long(client):
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, [{"role": "user", "content": "a dog " * 5000}])
    assert e.value.code == "context_length_exceeded" and "maximum context length" in str(e.value)


def test_client_timeout(client):
    """The client gives up; the request must not go on without it (the fixture checks that)."""
    with pytest.raises(openai.APITimeoutError):
        chat(client, [{"role": "user", "content": "Tell me a story about a fox."}],
             extra={**NO_THINKING, "ignore_eos": True}, max_tokens=3000, timeout=0.1)


# ---- the other routes ----

def test_generate(cluster):
    status, _, r = cluster.post("/generate", {"inputs": "What is AI? ", "parameters": {
        "do_sample": False, "max_new_tokens": 64, "return_details": True}})
    assert status == 200
    text = r["generated_text"]
    text = text[0] if isinstance(text, list) else text
    assert text.startswith("AI is the branch")
    assert r["count_output_tokens"] == len(r["tokens"]) == 19
    assert r["finish_reason"] == "stop"


def test_generate_stream(cluster):
    a, = gather(cluster, "/generate_stream", [{"inputs": "What is AI? ", "parameters": {
        "do_sample": False, "max_new_tokens": 64}}])
    assert a.status == 200 and a.headers["content-type"].startswith("text/event-stream")
    assert a.text.startswith("AI is the branch") and a.whole
    assert a.events[-1]["finished"] is True and a.events[-1]["finish_reason"] == "stop"


def test_tokenize(cluster):
    status, _, r = cluster.post("/tokenize", {"prompt": "What is a dog?", "add_special_tokens": False})
    assert status == 200 and r["tokens"] == [434, 308, 262, 700, 30] and r["count"] == 5
    status, _, r = cluster.post("/detokenize", {"tokens": r["tokens"]})
    assert status == 200 and r["prompt"] == "What is a dog?"


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models", "/metrics", "/"])
def test_get(cluster, path):
    status, headers, body = cluster.get(path)
    assert status == 200 and headers["Content-Type"]
    if path == "/metrics":
        assert 'vllm:num_requests_running{' in body
        assert body.count("# TYPE vllm:time_to_first_token_seconds histogram") == 1
    if path == "/version":
        assert body["version"]
    status, head_headers, empty = cluster.request("HEAD", path)
    assert status == 200 and empty == ""
    status, headers, _ = cluster.request("DELETE", path)
    assert status == 405 and "GET" in headers["Allow"]
