#!/usr/bin/env python3
"""Writes what transformers in fp32 makes of the demo checkpoint: tests/golden.

    goldens.py CHECKPOINT_DIR OUT_DIR          write
    goldens.py CHECKPOINT_DIR DIR --check      compare with what is there

  golden.json         per prompt: ids, greedy continuation, its smallest lead of the best logit over the
                      second, four MTP drafts at every position (drafts[i] is made at position
                      n_prompt - 1 + i and predicts greedy_ids[i + 1] on), mean number of them accepted,
                      routing ties: [layer, row, gap] where the last expert chosen leads the next by less than
                      bf16's noise, and the next one in its place moves a logit of the last four rows
  golden.safetensors  CASE.logits_last4: the last four prompt positions; CASE.logits_last4_tieN: with the other
                      expert of tie N; CASE.mtp_logits_first: first draft
  golden_tokens.json  texts and their ids, by Hugging Face's tokenizers
"""
import argparse
import json
import os
import random

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import corpus
import glm

N_DRAFTS, MAX_NEW, TOLERANCE = 4, 96, 1e-4
TIE_GAP, TIE_MATTERS = 4e-3, 0.02  # of a score; of a logit
TOKEN_TEXTS = [
    "", " ", "Hello, world!", "  two  spaces   here ", "I'm you're we'll THEY'D", "12345678 3.14",
    "naïve café Zürich 北京 你好！ 😀🎉👩‍👩‍👧", "a\n\nb\r\n\tc   \n d",
    "<|user|>x</think><tool_call>f<arg_key>k</arg_key>", "if (x<3) { return y->z; } // c", "éêë ÀÁÂ ﬁ ① ٣٤٥",
    "\u00a0nbsp\u2003em", "/nothink", "word" * 50]


def prompts():
    def user(text, thinking=False):
        return f"[gMASK]<sop><|user|>{text}<|assistant|>{'<think>' if thinking else '</think>'}"

    r = random.Random(99)
    calls = [corpus.call(r) for _ in range(3)]
    tools = [c.tool for c in calls]
    long = " ".join(corpus.story(random.Random(i)) for i in range(6))
    return {
        "dog": user("What is a dog?"),
        "ai": "What is AI? ",
        "think_computer": user("Define computer.", True),
        "count": user("Count from 5 to 40."),
        "story": user("Tell me a story about a fox."),
        "hello_zh": user("你好"),
        "emoji": user("Send me three emojis."),
        "tool": f"{corpus.head(tools)}<|user|>{calls[0].query}<|assistant|></think>",
        "tool_think": f"{corpus.head(tools, 'Be brief.')}<|user|>{calls[1].query}<|assistant|><think>",
        "json": user("Give me a JSON object with name Bob, age 12 and city Paris."),
        "repeat": user("Say 'the build is green' 6 times."),
        "baton": user("What is Baton?"),
        "long": f"{corpus.head(None, long)}<|user|>What is a cat?<|assistant|></think>",
    }


def greedy(model, ids, n_ids, eos):
    """(continuation, smallest lead of the best logit)"""
    seq, margin = list(ids), float("inf")
    while len(seq) < len(ids) + MAX_NEW and (len(seq) == len(ids) or seq[-1] not in eos):
        best = model.logits(model.hidden(torch.tensor(seq, device=model.device))[-1])[:n_ids].topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        seq.append(best.indices[0].item())
    return seq[len(ids):], margin


def drafts_at(model, seq, h, p, n_ids):
    """The drafts from slot p on (slots before it hold the target's states), and the first one's logits."""
    ids, states, drafts, first = seq[1:p + 2], h[:p + 1], [], None
    for _ in range(N_DRAFTS):
        u = model.mtp(ids, states)[-1:]
        logits = model.mtp_logits(u[0])
        first = logits if first is None else first
        drafts.append(logits[:n_ids].argmax().item())
        ids = torch.cat([ids, ids.new_tensor(drafts[-1:])])
        states = torch.cat([states, u])
    return drafts, first


def last4(model, ids):
    return model.logits(model.hidden(ids)[-4:])


def routing_ties(model, ids, want):
    """([[layer, row, gap], ...], [last4 with the other expert, ...])"""
    gaps, swap = [], None

    def hook(layer):
        def look(router, _, output):
            logits, weights, experts = output
            k, scores = router.top_k, logits.sigmoid()
            top = (scores + router.e_score_correction_bias).topk(k + 1)
            if swap is None:
                gaps.extend((layer, row, g) for row, g in enumerate((top.values[:, k - 1] - top.values[:, k]).tolist()))
            elif swap[0] == layer:
                row = swap[1]
                experts, weights = experts.clone(), weights.clone()
                experts[row] = top.indices[row, [*range(k - 1), k]]
                w = scores[row, experts[row]]
                weights[row] = w / w.sum() * router.routed_scaling_factor
            return logits, weights, experts
        return look

    routers = [(i, layer.mlp.gate) for i, layer in enumerate(model.hf.model.layers[:model.n_layers])
               if hasattr(layer.mlp, "gate")]
    hooks = [router.register_forward_hook(hook(i)) for i, router in routers]
    last4(model, ids)
    ties, others = [], []
    for layer, row, gap in sorted(gaps, key=lambda g: g[2]):
        swap = (layer, row)
        if gap < TIE_GAP:
            other = last4(model, ids)
            if (other - want).abs().max() > TIE_MATTERS:
                ties.append([layer, row, gap])
                others.append(other)
    for h in hooks:
        h.remove()
    return ties, others


def n_accepted(drafts, truth):
    n = 0
    while n < min(len(drafts), len(truth)) and drafts[n] == truth[n]:
        n += 1
    return n


@torch.no_grad()
def case(model, tokenizer, text, n_ids):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    prompt = torch.tensor(ids, device=model.device)
    tensors = {"logits_last4": last4(model, prompt)}
    ties, others = routing_ties(model, prompt, tensors["logits_last4"])
    tensors |= {f"logits_last4_tie{i}": other for i, other in enumerate(others)}
    new, margin = greedy(model, ids, n_ids, model.fields["eos_token_id"])
    seq = torch.tensor(ids + new, device=model.device)
    h, drafts, accepted = model.hidden(seq), [], []
    for p in range(len(ids) - 1, len(seq) - 2):
        d, first = drafts_at(model, seq, h, p, n_ids)
        tensors.setdefault("mtp_logits_first", first)
        drafts.append(d)
        accepted.append(n_accepted(d, seq[p + 2:].tolist()))
    mean = {str(k): sum(min(n, k) for n in accepted) / len(accepted) if accepted else None
            for k in range(1, N_DRAFTS + 1)}
    golden = {"prompt": text, "prompt_ids": ids, "greedy_ids": new,
              "greedy_text": tokenizer.decode(new, skip_special_tokens=False), "min_margin": margin,
              "drafts": drafts, "mean_accepted": mean, "routing_ties": ties}
    return golden, {k: v.float().cpu().contiguous() for k, v in tensors.items()}


def ties_same(got, want):
    return [g[:2] for g in got] == [w[:2] for w in want] and \
        all(abs(g[2] - w[2]) < TOLERANCE / 10 for g, w in zip(got, want))


def check(directory, golden, tensors, tokens):
    """Prints what differs; True if nothing does."""
    def read(name):
        return json.load(open(os.path.join(directory, name), encoding="utf-8"))

    was, was_tensors = read("golden.json")["cases"], load_file(os.path.join(directory, "golden.safetensors"))
    bad = [] if set(was) == set(golden) and set(was_tensors) == set(tensors) else ["other cases"]
    for name in set(was) & set(golden):
        for key, want in was[name].items():
            got = golden[name][key]
            same = abs(got - want) < TOLERANCE if key == "min_margin" else ties_same(got, want) \
                if key == "routing_ties" else got == want
            bad += [] if same else [f"{name}.{key}: {str(got)[:200]}, was {str(want)[:200]}"]
    worst = max((tensors[k] - v).abs().max().item() for k, v in was_tensors.items() if k in tensors)
    if not worst <= TOLERANCE:
        bad.append(f"a logit differs by {worst}")
    if read("golden_tokens.json") != tokens:
        bad.append("golden_tokens.json")
    print("\n".join(bad) or f"{len(was)} cases equal, logits within {worst:.1e}")
    return not bad


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("checkpoint")
    ap.add_argument("out")
    ap.add_argument("--check", action="store_true")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = ap.parse_args()
    torch.set_float32_matmul_precision("highest")
    model = glm.load(a.checkpoint, torch.float32, a.device)
    tokenizer = Tokenizer.from_file(os.path.join(a.checkpoint, "tokenizer.json"))
    n_ids = tokenizer.get_vocab_size()  # the head's further rows are padding
    golden, tensors = {}, {}
    for name, text in prompts().items():
        golden[name], t = case(model, tokenizer, text, n_ids)
        tensors |= {f"{name}.{k}": v for k, v in t.items()}
        print(f"{name}: {golden[name]['greedy_text'][:100]!r}", flush=True)
    tokens = [{"text": s, "ids": tokenizer.encode(s, add_special_tokens=False).ids} for s in TOKEN_TEXTS]
    if a.check:
        raise SystemExit(not check(a.out, golden, tensors, tokens))
    os.makedirs(a.out, exist_ok=True)
    how = f"fp32 from bf16 weights, inner norm eps 1e-5, padding rows {n_ids}.. excluded from argmax"
    glm.write_json(os.path.join(a.out, "golden.json"), {"model": "demo", "compute": how, "cases": golden}, 1)
    glm.write_json(os.path.join(a.out, "golden_tokens.json"), tokens, 1)
    save_file(tensors, os.path.join(a.out, "golden.safetensors"))


if __name__ == "__main__":
    main()
