"""The served model is the model: token ids equal those of an independent implementation."""

import json

import pytest

from cluster import GOLDEN

CASES = json.loads((GOLDEN / "golden.json").read_text())["cases"]
TOKENS = json.loads((GOLDEN / "golden_tokens.json").read_text())


def generate(cluster, prompt, n, **parameters):
    status, _, answer = cluster.post("/generate", {"inputs": prompt, "parameters": {
        "max_new_tokens": n, "do_sample": False, "return_details": True, **parameters}})
    assert status == 200, answer
    return answer


@pytest.mark.parametrize("case", TOKENS, ids=[f"text{i}" for i in range(len(TOKENS))])
def test_tokenizer(cluster, case):
    status, _, answer = cluster.post("/tokenize", {"prompt": case["text"], "add_special_tokens": False})
    assert status == 200, answer
    assert answer["tokens"] == case["ids"]
    status, _, back = cluster.post("/detokenize", {"tokens": case["ids"]})
    assert status == 200, back
    assert back["prompt"] == case["text"]


@pytest.mark.parametrize("name", CASES)
def test_prompt_ids(cluster, name):
    _, _, answer = cluster.post("/tokenize", {"prompt": CASES[name]["prompt"],
                                              "add_special_tokens": False})
    assert answer["tokens"] == CASES[name]["prompt_ids"]


@pytest.mark.parametrize("name", CASES)
def test_greedy_ids(cluster, name):
    case = CASES[name]
    answer = generate(cluster, case["prompt"], len(case["greedy_ids"]))
    assert [t["id"] for t in answer["tokens"]] == case["greedy_ids"]
    assert answer["count_output_tokens"] == len(case["greedy_ids"])


def test_mtp_is_at_work(cluster):
    """The demo model accepts about 95 % of its drafts; a wiring mistake would show as almost none."""
    generate(cluster, CASES["count"]["prompt"], 96)
    _, _, metrics = cluster.get("/metrics")
    values = {line.split("{")[0]: 0.0 for line in metrics.splitlines() if "spec_decode" in line}
    for line in metrics.splitlines():
        name = line.split("{")[0]
        if name in values and line[0] != "#":
            values[name] += float(line.rsplit(" ", 1)[1])
    drafted = values["vllm:spec_decode_num_draft_tokens_total"]
    accepted = values["vllm:spec_decode_num_accepted_tokens_total"]
    assert drafted > 0 and accepted / drafted > 0.7, values
