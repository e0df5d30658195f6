"""A cluster that emits given token lists: `--device mock` with outputs, each asked for by a seed.

A seed holds the output's number, where it begins, and 31 bits of salt (common/engine/mock_outputs.h). With
--mtp-simulate-acceptance a coin of seed and position decides which token shares its predecessor's step (simulate
in decode_worker/speculate.c), so trying salts finds a seed for any cut of a short output into steps.
"""

import json
import random

from cluster import DEMO_MODEL, Cluster
from test_mock import MASK, mix

ACCEPTANCE = 0.75
NO_TIME = {"decode_ms": [[1, 0]], "verify_row_ms": [[1, 0]], "draft_ms": [[1, 0]], "prefill_tokens_per_s": 1e9,
           "prefill_chunk_ms": 0}


class Vocabulary:
    def __init__(self):
        t = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        of_char = {chr(b): b for b in plain}
        of_char.update({chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in plain)})
        self.tokens = {bytes(of_char[c] for c in text): id for text, id in t["model"]["vocab"].items()}
        self.longest = max(map(len, self.tokens))
        self.added = {a["content"]: a["id"] for a in t["added_tokens"]}
        self.n = 1 + max(self.added.values())

    def _text(self, text, r):
        ids = []
        while text:
            fits = [n for n in range(1, min(len(text), self.longest) + 1) if text[:n] in self.tokens]
            n = r.choice(fits) if r else fits[-1]
            ids.append(self.tokens[text[:n]])
            text = text[n:]
        return ids

    def encode(self, text, r=None):
        """Ids that spell text: the longest tokens, or any (cut within characters too) that r draws. Added tokens are
        themselves, but for those between two \\1, which are only spelled."""
        ids = []
        for i, part in enumerate(text.split("\1")):
            while part:
                at, tag = min(((part.find(a), a) for a in self.added if a in part and i % 2 == 0),
                              default=(len(part), ""))
                ids += self._text(part[:at].encode(), r)
                ids += [self.added[tag]] if tag else []
                part = part[at + len(tag):]
        return ids


def joined(seed, start, i):
    """Whether token i of an output (from 1) lets the next one into its step."""
    h = mix((seed ^ (start + i - 1) * 0x9e3779b97f4a7c15) & MASK)
    return (h >> 11) * 2.0**-53 < ACCEPTANCE


def seed_of(number, start, salt):
    return salt << 32 | number + 1 << 16 | start


def seed_for(number, start, n, cuts, r):
    """A seed that cuts an output of n tokens before those in cuts and nowhere else, as far as windows reach. The first
    token is always alone: it comes from the prefill worker."""
    while True:
        seed = seed_of(number, start, r.randrange(1 << 31))
        if all(joined(seed, start, i - 1) != (i in cuts) for i in range(2, n)):
            return seed


def scripted(directory, outputs, *flags):
    """A Cluster that can emit outputs (lists of ids)."""
    (directory / "outputs.json").write_text(json.dumps(outputs))
    costs = directory / "costs.json"
    costs.write_text(json.dumps({**NO_TIME, "outputs": str(directory / "outputs.json")}))
    return Cluster("--device", "mock", "--mock-costs", costs, *flags)


def drafts(step):
    return ("--mtp-step", step, "--mtp-simulate-acceptance", ACCEPTANCE) if step else ("--mtp-step", 0)


def rng(*key):
    return random.Random(repr(key))
