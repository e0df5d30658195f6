"""The official OpenAI client against /v1/responses."""

import json

import openai
import pytest

DOG = "A dog is a member of the genus Canis."
LIGHT = {"type": "function", "name": "set_light", "description": "Switch a light", "strict": False, "parameters": {
    "type": "object", "properties": {"room": {"type": "string"}, "on": {"type": "boolean"}},
    "required": ["room", "on"]}}
GARAGE = "Turn on the light in the garage."
NO_THINKING = {"effort": "none"}


@pytest.fixture
def client(cluster):
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0) as c:
        yield c


def create(client, ask="What is a dog?", **kw):
    return client.responses.create(**{"model": "demo-model", "input": ask, "temperature": 0,
                                      "reasoning": NO_THINKING, **kw})


def test_response(client):
    r = create(client, instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=100)
    assert r.object == "response" and r.status == "completed" and r.model == "demo-model"
    assert r.output_text == DOG and [o.type for o in r.output] == ["message"]
    assert r.instructions == "Be brief." and r.metadata == {"a": "b"} and r.max_output_tokens == 100
    assert r.usage.output_tokens == 14 and r.usage.total_tokens == r.usage.input_tokens + 14
    assert r.store is False and r.error is None and r.incomplete_details is None


def test_input_items(client):
    def part(text, type="input_text"):
        return {"type": type, "text": text}

    ways = ["What is a dog?",
            [{"role": "user", "content": "What is a dog?"}],
            [{"type": "message", "role": "user", "content": [part("What is "), part("a dog?")]}]]
    assert [create(client, w).output_text for w in ways] == [DOG] * 3
    assert {create(client, w).usage.input_tokens for w in ways} == {10}
    chat = [{"role": "user", "content": "My name is Bob."},
            {"role": "assistant", "content": [part("Nice to meet you, Bob!", "output_text")]},
            {"role": "user", "content": "What is my name?"}]
    assert create(client, chat).output_text == "Your name is Bob."


def test_stream(client):
    kinds, text, numbers = [], "", []
    for e in create(client, stream=True):
        kinds.append(e.type)
        numbers.append(e.sequence_number)
        if e.type == "response.output_text.delta":
            text += e.delta
    assert text == DOG and numbers == list(range(len(numbers)))
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done",
                          "response.output_item.done", "response.completed"]
    with client.responses.stream(model="demo-model", input="What is a dog?", temperature=0,
                                 reasoning=NO_THINKING) as s:
        for _ in s:
            pass
        assert s.get_final_response().output_text == DOG


def same(a, b):
    """Two outputs, ids left aside."""
    def plain(output):
        return [o.model_dump(exclude={"id", "call_id", "parsed_arguments"}) for o in output]
    return plain(a) == plain(b)


def test_reasoning_and_tools(client):
    kw = dict(tools=[LIGHT], reasoning={"effort": "medium"})
    r = create(client, GARAGE, **kw)
    assert [o.type for o in r.output] == ["reasoning", "function_call"]
    assert r.output[0].content[0].text == "I should call set_light." and r.usage.output_tokens_details.reasoning_tokens > 3
    call = r.output[1]
    assert call.name == "set_light" and json.loads(call.arguments) == {"room": "garage", "on": True}
    with client.responses.stream(model="demo-model", input=GARAGE, temperature=0, **kw) as s:
        deltas = "".join(e.delta for e in s if e.type == "response.function_call_arguments.delta")
        final = s.get_final_response()
    assert deltas == call.arguments and same(final.output, r.output)
    # The turn goes back as it came, with the result.
    history = [{"role": "user", "content": GARAGE}, *r.output,
               {"type": "function_call_output", "call_id": call.call_id, "output": "done"}]
    assert create(client, history, tools=[LIGHT]).status == "completed"
    one = create(client, GARAGE, **kw, parallel_tool_calls=False)
    assert same(one.output, r.output)
    none = create(client, GARAGE, **kw, tool_choice="none")
    assert "function_call" not in [o.type for o in none.output]


def test_the_turn_is_rendered_as_one(client, cluster):
    """Items of a turn and the chat shape's message make the same prompt."""
    call = {"type": "function_call", "call_id": "c1", "name": "set_light", "arguments": '{"on": true}'}
    items = [{"role": "user", "content": "x"},
             {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "why"}]},
             {"role": "assistant", "content": "text"}, call, {**call, "call_id": "c2"},
             {"type": "function_call_output", "call_id": "c1", "output": "1"},
             {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]}]
    use = {"type": "function", "function": {"name": "set_light", "arguments": '{"on": true}'}}
    messages = [{"role": "user", "content": "x"},
                {"role": "assistant", "reasoning_content": "why", "content": "text",
                 "tool_calls": [{"id": "c1", **use}, {"id": "c2", **use}]},
                {"role": "tool", "tool_call_id": "c1", "content": "1"},
                {"role": "tool", "tool_call_id": "c2", "content": "2"}]
    status, _, r = cluster.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1,
                                                         "reasoning_effort": "none"})
    assert status == 200
    assert create(client, items, max_output_tokens=1).usage.input_tokens == r["usage"]["prompt_tokens"]


def test_incomplete(client):
    r = create(client, max_output_tokens=3)
    assert r.status == "incomplete" and r.incomplete_details.reason == "max_output_tokens"
    assert list(create(client, max_output_tokens=3, stream=True))[-1].type == "response.incomplete"


@pytest.mark.parametrize("bad, param", [
    (dict(temperature=3), "temperature"),
    (dict(input=[]), "input"),
    (dict(input=[{"type": "item_reference", "id": "x"}]), "input"),
    (dict(input=[{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]), "input"),
    (dict(tools=[{"type": "web_search"}]), "tools"),
    (dict(tools=[{**LIGHT, "strict": True, "parameters": {"type": "object", "not": {}}}]), "tools"),
    (dict(tool_choice="required"), "tool_choice"),
    (dict(text={"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}), "text.format"),
    (dict(previous_response_id="resp_1"), "previous_response_id"),
    (dict(background=True), "background"),
    (dict(include=["message.output_text.logprobs"]), "include"),
    (dict(truncation="auto"), "truncation"),
    (dict(extra_body={"banana": 1}), "banana"),
])
def test_bad_request(client, bad, param):
    with pytest.raises(openai.BadRequestError) as e:
        create(client, **{"ask": bad.pop("input", "x"), **bad})
    assert e.value.param == param and e.value.body["message"]
