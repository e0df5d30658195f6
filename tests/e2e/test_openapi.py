"""/openapi.json against the code that it describes, and the server against it: whatever schemathesis makes of the
document, valid or not, gets an answer that the document knows, and none of a failing server."""

import json
import re
import subprocess
import sys

import pytest

from cluster import ROOT, SLOWER, Cluster
from scripted import NO_TIME

DOCUMENT = json.loads((ROOT / "router" / "openapi.json").read_text())
SCHEMAS = DOCUMENT["components"]["schemas"]
EXAMPLES = 10  # random ones an operation, beside those that cover each keyword
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
          "response_schema_conformance", "unsupported_method", "allow_header_conformance")


@pytest.fixture(scope="module")
def mock(tmp_path_factory):
    costs = tmp_path_factory.mktemp("costs") / "costs.json"
    costs.write_text(json.dumps(NO_TIME))
    with Cluster("--device", "mock", "--mock-costs", costs, "--max-req-total-len", 256) as c:
        yield c
        c.wait_idle()


def table(file, first):
    """The rows of a table in C."""
    text = (ROOT / "router" / file).read_text()
    return text[text.index(first):].split("\n};")[0]


def test_every_route_is_there():
    routes = re.findall(r'^    \{"([^"]+)", (GET|POST)', table("api.c", "static const struct route routes[]"), re.M)
    described = [(p.replace("{model}", "*"), m.upper()) for p, item in DOCUMENT["paths"].items() for m in item]
    assert len(routes) > 15 and sorted(routes) == sorted(described)


DIALECTS = {"API_CHAT": "ChatRequest", "API_COMPLETIONS": "CompletionRequest", "API_RESPONSES": "ResponseRequest",
            "API_MESSAGES": "MessageRequest", "API_GENERATE": "GenerateParameters",
            "API_GENERATE_OUTER": "GenerateRequest", "API_TOKENIZE": "TokenizeRequest",
            "API_DETOKENIZE": "DetokenizeRequest"}


def test_every_parameter_is_there():
    """And its type and range, where the table says them. What is refused is no parameter."""
    text = (ROOT / "router" / "api_params.c").read_text()
    sets = {name: [name] for name in DIALECTS}
    for name, value in re.findall(r"^#define (\w+) +(\(?API.*|\(?OPENAI.*|\(?ANY.*)$", text, re.M):
        sets[name] = re.findall(r"\w+", value)

    def dialects(name):
        return {name} if name in DIALECTS else set().union(*map(dialects, sets[name]))

    def defined(name, file):
        return int(re.search(rf"#define {name}\s+(\d+)", (ROOT / file).read_text())[1])

    numbers = {"MAX_TOKENS": 1e9, "INT32_MAX": 2**31 - 1, "API_MAX_N": defined("API_MAX_N", "router/api_internal.h"),
               "WIRE_MAX_TOP": defined("WIRE_MAX_TOP", "common/base/wire.h")}
    known = {d: {} for d in DIALECTS}
    rows = re.findall(r'^    \{"(\w+)",\s*([A-Z_| ]+),\s*(\w+)(.*?)\},', table("api_params.c", "struct row rows[]"),
                      re.M)
    for name, of, kind, rest in rows:
        for d in set().union(*(dialects(x.strip()) for x in of.split("|"))):
            if kind not in ("REFUSE", "ONLY"):
                known[d][name] = kind, rest
    assert len(rows) > 100
    for d, schema in DIALECTS.items():
        described = SCHEMAS[schema]["properties"]
        assert set(described) == set(known[d]), schema
        for name, (kind, rest) in known[d].items():
            p = described[name]
            if kind == "BOOL":
                assert p == {"type": ["boolean", "null"]}, (schema, name)
            if kind in ("INT", "REAL"):
                low, high = (x.strip() for x in rest.split(",")[-2:])
                limits = {"minimum": float(numbers.get(low, low)), "maximum": float(numbers.get(high, high))}
                assert p == {"type": ["integer" if kind == "INT" else "number", "null"], **limits}, (schema, name)


def test_the_server_has_it(mock):
    status, headers, body = mock.get("/openapi.json")
    assert status == 200 and headers["Content-Type"] == "application/json" and body == DOCUMENT
    assert mock.request("GET", "/openapi.json", headers={"If-None-Match": headers["ETag"]})[0] == 304


def test_schemathesis(mock, tmp_path):
    r = subprocess.run([sys.executable, "-m", "schemathesis.cli", "run", f"{mock.url}/openapi.json", "--phases", "coverage,fuzzing", "--max-examples", str(EXAMPLES),
                        "--generation-deterministic", "--checks", ",".join(CHECKS),
                        "--continue-on-failure", "--warnings", "off", "--no-color", "--suppress-health-check", "all",
                        "--workers", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=170 * SLOWER)
    assert r.returncode == 0, r.stdout[-8000:] + r.stderr[-2000:]
    made = re.search(r"(\d+) generated", r.stdout)
    assert made and int(made[1]) > 1000, r.stdout[-2000:]
    print(made[0])
