"""Tool calls by the demo model, end to end: 40 requests that want one call, 20 that want two, 10 that
want none, of the kinds it was trained on. Each is asked whole and streamed, without drafts and with."""

import asyncio
import json
import pathlib

import openai
import pytest

from cluster import Cluster, SLOWER

REQUESTS = json.loads((pathlib.Path(__file__).parent / "tool_requests.json").read_text())
AT_ONCE = 8


async def whole(client, body):
    c = (await client.chat.completions.create(**body)).choices[0]
    calls = [(t.id, t.type, t.function.name, t.function.arguments) for t in c.message.tool_calls or []]
    return c.message.content or "", getattr(c.message, "reasoning_content", ""), calls, c.finish_reason


async def streamed(client, body):
    content, reasoning, calls, finish = "", "", [], None
    async for chunk in await client.chat.completions.create(**body, stream=True):
        c = chunk.choices[0]
        content += c.delta.content or ""
        reasoning += getattr(c.delta, "reasoning_content", None) or ""
        finish = c.finish_reason or finish
        for t in c.delta.tool_calls or []:
            if t.id:
                assert t.index == len(calls), "calls are announced in order"
                calls.append([t.id, t.type, t.function.name, ""])
            calls[t.index][3] += t.function.arguments or ""
    return content, reasoning, [tuple(c) for c in calls], finish


def body_of(request):
    return dict(model="demo-model", temperature=0, max_tokens=200, tools=request["tools"],
                messages=[{"role": "user", "content": request["ask"]}],
                extra_body={"chat_template_kwargs": {"enable_thinking": request["thinking"]}})


async def ask_all(cluster):
    gate = asyncio.Semaphore(AT_ONCE)
    async with openai.AsyncOpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0,
                                  timeout=60 * SLOWER) as client:
        async def both(request):
            async with gate:
                return await whole(client, body_of(request)), await streamed(client, body_of(request))

        return await asyncio.gather(*(both(r) for r in REQUESTS))


def without_ids(answer):
    content, reasoning, calls, finish = answer
    return content, reasoning, [c[1:] for c in calls], finish


@pytest.fixture(scope="module")
def answers():
    """By --mtp-step: for every request its whole and its streamed answer."""
    result = {}
    for mtp in (0, 4):
        with Cluster("--mtp-step", mtp, "--max-total-token-num", 65536) as c:
            result[mtp] = asyncio.run(ask_all(c))
            c.wait_idle()
    return result


def right(request, answer):
    return ([(c["name"], c["arguments"]) for c in request["calls"]] ==
            [(name, json.loads(arguments)) for _, _, name, arguments in answer[2]])


@pytest.mark.parametrize("mtp", [0, 4])
@pytest.mark.parametrize("kind, least", [("single", 36), ("parallel", 13), ("none", 10)])
def test_calls_are_right(answers, mtp, kind, least):
    wrong = []
    of_kind = [(r, a[0]) for r, a in zip(REQUESTS, answers[mtp]) if r["kind"] == kind]
    for request, answer in of_kind:
        if not right(request, answer):
            wrong.append((request["ask"], request["calls"], answer))
    print(f"{kind}, --mtp-step {mtp}: {len(of_kind) - len(wrong)} of {len(of_kind)} right")
    assert len(of_kind) - len(wrong) >= least, "".join(f"{w}\n" for w in wrong)


@pytest.mark.parametrize("mtp", [0, 4])
def test_streamed_is_the_same(answers, mtp):
    for request, (a, b) in zip(REQUESTS, answers[mtp]):
        assert without_ids(a) == without_ids(b), request
        assert a[3] == ("tool_calls" if a[2] else "stop")
        assert len({c[0] for c in a[2] + b[2]}) == len(a[2]) + len(b[2]), "ids differ"
        assert bool(a[1]) == request["thinking"]


def test_drafts_change_nothing(answers):
    for request, a, b in zip(REQUESTS, answers[0], answers[4]):
        assert without_ids(a[0]) == without_ids(b[0]), request
