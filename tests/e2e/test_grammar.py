"""Outputs held to a grammar, by a model that would rather say something else: random JSON Schemas at
temperature 1, tool choices, strict tools; the same text with and without drafts, after preemption and
after a worker's death. GRAMMAR_SCHEMAS=200 runs the long version."""

import json
import os
import time

import jsonschema
import openai
import pytest

from cluster import SLOWER, Cluster, gather, wait
from schemas import schema

N_SCHEMAS = int(os.environ.get("GRAMMAR_SCHEMAS", "40"))
FLAGS = ("--max-total-token-num", "65536")
ASK = [{"role": "user", "content": "Tell me a story about an owl."}]
TOOLS = [{"type": "function", "function": {
    "name": "set_light", "description": "Switch a light", "parameters": {
        "type": "object", "properties": {
            "room": {"type": "string", "maxLength": 12}, "on": {"type": "boolean"},
            "level": {"type": "integer", "minimum": 1, "maximum": 10},
            "note": {"anyOf": [{"type": "string", "maxLength": 8}, {"type": "null"},
                               {"type": "array", "items": {"type": "integer"}, "maxItems": 2}]}},
        "required": ["room", "on"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}]
PARAMETERS = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}


def formatted(s, **more):
    return {"messages": ASK, "max_tokens": 500, "temperature": 1, "reasoning_effort": "none", **more,
            "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": s}}}


# Every fourth reasons first.
BODIES = [formatted(schema(i), seed=i, **({} if i % 4 else {"reasoning_effort": "low"}))
          for i in range(N_SCHEMAS)]
FEW = BODIES[:16]


def answers_of(cluster, bodies=BODIES, limit=16):
    answers = gather(cluster, "/v1/chat/completions", bodies, limit=limit)
    for a in answers:
        assert a.status == 200, (a.status, a.body[-500:])
    return [json.loads(a.body)["choices"][0] for a in answers]


@pytest.fixture(scope="module")
def plain():
    with Cluster(*FLAGS, "--mtp-step", "0") as c:
        answers = answers_of(c)
        c.wait_idle()
    return answers


def texts(choices):
    return [(c["message"]["content"], c["message"].get("reasoning_content"), c["finish_reason"]) for c in choices]


def test_answers_validate(plain):
    complete = 0
    for body, choice in zip(BODIES, plain):
        if choice["finish_reason"] != "stop":
            continue
        complete += 1
        s = body["response_format"]["json_schema"]["schema"]
        validator = jsonschema.Draft202012Validator(s, format_checker=jsonschema.FormatChecker(["date", "ipv4", "email"]))
        validator.validate(json.loads(choice["message"]["content"]))
    print(f"{complete} of {len(BODIES)} answers complete, all valid")
    assert complete >= 0.7 * len(BODIES)


@pytest.mark.parametrize("step, mode", [(4, "eagle_with_att"), (2, "vanilla_with_att")])
def test_drafts_change_nothing(plain, start, step, mode):
    bodies = BODIES if step == 4 else FEW
    c = start(*FLAGS, "--mtp-step", step, "--mtp-mode", mode)
    assert texts(answers_of(c, bodies)) == texts(plain[:len(bodies)])


def test_preemption_changes_nothing(plain, start):
    """Streams that gave their pages back start again behind what they said."""
    c = start(*FLAGS, "--mtp-step", 2, env={"BATON_FAILPOINTS": "decode.preempt@60=error"})
    assert texts(answers_of(c, FEW)) == texts(plain[:len(FEW)])

    def preempted():
        lines = c.get("/metrics")[2].splitlines()
        return sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:num_preemptions_total"))

    wait(preempted, 5, "a preemption is counted", c.log)


def test_penalties_change_nothing_with_drafts(start):
    bodies = [{**b, "presence_penalty": 0.5, "frequency_penalty": 0.2} for b in BODIES[:8]]
    without, with_drafts = (start(*FLAGS, "--mtp-step", n) for n in (0, 4))
    assert texts(answers_of(without, bodies)) == texts(answers_of(with_drafts, bodies))


def test_a_decode_worker_dies(plain, start):
    """Streams go on elsewhere, and each is the text it would have been."""
    c = start(*FLAGS, "--mtp-step", 2, decode=2)
    seen = 0

    def on_event(_):
        nonlocal seen
        seen += 1
        if seen == 200:
            c.kill("decode-0")

    answers = gather(c, "/v1/chat/completions", [{**b, "stream": True} for b in FEW], on_event=on_event)
    got = [[e["choices"][0]["delta"].get("content") or "" for e in a.events] for a in answers]
    assert seen > 200 and ["".join(t) for t in got] == [c["message"]["content"] for c in plain[:len(FEW)]]


# -- tools


def tool_bodies(**kw):
    asks = ("What time is it?", "Turn on the light in the garage.", "Tell me a story about an owl.")
    return [{"messages": [{"role": "user", "content": asks[i % 3]}], "tools": TOOLS, "max_tokens": 200, "temperature": 1, "seed": i,
             "reasoning_effort": "low" if i % 2 else "none", **kw} for i in range(12)]


def check_calls(choice):
    assert choice["finish_reason"] == "tool_calls", choice
    for call in choice["message"]["tool_calls"]:
        f = call["function"]
        jsonschema.validate(json.loads(f["arguments"]), PARAMETERS[f["name"]])
    return [c["function"]["name"] for c in choice["message"]["tool_calls"]]


def test_required(cluster):
    done = [c for c in answers_of(cluster, tool_bodies(tool_choice="required")) if c["finish_reason"] != "length"]
    names = [check_calls(c) for c in done]
    assert len(done) >= 8 and all(names) and {n for calls in names for n in calls} == set(PARAMETERS)


def test_required_without_parallel_calls(cluster):
    for c in answers_of(cluster, tool_bodies(tool_choice="required", parallel_tool_calls=False)):
        assert len(check_calls(c)) == 1 and not c["message"]["content"]


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_named(cluster, name):
    choice = {"type": "function", "function": {"name": name}}
    for c in answers_of(cluster, tool_bodies(tool_choice=choice)):
        assert check_calls(c) == [name]


def test_strict_tools_are_a_choice(cluster):
    """With auto the model may also answer in text."""
    strict = [{**t, "function": {**t["function"], "strict": True}} for t in TOOLS]
    dog, light = ([{"role": "user", "content": q}] for q in ("What is a dog?", "Turn on the light in the garage."))
    text, call = answers_of(cluster, [{"messages": m, "tools": strict, "temperature": 0, "max_tokens": 200,
                                       "reasoning_effort": "none"} for m in (dog, light)])
    assert text["finish_reason"] == "stop" and text["message"]["content"]
    assert check_calls(call) == ["set_light"]


def test_tools_or_json(cluster):
    """auto with a response format: JSON, or calls."""
    for c in answers_of(cluster, [{**b, "response_format": formatted(schema(3))["response_format"], "tools": TOOLS}
                                  for b in tool_bodies()]):
        if c["finish_reason"] == "stop":
            jsonschema.validate(json.loads(c["message"]["content"]), schema(3))
        elif c["finish_reason"] == "tool_calls":
            check_calls(c)


# -- other shapes


def test_json_object_and_completions(cluster):
    body = {"max_tokens": 300, "temperature": 1, "response_format": {"type": "json_object"}}
    chats = answers_of(cluster, [{**body, "messages": ASK, "seed": i, "reasoning_effort": "none"} for i in range(8)])
    for c in chats:
        assert c["message"]["content"].startswith("{")
        if c["finish_reason"] == "stop":
            assert isinstance(json.loads(c["message"]["content"]), dict)
    small = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 4}
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": small}}
    status, _, r = cluster.post("/v1/completions", {**body, "prompt": "Say it.", "n": 3})
    assert status == 200
    for c in r["choices"]:
        jsonschema.validate(json.loads(c["text"]), small)


def test_sdk_parses(cluster):
    """The SDK's own helper sends a strict schema and parses what comes back; streamed as well."""
    pydantic = pytest.importorskip("pydantic")

    class Animal(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=10)
        legs: int = pydantic.Field(ge=0, le=8)
        kind: str | None = pydantic.Field(max_length=5)

    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0) as client:
        kw = dict(model="demo-model", messages=ASK, seed=5, max_tokens=200, reasoning_effort="none")
        parsed = client.chat.completions.parse(**kw, response_format=Animal).choices[0].message.parsed
        assert isinstance(parsed, Animal) and 0 <= parsed.legs <= 8
        with client.chat.completions.stream(**kw, response_format=Animal) as s:
            assert s.get_final_completion().choices[0].message.parsed == parsed
        r = client.responses.parse(model="demo-model", input="A cat?", text_format=Animal, max_output_tokens=200,
                                   reasoning={"effort": "none"}, extra_body={"seed": 5})
        assert isinstance(r.output_parsed, Animal)


@pytest.mark.parametrize("bad, says", [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
        "type": "object", "properties": {"a": {"not": {}}}}}}}, 'properties.a: "not" is not supported'),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": False}}}, "must be an object"),
    ({"response_format": {"type": "json_object"}, "min_tokens": 5}, "min_tokens"),
    ({"tool_choice": "required"}, "no tools"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nothing"}}}, "none of the tools"),
])
def test_refused(cluster, bad, says):
    status, _, body = cluster.post("/v1/chat/completions", {"messages": ASK, **bad})
    assert status == 400 and says in body["error"]["message"], body


def test_hostile_schemas_cost_little(cluster):
    """What blows up is refused, or given up with a reason, quickly; others go on."""
    many = {"anyOf": [{"type": "string", "pattern": f"^(a|b)*{i}a{{0,500}}(a|b){{0,500}}$"} for i in range(100)]}
    pairs = {"allOf": [{"anyOf": [{"minimum": i}, {"maximum": i + 50}]} for i in range(30)]}
    wide = {"anyOf": [{"type": "object", "properties": {f"k{j}": {"maxLength": j} for j in range(1, 21)}}
                      for i in range(120)]}
    start = time.monotonic()
    for s, statuses in ((many, (200, 413)), (pairs, (400,)), (wide, (413,))):
        status, _, body = cluster.post("/v1/chat/completions", formatted(s, max_tokens=50))
        assert status in statuses, body
    assert time.monotonic() - start < 10 * SLOWER
    assert answers_of(cluster, [formatted({"type": "null"})])[0]["message"]["content"] == "null"
