"""The Anthropic client against /v1/messages."""

import anthropic
import pytest

from cluster import gather

DOG = "A dog is a member of the genus Canis."
ASK = [{"role": "user", "content": "What is a dog?"}]
LIGHT = {"name": "set_light", "description": "Switch a light", "input_schema": {
    "type": "object", "properties": {"room": {"type": "string"}, "on": {"type": "boolean"}},
    "required": ["room", "on"]}}
GARAGE = [{"role": "user", "content": "Turn on the light in the garage."}]
GREEDY = {"temperature": 0}  # the client's signature has it no more
THINK = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture
def client(cluster):
    with anthropic.Anthropic(base_url=cluster.url, api_key="none", max_retries=0) as c:
        yield c


def create(client, messages=ASK, **kw):
    return client.messages.create(**{"model": "demo-model", "max_tokens": 200, "messages": messages,
                                     "extra_body": GREEDY, **kw})


def test_models(client):
    model, = client.models.list()
    assert model.id == model.display_name == "demo-model" and model.type == "model"
    assert model.created_at.year >= 2024
    assert client.models.retrieve("demo-model").id == "demo-model"


def test_message(client):
    m = create(client)
    assert (m.type, m.role, m.model, m.stop_reason, m.stop_sequence) == (
        "message", "assistant", "demo-model", "end_turn", None)
    assert [b.type for b in m.content] == ["text"] and m.content[0].text == DOG
    assert m.usage.input_tokens + m.usage.cache_read_input_tokens == 10 and m.usage.output_tokens == 14
    assert m._request_id


def test_stream(client):
    with client.messages.stream(model="demo-model", max_tokens=200, extra_body=GREEDY, messages=ASK) as s:
        assert "".join(s.text_stream) == DOG
        final = s.get_final_message()
    assert final.stop_reason == "end_turn" and final.content[0].text == DOG
    assert final.usage.output_tokens == 14
    kinds = [e.type for e in create(client, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_thinking(client):
    ask = [{"role": "user", "content": "Define computer."}]
    m = create(client, ask, thinking=THINK, max_tokens=2000)
    assert [b.type for b in m.content] == ["thinking", "text"]
    assert m.content[0].thinking == "The user asks about the word computer. I will give its meaning."
    with client.messages.stream(model="demo-model", max_tokens=2000, extra_body=GREEDY, messages=ask,
                                thinking=THINK) as s:
        streamed = s.get_final_message().content
    assert (streamed[0].thinking, streamed[1].text) == (m.content[0].thinking, m.content[1].text)
    # The whole turn goes back as it came.
    more = create(client, [*ask, {"role": "assistant", "content": m.content},
                           {"role": "user", "content": "What is a dog?"}])
    assert more.stop_reason == "end_turn" and [b.type for b in more.content] == ["text"]


@pytest.mark.parametrize("thinking", [None, THINK])
def test_tool_use(client, thinking):
    kw = dict(tools=[LIGHT], max_tokens=2000, **({"thinking": thinking} if thinking else {}))
    m = create(client, GARAGE, **kw)
    assert m.stop_reason == "tool_use"
    assert [b.type for b in m.content] == (["thinking"] if thinking else []) + ["tool_use"]
    use = m.content[-1]
    assert use.name == "set_light" and use.input == {"room": "garage", "on": True}
    with client.messages.stream(model="demo-model", extra_body=GREEDY, messages=GARAGE, **kw) as s:
        final = s.get_final_message()
    assert final.stop_reason == "tool_use" and final.content[-1].input == use.input
    for content in ("done", [{"type": "text", "text": "done"}]):
        more = create(client, [*GARAGE, {"role": "assistant", "content": m.content}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": use.id, "content": content},
            {"type": "text", "text": "What is a dog?"}]}], **kw)
        assert more.stop_reason == "end_turn"


def test_tool_choice(client):
    assert create(client, GARAGE, tools=[LIGHT], tool_choice={"type": "none"}).stop_reason != "tool_use"
    auto = create(client, GARAGE, tools=[LIGHT], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [b.type for b in auto.content] == ["tool_use"]
    dog = [{"role": "user", "content": "What is a dog?"}]
    for forced in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "set_light"}):
        m = create(client, dog, tools=[LIGHT], tool_choice=forced)
        assert {b.type for b in m.content} == {"tool_use"} and m.content[0].name == "set_light"
    with pytest.raises(anthropic.BadRequestError) as e:
        create(client, GARAGE, tools=[LIGHT], tool_choice={"type": "tool", "name": "nothing"})
    assert "tool_choice" in str(e.value)


def test_system_and_blocks(client):
    text = [{"type": "text", "text": "What is a dog?", "cache_control": {"type": "ephemeral"}}]
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=ab12"}
    brief = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
    user = [{"role": "user", "content": text}]

    def tokens(**kw):
        return client.messages.count_tokens(model="demo-model", **kw).input_tokens

    assert create(client, user).content[0].text == DOG
    assert tokens(messages=ASK) == 10 == tokens(messages=user)
    assert tokens(messages=ASK, system="Be brief.") == tokens(messages=ASK, system=[billing, brief]) > 10
    assert tokens(messages=ASK, tools=[LIGHT]) > 100
    usage = create(client, system=[billing, brief]).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == tokens(messages=ASK, system="Be brief.")


def test_prefill_and_stop(client):
    m = create(client, [*ASK, {"role": "assistant", "content": "A dog is a member"}])
    assert m.content[0].text == " of the genus Canis."
    m = create(client, stop_sequences=["genus", "never"])
    assert (m.content[0].text, m.stop_reason, m.stop_sequence) == (
        "A dog is a member of the ", "stop_sequence", "genus")
    m = create(client, max_tokens=3)
    assert m.stop_reason == "max_tokens" and m.usage.output_tokens == 3


@pytest.mark.parametrize("bad, name", [
    (dict(extra_body={"temperature": -1}), "temperature"),
    (dict(max_tokens=0), "max_tokens"),
    (dict(messages=[]), "messages"),
    (dict(messages=[{"role": "king", "content": "x"}]), "messages[0]"),
    (dict(messages=[{"role": "user", "content": [{"type": "image", "source": {}}]}]), "messages[0].content[0]"),
    (dict(tools=[{"type": "web_search_20250305", "name": "web_search"}]), "tools[0]"),
    (dict(extra_body={"banana": 1}), "banana"),
    (dict(messages=[{"role": "user", "content": "a dog " * 5000}]), "maximum context length"),
])
def test_bad_request(client, bad, name):
    with pytest.raises(anthropic.BadRequestError) as e:
        create(client, **bad)
    body = e.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert name in body["error"]["message"] and body["request_id"] == e.value.request_id


def test_unknown_model(client):
    with pytest.raises(anthropic.NotFoundError) as e:
        create(client, model="gpt-9")
    assert e.value.body["error"]["type"] == "not_found_error"


def test_leaving(client, cluster):
    """A client that goes away in mid-stream takes its request with it (the fixture checks that)."""
    a, = gather(cluster, "/v1/messages", [{"model": "demo-model", "max_tokens": 3000, "stream": True,
                                           "ignore_eos": True, "messages": ASK}], leave_after=4)
    assert a.left and a.events[0]["type"] == "message_start"
