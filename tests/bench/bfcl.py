#!/usr/bin/env python3
"""Function calling by the Berkeley leaderboard's single-turn categories, on any OpenAI-compatible server.

    python3 -m venv /tmp/v && /tmp/v/bin/pip install --no-deps bfcl-eval
    /tmp/v/bin/python tests/bench/bfcl.py --url http://127.0.0.1:8088 --out bfcl.json

Data and checker are those of the package bfcl-eval; of its dependencies none is needed. Its current
release numbers its files v4; the single-turn categories are those of v3. Scored as there:

* simple, multiple, parallel, java, javascript, live_*, sql: the calls are compared with the possible
  answers by the package's ast_checker; a dot in a function's name is an underscore, as OpenAI's API wants
* irrelevance: right if there is no call; live_relevance: right if there is one
* rest is left out: it calls live services

"overall" is the share of all questions of the categories that LightLLM published, without rest; from its
table (49.12 with rest) that is 50.26. live_irrelevance and live_relevance are shown and not counted.
"""

import argparse
import asyncio
import copy
import importlib.util
import json
import pathlib
import re
import sys
import types
import urllib.parse

# LightLLM's published results for GLM-4.7-Flash on BFCL v3, percent.
PUBLISHED = {
    "simple": 62.5, "multiple": 54.5, "parallel": 69.5, "parallel_multiple": 61.5, "java": 66, "javascript": 48,
    "irrelevance": 83.33, "live_simple": 45.74, "live_multiple": 34, "live_parallel": 25,
    "live_parallel_multiple": 37.5, "sql": 28, "overall": 50.26,
}
FILES = {"simple": "simple_python", "java": "simple_java", "javascript": "simple_javascript"}
CATEGORIES = ["simple", "multiple", "parallel", "parallel_multiple", "java", "javascript", "irrelevance",
              "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance",
              "live_relevance", "sql"]
HINTS = {"java": "Java 8 SDK", "javascript": "JavaScript"}
MAX_ANSWER_BYTES = 64 << 20


def package_dir():
    spec = importlib.util.find_spec("bfcl_eval")
    if not spec:
        sys.exit("bfcl.py: pip install --no-deps bfcl-eval")
    return pathlib.Path(spec.submodule_search_locations[0])


def load_checker():
    """(ast_checker, Language, type mapping). The package's table of models imports every vendor's SDK
    and only says whether dots become underscores: a stand-in says yes."""

    class EveryModel(dict):
        def __missing__(self, name):
            return types.SimpleNamespace(underscore_to_dot=True)

    stand_in = types.ModuleType("bfcl_eval.constants.model_config")
    stand_in.MODEL_CONFIG_MAPPING = EveryModel()
    sys.modules["bfcl_eval.constants.model_config"] = stand_in
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.constants.type_mappings import GORILLA_TO_OPENAPI
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
    return ast_checker, Language, GORILLA_TO_OPENAPI


def load_category(data, name):
    """[(entry, possible answer or None)]"""
    file = f"BFCL_v4_{FILES.get(name, name)}.json"
    unused = data / "unused_datasets"
    questions = data / file if (data / file).exists() else unused / "question" / file
    answers = data / "possible_answer" / file
    if not answers.exists():
        answers = unused / "possible_answer" / file
    read = lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    truth = {a["id"]: a["ground_truth"] for a in read(answers)} if answers.exists() else {}
    entries = read(questions)
    if "irrelevance" not in name and "relevance" not in name:
        missing = [e["id"] for e in entries if e["id"] not in truth]
        if missing:
            sys.exit(f"bfcl.py: {questions} has questions without an answer: {missing[:3]}")
    return [(e, truth.get(e["id"])) for e in entries]


# -- what is asked

def schema(value, types_map):
    """The data set's parameter descriptions as JSON Schema, all levels."""
    if isinstance(value, list):
        return [schema(v, types_map) for v in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, v in value.items():
        if key == "properties" and isinstance(v, dict):
            result[key] = {name: schema({"type": "string", **p}, types_map) for name, p in v.items()}
        elif key == "type" and isinstance(v, str):
            result[key] = types_map.get(v, "string")
            if v == "float":
                result["format"] = "float"
        elif key in ("enum", "default", "required", "description"):
            result[key] = v
        else:
            result[key] = schema(v, types_map)
    return result


def strings_only(properties, language):
    """Java and JavaScript values are written as that language's text and converted by the checker."""
    for p in properties.values():
        note = f" This is {language} {p.get('type', 'any')} type parameter in string representation."
        if p.get("type") in ("ArrayList", "Array", "array") and "items" in p:
            note += f" The list elements are of type {p['items'].get('type', 'any')}; they are not in string " \
                    "representation."
        p["description"] = p.get("description", "") + note
        p["type"] = "string"
        p.pop("items", None)
        p.pop("properties", None)


def make_tools(functions, name, types_map):
    tools = []
    for f in copy.deepcopy(functions):
        f["name"] = re.sub(r"\.", "_", f["name"])
        f["description"] += f" Note that the provided function is in {HINTS.get(name, 'Python 3')} syntax."
        if name in HINTS:
            strings_only(f["parameters"]["properties"], "Java" if name == "java" else "JavaScript")
        f["parameters"] = schema({**f["parameters"], "type": "dict"}, types_map)
        f.pop("response", None)
        tools.append({"type": "function", "function": f})
    return tools


def make_body(entry, name, types_map, args):
    question = entry["question"]
    messages = question[0] if isinstance(question[0], list) else question
    body = {"model": args.model, "messages": messages, "temperature": args.temperature,
            "max_tokens": args.max_tokens, "tools": make_tools(entry["function"], name, types_map)}
    return {**body, **args.extra_body}


# -- asking

async def post(url, path, body, key, timeout):
    """(status, parsed JSON); one request a connection."""
    at = urllib.parse.urlsplit(url)
    data = json.dumps(body).encode() if body is not None else b""
    head = f"{'POST' if data else 'GET'} {at.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {at.netloc}\r\n" \
           f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    if key:
        head += f"Authorization: Bearer {key}\r\n"
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection(at.hostname, at.port or 80)
        try:
            writer.write(head.encode() + b"\r\n" + data)
            answer = await reader.read(MAX_ANSWER_BYTES)
            while (more := await reader.read(MAX_ANSWER_BYTES)):
                answer += more
        finally:
            writer.close()
    head, _, rest = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        parts = []
        while rest and (size := int(rest.partition(b"\r\n")[0].split(b";")[0], 16)):
            rest = rest.partition(b"\r\n")[2]
            parts.append(rest[:size])
            rest = rest[size + 2:]
        rest = b"".join(parts)
    return int(head.split()[1]), json.loads(rest)


def decode_calls(message):
    """[{name: arguments}] of an answer; raises ValueError if arguments are no JSON object."""
    calls = []
    for c in message.get("tool_calls") or []:
        arguments = json.loads(c["function"]["arguments"] or "{}")
        if not isinstance(arguments, dict):
            raise ValueError("arguments are no object")
        calls.append({c["function"]["name"]: arguments})
    return calls


def judge(name, entry, truth, message, checker, language):
    """(right, why not)"""
    try:
        calls = decode_calls(message)
    except (ValueError, KeyError, TypeError) as e:
        return "irrelevance" in name, f"calls cannot be read: {e}"
    if "irrelevance" in name:
        return not calls, "a call where none fits"
    if name == "live_relevance":
        return bool(calls), "no call"
    if not calls:
        return False, "no call"
    category = FILES.get(name, name)
    verdict = checker(entry["function"], calls, truth, language, category, "server")
    return verdict["valid"], verdict.get("error_type", "") + ": " + " ".join(map(str, verdict.get("error", [])))


async def ask_all(tasks, types_map, checker, languages, args):
    gate = asyncio.Semaphore(args.concurrency)
    done = 0

    async def one(name, entry, truth):
        nonlocal done
        async with gate:
            try:
                status, answer = await post(args.url, "/v1/chat/completions", make_body(entry, name, types_map, args),
                                            args.api_key, args.timeout)
                if status == 200:
                    message = answer["choices"][0]["message"]
                    right, why = judge(name, entry, truth, message, checker, languages[name])
                else:
                    message, right, why = None, False, f"server: {status} {json.dumps(answer)[:300]}"
            except (OSError, TimeoutError, ValueError, LookupError) as e:
                message, right, why = None, False, f"server: {type(e).__name__} {e}"
        done += 1
        if sys.stderr.isatty() or done % 200 == 0 or done == len(tasks):
            print(f"\r{done}/{len(tasks)}", end="" if done < len(tasks) else "\n", file=sys.stderr, flush=True)
        return {"category": name, "id": entry["id"], "right": right, "why": "" if right else why,
                "answer": message}

    return await asyncio.gather(*(one(*t) for t in tasks))


def summary(results):
    """{category: (right, all, failed requests)}, and overall."""
    table = {}
    for r in results:
        for name in (r["category"], "overall") if r["category"] in PUBLISHED else (r["category"],):
            right, n, failed = table.get(name, (0, 0, 0))
            table[name] = (right + r["right"], n + 1, failed + r["why"].startswith("server:"))
    return table


def show(table):
    print(f"{'category':24} {'right':>6} {'of':>6} {'percent':>8} {'LightLLM':>9}  requests failed")
    for name in [*CATEGORIES, "overall"]:
        published = f"{PUBLISHED[name]:9.2f}" if name in PUBLISHED else " " * 9
        if name in table:
            right, n, failed = table[name]
            print(f"{name:24} {right:6} {n:6} {100 * right / n:8.2f} {published}  {failed or ''}".rstrip())


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--url", default="http://127.0.0.1:8088")
    p.add_argument("--model", default="", help="default: the first of /v1/models")
    p.add_argument("--api-key", default="")
    p.add_argument("--categories", default=",".join(CATEGORIES))
    p.add_argument("--limit", type=int, default=0, help="first N of each category; 0 = all")
    p.add_argument("--concurrency", type=int, default=32)
    p.add_argument("--temperature", type=float, default=0)
    p.add_argument("--max-tokens", type=int, default=4096)
    p.add_argument("--timeout", type=float, default=600)
    p.add_argument("--extra-body", type=json.loads, default={}, help="JSON object for every request, e.g. "
                   '\'{"chat_template_kwargs": {"enable_thinking": false}}\'')
    p.add_argument("--data", type=pathlib.Path, help="directory like the package's data")
    p.add_argument("--out", help="JSON of every answer and verdict")
    args = p.parse_args(argv)
    args.categories = args.categories.split(",")
    unknown = set(args.categories) - set(CATEGORIES)
    if unknown:
        p.error(f"--categories: {', '.join(sorted(unknown))} unknown; there are {', '.join(CATEGORIES)}")
    return args


def main(argv=None):
    args = arguments(argv)
    data = args.data or package_dir() / "data"
    checker, language, types_map = load_checker()
    languages = {c: language.JAVA if c == "java" else language.JAVASCRIPT if c == "javascript" else language.PYTHON
                 for c in args.categories}
    tasks = []
    for name in args.categories:
        entries = load_category(data, name)
        tasks += [(name, e, truth) for e, truth in (entries[:args.limit] if args.limit else entries)]
    if not args.model:
        status, models = asyncio.run(post(args.url, "/v1/models", None, args.api_key, args.timeout))
        args.model = models["data"][0]["id"]
    results = asyncio.run(ask_all(tasks, types_map, checker, languages, args))
    table = summary(results)
    show(table)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as f:
            json.dump({"model": args.model, "table": table, "results": results}, f, ensure_ascii=False, indent=1)
    return 1 if any(failed for _, _, failed in table.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
