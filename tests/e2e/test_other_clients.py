"""Frameworks that people put in between: LangChain and LiteLLM, in both families of APIs."""

import json
import os

import pytest

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch a list at import
litellm = pytest.importorskip("litellm", reason="litellm is not installed")
langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")

DOG = "A dog is a member of the genus Canis."
ASK = [{"role": "user", "content": "What is a dog?"}]
GARAGE = "Turn on the light in the garage."
LIGHT = {"name": "set_light", "description": "Switch a light", "parameters": {
    "type": "object", "properties": {"room": {"type": "string"}, "on": {"type": "boolean"}},
    "required": ["room", "on"]}}
RIGHT = {"room": "garage", "on": True}


@pytest.fixture
def cluster(shared_cluster):
    """Without the check for closed connections: both keep theirs open for the whole process."""
    yield shared_cluster
    shared_cluster.wait_idle()


# ---- LangChain ----

def langchain(cluster, **kw):
    return langchain_openai.ChatOpenAI(model="demo-model", base_url=cluster.url + "/v1", api_key="none",
                                       temperature=0, max_retries=0, reasoning_effort="none", stream_usage=True, **kw)


@pytest.mark.parametrize("responses", [False, True])
def test_langchain(cluster, responses):
    llm = langchain(cluster, use_responses_api=responses)
    answer = llm.invoke("What is a dog?")
    assert answer.text == DOG and answer.usage_metadata["output_tokens"] == 14
    whole = None
    for part in llm.stream("What is a dog?"):
        whole = part if whole is None else whole + part
    assert whole.text == DOG and whole.usage_metadata["output_tokens"] == 14


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_tools(cluster, responses):
    from langchain_core.messages import HumanMessage, ToolMessage

    llm = langchain(cluster, use_responses_api=responses).bind_tools([{"type": "function", "function": LIGHT}])
    call = llm.invoke(GARAGE)
    assert [(c["name"], c["args"]) for c in call.tool_calls] == [("set_light", RIGHT)]
    whole = None
    for part in llm.stream(GARAGE):
        whole = part if whole is None else whole + part
    assert [(c["name"], c["args"]) for c in whole.tool_calls] == [("set_light", RIGHT)]
    result = ToolMessage("done", tool_call_id=call.tool_calls[0]["id"])
    assert llm.invoke([HumanMessage(GARAGE), call, result]).tool_calls == []


# ---- LiteLLM ----

PROVIDERS = ["openai/demo-model", "hosted_vllm/demo-model", "anthropic/demo-model"]


def complete(cluster, provider, messages=ASK, **kw):
    base = cluster.url + ("" if provider.startswith("anthropic") else "/v1")
    return litellm.completion(model=provider, api_base=base, api_key="none", messages=messages, temperature=0,
                              max_tokens=300, num_retries=0, **kw)


def off(provider):
    return {} if provider.startswith("anthropic") else {"extra_body": {"enable_thinking": False}}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_litellm(cluster, provider):
    r = complete(cluster, provider, **off(provider))
    assert r.choices[0].message.content == DOG and r.choices[0].finish_reason == "stop"
    assert r.usage.completion_tokens == 14
    chunks = list(complete(cluster, provider, stream=True, **off(provider)))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == DOG
    tools = [{"type": "function", "function": LIGHT}]
    ask = [{"role": "user", "content": GARAGE}]
    r = complete(cluster, provider, ask, tools=tools, **off(provider))
    call, = r.choices[0].message.tool_calls
    assert call.function.name == "set_light" and json.loads(call.function.arguments) == RIGHT
    assert r.choices[0].finish_reason == "tool_calls"
    arguments = ""
    for c in complete(cluster, provider, ask, tools=tools, stream=True, **off(provider)):
        for t in c.choices[0].delta.tool_calls or []:
            arguments += t.function.arguments or ""
    assert json.loads(arguments) == RIGHT


@pytest.mark.parametrize("provider", PROVIDERS[:2])
def test_litellm_reasoning(cluster, provider):
    r = complete(cluster, provider, [{"role": "user", "content": "Define computer."}])
    assert r.choices[0].message.reasoning_content.startswith("The user asks about the word computer.")
    assert r.choices[0].message.content.startswith("A computer is")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_litellm_failure(cluster, provider):
    with pytest.raises(litellm.BadRequestError) as e:
        complete(cluster, provider, [{"role": "user", "content": "a dog " * 5000}])
    assert "maximum context length" in str(e.value)
