"""What a model may emit, through router and workers: the table of tests/router/text/glm_outputs.json (described in
glm_parser_test.c), cut into steps in every way, and outputs that are mutated. Streamed and whole answers must say
the same, and what the table says."""

import itertools
import json
import os
import pathlib

import pytest

from cluster import gather
from scripted import Vocabulary, drafts, rng, scripted, seed_for, seed_of

TABLE = json.loads((pathlib.Path(__file__).parents[1] / "router/text/glm_outputs.json").read_text())
CASES = [{"section": name, **c} for name, cases in TABLE["cases"].items() for c in cases]
CHAT = "/v1/chat/completions"
SHORT = 12       # outputs of up to that many tokens are cut at every point
FUZZED = 3       # random cuts of every case, each with tokens of its own
MUTATED = int(os.environ.get("PARSER_MUTATED", "1000"))
AT_ONCE = 24
MTP_STEP = 7     # steps of up to 8 tokens
VOCABULARY = Vocabulary()
ENDS = [VOCABULARY.added[a] for a in ("<|endoftext|>", "<|user|>", "<|observation|>")]
TOOLS = TABLE["tools"]
NAMES_ONLY = [{"type": "function", "function": {"name": t["function"]["name"]}} for t in TOOLS]

for case in CASES:
    if "value" in case:
        key, value, is_json = case["value"]
        case["in"] = (f"<tool_call>f<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>")
        case["out"] = [["call", "f", f'{{"{key}": {is_json}}}']]


# -- what is asked

def flags_of(case):
    return case.get("thinking", False), case.get("calls", True), case.get("schema", True)


ALL_FLAGS = [(t, c, s) for t in (False, True) for c in (False, True) for s in (False, True)]


def body_of(flags, **more):
    thinking, calls, schema = flags
    body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 1000,
            "chat_template_kwargs": {"enable_thinking": thinking}, **more}
    if calls:
        body["tools"] = TOOLS if schema else NAMES_ONLY
    return body


def output_of(case, r=None):
    """Its tokens; the worker is told to stop where the case says that it did not end by itself."""
    ids = VOCABULARY.encode(case["in"], r)
    return ids if case.get("length") else [*ids, rng(case["in"]).choice(ENDS)]


def mutate(r):
    """Two outputs one after the other, with tokens dropped, doubled, swapped and replaced: (flags, ids)."""
    a, b = r.choice(CASES), r.choice(CASES)
    ids = VOCABULARY.encode(a["in"], r.choice([None, r])) + VOCABULARY.encode(b["in"])
    tags = [VOCABULARY.added[t] for t in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>",
                                          "</arg_key>", "<arg_value>", "</arg_value>")]
    for _ in range(r.randrange(1, 6)):
        at = r.randrange(len(ids) + 1)
        ids[at:at + r.randrange(2)] = r.choice([[], [r.choice(tags)], [r.choice(tags)] * 2, [r.randrange(VOCABULARY.n)],
                                                ids[at:at + 3] * 2])
    return r.choice(ALL_FLAGS), [*ids, *([] if r.random() < 0.3 else [ENDS[1]])] or [ENDS[0]]


# -- what comes back

class Said:
    """Events of an answer, neighbours of a kind joined."""

    def __init__(self):
        self.events, self.ids, self.finish, self.usage, self.pieces = [], [], None, None, 0

    def text(self, kind, text):
        if text:
            if not self.events or self.events[-1][0] != kind:
                self.events.append([kind, ""])
            self.events[-1][1] += text

    def call(self, id, name, arguments=""):
        self.ids.append(id)
        self.events.append(["call", name, arguments])

    def parts(self):
        """(reasoning, content, calls): what a whole answer knows of the order."""
        text = {kind: "".join(e[1] for e in self.events if e[0] == kind) for kind in ("reasoning", "content")}
        return text["reasoning"], text["content"], [e[1:] for e in self.events if e[0] == "call"]


def parts_of(out):
    s = Said()
    s.events = out
    return s.parts()


def said_whole(answer):
    assert answer.status == 200, (answer.status, answer.body[:500], answer.exception)
    body = json.loads(answer.body)
    choice, = body["choices"]
    m, s = choice["message"], Said()
    assert m["role"] == "assistant" and m.get("reasoning_content") == m.get("reasoning")
    s.text("reasoning", m.get("reasoning_content"))
    s.text("content", m["content"])
    for c in m.get("tool_calls", []):
        assert c["type"] == "function"
        s.call(c["id"], c["function"]["name"], c["function"]["arguments"])
    assert m.get("tool_calls") != [] and (m["content"] is not None or m["tool_calls"])
    s.finish, s.usage = choice["finish_reason"], body["usage"]
    return s


def said_streamed(answer):
    """Checks the form on the way: the role first, each call announced once and in order, the reason last."""
    assert answer.status == 200 and answer.done and not answer.error, (answer.status, answer.body[-500:],
                                                                       answer.exception)
    first, *events, last = (e for e in answer.events if e["choices"])
    usage = [e for e in answer.events if not e["choices"]]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    s = Said()
    for e in events:
        choice, = e["choices"]
        assert choice["finish_reason"] is None
        (kind, d), *rest = choice["delta"].items()
        if kind == "reasoning_content":
            assert rest == [("reasoning", d)]
            s.text("reasoning", d)
        elif kind == "content":
            assert d and not rest
            s.text("content", d)
        else:
            call, = d
            assert kind == "tool_calls" and not rest
            if "id" in call:
                assert call["index"] == len(s.ids) and call["type"] == "function"
                assert call["function"]["arguments"] == ""
                s.call(call["id"], call["function"]["name"])
            else:
                assert call["index"] == len(s.ids) - 1 and s.events[-1][0] == "call", "a piece of a call that is over"
                s.events[-1][2] += call["function"]["arguments"]
                s.pieces += 1
    choice, = last["choices"]
    assert choice["delta"] == {}
    s.finish, s.usage = choice["finish_reason"], usage[-1]["usage"] if usage else None
    return s


def finish_of(case):
    if case.get("broken") or case.get("length"):
        return "length"
    return "tool_calls" if any(e[0] == "call" for e in case["out"]) else "stop"


def n_counted(ids):
    """Tokens up to the one that ends the output."""
    return next((i + 1 for i, id in enumerate(ids) if id in ENDS), len(ids))


# -- clusters

class Scripts:
    def __init__(self, outputs, cluster):
        self.outputs, self.c, self.starts = outputs, cluster, {}
        for flags in ALL_FLAGS:
            status, _, r = cluster.post(CHAT, body_of(flags, max_tokens=1))
            assert status == 200, r
            self.starts[flags] = r["usage"]["prompt_tokens"]

    def body(self, number, flags, cuts=None, salt=0, **more):
        start, ids = self.starts[flags], self.outputs[number]
        if cuts is None:
            seed = seed_of(number, start, salt)
        else:
            seed = seed_for(number, start, n_counted(ids), cuts, rng(number, cuts))
        if ids[-1] not in ENDS:
            more = {"max_tokens": len(ids), **more}
        return body_of(flags, seed=seed, **more)

    def ask(self, bodies, path=CHAT):
        return gather(self.c, path, bodies, limit=AT_ONCE)

    def both(self, bodies):
        """[(whole, streamed)] of pairs of bodies."""
        whole = self.ask([b for b, _ in bodies])
        streamed = self.ask([{**b, "stream": True, "stream_options": {"include_usage": True}} for _, b in bodies])
        return [(said_whole(a), said_streamed(b)) for a, b in zip(whole, streamed)]


N = len(CASES)
FUZZ = [output_of(c, rng("tokens", i, k)) for i, c in enumerate(CASES) for k in range(FUZZED)]
MUTANTS = [mutate(rng("mutant", i)) for i in range(MUTATED)]
OUTPUTS = [*(output_of(c) for c in CASES), *FUZZ, *(ids for _, ids in MUTANTS),
           [VOCABULARY.tokens[b"%c" % x] for x in b"abcdefghij"] + ENDS[:1]]


@pytest.fixture(scope="module", params=[0, MTP_STEP])
def any_cluster(request, tmp_path_factory):
    with scripted(tmp_path_factory.mktemp("outputs"), OUTPUTS, *drafts(request.param)) as c:
        yield Scripts(OUTPUTS, c)
        c.wait_idle()


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    with scripted(tmp_path_factory.mktemp("outputs"), OUTPUTS, *drafts(MTP_STEP)) as c:
        yield Scripts(OUTPUTS, c)
        c.wait_idle()


def check(case, whole, streamed, ids):
    assert streamed.events == case["out"], case
    assert whole.parts() == parts_of(case["out"]), case
    assert whole.finish == streamed.finish == finish_of(case), case
    assert whole.usage["completion_tokens"] == streamed.usage["completion_tokens"] == n_counted(ids), case
    assert len(set(whole.ids + streamed.ids)) == 2 * len(whole.ids)


def test_the_table_is_large_enough():
    assert N >= 120 and sum("of" in c for c in CASES) >= 38


def test_table(any_cluster):
    """Every case, token by token (without drafts) and in steps of up to eight."""
    bodies = [any_cluster.body(i, flags_of(c)) for i, c in enumerate(CASES)]
    for i, (case, (whole, streamed)) in enumerate(zip(CASES, any_cluster.both(list(zip(bodies, bodies))))):
        check(case, whole, streamed, OUTPUTS[i])


def test_strings_do_not_wait(any_cluster):
    cases = [(i, c) for i, c in enumerate(CASES) if "pieces" in c]
    answers = any_cluster.ask([any_cluster.body(i, flags_of(c), stream=True) for i, c in cases])
    assert len(cases) >= 2
    for (_, case), answer in zip(cases, answers):
        assert said_streamed(answer).pieces >= case["pieces"], case


def test_steps_are_cut_as_asked(scripts):
    """The premise of the tests below. An event of /v1/completions is a step, or several that came to the router at
    once: no cut is where none was asked for, and those asked for all show, now or in another try."""
    number, text = len(OUTPUTS) - 1, "abcdefghij"
    start = len(scripts.c.post("/tokenize", {"prompt": "Go on."})[2]["tokens"])
    for cuts in [(), (5,), (2, 3), (4, 8), tuple(range(2, 10))]:
        body = {"prompt": "Go on.", "max_tokens": 100, "stream": True,
                "seed": seed_for(number, start, len(text) + 1, (*cuts, len(text)), rng(cuts))}
        want, seen = {1, *cuts, *range(9, 10 if cuts == () else 0)}, set()
        for _ in range(100):
            answer, = scripts.ask([body], "/v1/completions")
            parts = [e["choices"][0]["text"] for e in answer.events if e["choices"] and e["choices"][0]["text"]]
            assert "".join(parts) == text
            seen |= set(itertools.accumulate(map(len, parts[:-1])))
            if seen == want:
                break
        assert seen == want


def test_every_cut(scripts):
    """Short outputs in two parts, cut at each point, and in one."""
    asked = [(i, cuts) for i, case in enumerate(CASES) if n_counted(OUTPUTS[i]) <= SHORT
             for cuts in [(), *((k,) for k in range(2, n_counted(OUTPUTS[i])))]]
    assert len(asked) > 500
    bodies = [scripts.body(i, flags_of(CASES[i]), cuts, stream=True) for i, cuts in asked]
    for (i, cuts), answer in zip(asked, scripts.ask(bodies)):
        s = said_streamed(answer)
        assert (s.events, s.finish) == (CASES[i]["out"], finish_of(CASES[i])), (CASES[i], cuts)


def test_fuzzed_cuts(scripts):
    """Other tokens of the same text, at random steps; the whole answer in other steps than the streamed one."""
    asked = [(N + i * FUZZED + k, case) for i, case in enumerate(CASES) for k in range(FUZZED)]
    r = rng("fuzzed")
    bodies = [tuple(scripts.body(number, flags_of(case), salt=r.randrange(1 << 31)) for _ in range(2))
              for number, case in asked]
    for (number, case), (whole, streamed) in zip(asked, scripts.both(bodies)):
        check(case, whole, streamed, OUTPUTS[number])


def test_mutated_outputs(scripts):
    """Whatever comes, both answers say the same, and calls of a complete answer have JSON for arguments."""
    r, first = rng("mutated"), N + len(FUZZ)
    bodies = [tuple(scripts.body(first + i, flags, salt=r.randrange(1 << 31)) for _ in range(2))
              for i, (flags, _) in enumerate(MUTANTS)]
    n_calls = 0
    for (flags, ids), (whole, streamed) in zip(MUTANTS, scripts.both(bodies)):
        assert streamed.parts() == whole.parts(), (flags, ids)
        assert (streamed.finish, streamed.usage["completion_tokens"]) == (
            whole.finish, whole.usage["completion_tokens"]), (flags, ids)
        calls = whole.parts()[2]
        n_calls += len(calls)
        assert (whole.finish == "tool_calls") == bool(calls and whole.finish != "length"), (flags, ids)
        for _, arguments in calls if whole.finish == "tool_calls" else []:
            assert isinstance(json.loads(arguments), dict), (flags, ids)
        assert flags[1] or not calls
    assert n_calls > MUTATED / 4


# -- the other shapes

SAMPLE = [i for i, c in enumerate(CASES) if c.get("calls", True) and c.get("schema", True) and
          ("of" in c or c["section"] in ("a call ends reasoning", "text around, several calls", "names"))]


def responses_body(case, i, start, salt):
    body = {"input": "Go on.", "max_output_tokens": 1000, "reasoning": {"effort": "low" if case.get("thinking") else
            "none"}, "tools": [{"type": "function", "strict": False, **t["function"]} for t in TOOLS],
            "seed": seed_of(i, start, salt)}
    return {**body, "max_output_tokens": len(OUTPUTS[i])} if case.get("length") else body


def messages_body(case, i, start, salt):
    thinking = {"type": "enabled", "budget_tokens": 1024} if case.get("thinking") else {"type": "disabled"}
    return {"model": "demo-model", "max_tokens": len(OUTPUTS[i]) if case.get("length") else 2000,
            "messages": [{"role": "user", "content": "Go on."}], "thinking": thinking, "seed": seed_of(i, start, salt),
            "tools": [{"name": t["function"]["name"],
                       "input_schema": t["function"].get("parameters", {"type": "object"})} for t in TOOLS]}


def responses_whole(body):
    s = Said()
    for o in body["output"]:
        if o["type"] == "function_call":
            s.call(o["call_id"], o["name"], o["arguments"])
        for part in o.get("content") or []:
            s.text("reasoning" if o["type"] == "reasoning" else "content", part["text"])
    s.finish = body["status"]
    return s


def responses_streamed(answer):
    s = Said()
    for e in answer.events:
        if e["type"] == "response.output_item.added" and e["item"]["type"] == "function_call":
            s.call(e["item"]["call_id"], e["item"]["name"])
        elif e["type"] == "response.function_call_arguments.delta":
            s.events[-1][2] += e["delta"]
        elif e["type"] in ("response.output_text.delta", "response.reasoning_text.delta"):
            s.text("content" if "output_text" in e["type"] else "reasoning", e["delta"])
    final = responses_whole(answer.events[-1]["response"])
    assert final.events == s.events and answer.events[-1]["type"] == f"response.{final.finish}"
    return final


def messages_whole(body):
    s = Said()
    for b in body["content"]:
        if b["type"] == "tool_use":
            s.call(b["id"], b["name"], b["input"])
        else:
            s.text("reasoning" if b["type"] == "thinking" else "content", b.get("thinking", b.get("text")))
    s.finish = body["stop_reason"]
    return s


def messages_streamed(answer):
    s = Said()
    for e in answer.events:
        d = e.get("delta", {})
        if e["type"] == "content_block_start" and e["content_block"]["type"] == "tool_use":
            s.call(e["content_block"]["id"], e["content_block"]["name"])
        elif d.get("type") == "input_json_delta":
            s.events[-1][2] += d["partial_json"]
        elif d.get("type") in ("text_delta", "thinking_delta"):
            s.text("content" if d["type"] == "text_delta" else "reasoning", d.get("text", d.get("thinking")))
        s.finish = d.get("stop_reason", s.finish)
    for e in s.events:
        if e[0] == "call":
            e[2] = json.loads(e[2] or "{}")
    return s


@pytest.mark.parametrize("path, body_fn, whole_fn, streamed_fn, finish", [
    ("/v1/responses", responses_body, responses_whole, responses_streamed,
     {"stop": "completed", "tool_calls": "completed", "length": "incomplete"}),
    ("/v1/messages", messages_body, messages_whole, messages_streamed,
     {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"})])
def test_other_shapes(scripts, path, body_fn, whole_fn, streamed_fn, finish):
    is_messages = path == "/v1/messages"
    # input of Anthropic's is an object, so arguments that broke off have no form there.
    cases = [(i, CASES[i]) for i in SAMPLE if not (is_messages and CASES[i].get("broken"))]
    assert len(cases) >= 60
    starts = {}
    for thinking in (False, True):
        status, _, r = scripts.c.post(path, {**body_fn({"thinking": thinking}, 0, 0, 0), "seed": 0})
        assert status == 200, r
        u = r["usage"]
        starts[thinking] = u["input_tokens"] + u.get("cache_read_input_tokens", 0)
    r = rng(path)
    bodies = [body_fn(c, i, starts[c.get("thinking", False)], r.randrange(1 << 31)) for i, c in cases]
    whole = scripts.ask(bodies, path)
    streamed = scripts.ask([{**b, "stream": True} for b in bodies], path)
    for (i, case), a, b in zip(cases, whole, streamed):
        assert a.status == b.status == 200 and not b.error, (case, a.body[:300], b.body[:300])
        want = [e if e[0] != "call" or not is_messages else [*e[:2], json.loads(e[2])] for e in case["out"]]
        for s in (whole_fn(json.loads(a.body)), streamed_fn(b)):
            assert (s.events, s.finish) == (want, finish[finish_of(case)]), case
