"""One prompt, one seed, one text: whatever the drafts, chunks, batches, workers, transports.

The token at a position depends on logits, sampling parameters, seed and position, and logits do not
depend on batch composition. So every configuration must give exactly the ids of the plainest one:
one worker of each kind, no MTP, whole prompts, one request at a time.
"""

import json

import pytest

from cluster import GOLDEN, Cluster, gather

N_TOKENS = 40
CASES = json.loads((GOLDEN / "golden.json").read_text())["cases"]
# The golden prompts, and some more that are short, long, or just past a page edge (64 tokens).
ASK = "[gMASK]<sop><|user|>{}<|assistant|></think>"
PROMPTS = [c["prompt"] for c in CASES.values()] + [
    ASK.format("Tell me a story about an owl."),
    ASK.format("Count from 90 to 140."),
    ASK.format("What is a river?"),
    ASK.format("Say 'one text' 9 times."),
    CASES["long"]["prompt"].replace("a cat?", "an owl?"),
    CASES["tool"]["prompt"].replace("garage", "kitchen"),
    "a",
]
SAMPLINGS = [
    {"do_sample": False},
    {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": -1, "seed": 11},
    {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": -1, "seed": 4242,
     "presence_penalty": 0.5, "logit_bias": {"262": -4, "308": 2.5, "30": -100}},
    # Penalties make a draw depend on the drafts before it.
    {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": -1, "seed": 11,
     "presence_penalty": 1.5, "frequency_penalty": 1.5, "repetition_penalty": 1.2},
]
BODIES = [{"inputs": p, "parameters": {"max_new_tokens": N_TOKENS, "return_details": True, **s}}
          for p in PROMPTS for s in SAMPLINGS]
WHAT = [f"prompt {i} sampling {j}" for i in range(len(PROMPTS)) for j in range(len(SAMPLINGS))]
PLAIN = ("--max-total-token-num", "65536", "--prefix-cache", "off")


def ids_of(cluster, at_once, bodies=BODIES):
    answers = gather(cluster, "/generate_stream", bodies, limit=at_once)
    for a in answers:
        assert a.error is None and a.whole, (a.error, a.body[-500:], cluster.log())
    return [a.ids for a in answers]


@pytest.fixture(scope="module")
def plain():
    with Cluster(*PLAIN, "--mtp-step", "0") as c:
        ids = ids_of(c, 1)
        c.wait_idle()
    assert all(ids)
    # A test that compares must have something to compare: seeds give different texts.
    per_prompt = [ids[i:i + len(SAMPLINGS)] for i in range(0, len(ids), len(SAMPLINGS))]
    assert sum(p[1] != p[2] for p in per_prompt) > 5
    assert sum(p[1] != p[3] for p in per_prompt) > 5
    return ids


def compare(got, want):
    wrong = [f"{w}: {g} instead of {p}" for w, g, p in zip(WHAT, got, want) if g != p]
    assert not wrong, f"{len(wrong)} of {len(want)} differ\n" + "\n".join(wrong[:5])


@pytest.mark.parametrize("mode", ["eagle_with_att", "vanilla_with_att"])
@pytest.mark.parametrize("step", [1, 2, 4, "auto"])
def test_mtp(plain, start, mode, step):
    c = start(*PLAIN, "--mtp-step", step, "--mtp-mode", mode)
    compare(ids_of(c, 1 if step == 2 else 8), plain)


@pytest.mark.parametrize("chunk", [16, 100, 8192])
def test_chunk_size(plain, start, chunk):
    c = start(*PLAIN, "--chunked-prefill-size", chunk, "--mtp-step", 2)
    compare(ids_of(c, 8), plain)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_two_and_two(plain, start, transport):
    c = start(*PLAIN, "--kv-transport", transport, "--mtp-step", 2, "--threads", 1, prefill=2, decode=2)
    compare(ids_of(c, 8), plain)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_transport(plain, start, transport):
    c = start(*PLAIN, "--kv-transport", transport, "--mtp-step", 0)
    compare(ids_of(c, 8), plain)


def test_among_32_others(plain, start):
    c = start(*PLAIN, "--mtp-step", 2)
    compare(ids_of(c, 32), plain)


def test_prefix_cache(plain, start):
    c = start("--max-total-token-num", 65536, "--prefix-cache", "on", "--mtp-step", 2)
    cold, warm = ids_of(c, 1), ids_of(c, 8)
    compare(cold, plain)
    compare(warm, plain)
    assert c.accounting("prefill-0")["pages"]["cached"] > 0


def test_preemption(plain, start):
    """A pool too small for all at once: decode gives streams up and computes them again."""
    c = start("--max-total-token-num", 2048, "--prefix-cache", "off", "--mtp-step", 2)
    compare(ids_of(c, 32), plain)
