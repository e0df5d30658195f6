#!/usr/bin/env python3
"""Writes a random checkpoint with GLM-4.7-Flash's dimensions and what transformers computes from it.

    real_geometry.py CHECKPOINT_DIR REFERENCE_DIR [--small] [--seed N] [--device cuda]

CHECKPOINT_DIR gets 1 dense and 2 sparse layers and the MTP layer with an embedding and a head of its own,
6.5 GB (--small: the same head geometry, everything else tiny). Scales are chosen so that attention is not uniform, the
router's bias decides part of the routing, and logits have a clear best. REFERENCE_DIR gets:

  cases.json           sequences, the vocabulary ids whose logits are stored, slots (see recycled)
  model.safetensors    for each kind of row, KIND.NAME with one entry per row, all fp32:
      logits   fp32 arithmetic on the bf16 weights, at the ids of cases.json
      bf16     the same by transformers in bf16: its distance from `logits` is what bf16 may cost
      best, gap, lse   over the whole vocabulary: id of the largest logit, its lead, log-sum-exp
      margin   how far the routers were from choosing another expert, as a multiple of what bf16 can
               change: the least of the layers. Below 1 another expert may be taken, and the logits of that
               row say nothing
  KIND main      every position of every sequence, one sequence after the other
       mtp       the MTP layer's slots, laid out the same; a sequence's last slot is empty
       recycled  `steps` drafts that continue from each of the slots listed in cases.json, each from the
                 state of the one before; tokens are the sequence's, not the drafts
"""
import argparse
import os

import torch

import glm

SIZES = dict(hidden_size=2048, intermediate_size=10240, moe_intermediate_size=1536, num_hidden_layers=3,
             num_attention_heads=20, n_routed_experts=64, num_experts_per_tok=4, q_lora_rank=768,
             vocab_size=154880, max_position_embeddings=202752)
SMALL = dict(hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=3,
             num_attention_heads=5, n_routed_experts=16, num_experts_per_tok=4, q_lora_rank=128,
             vocab_size=4096, max_position_embeddings=4096)
N_SEQUENCES, MIN_TOKENS, STEPS = 64, 12, 3
EDGES = [63, 64, 65, 66, 70, 127, 128, 129, 136, 191, 192, 193]
STD = {"embed_tokens": 1, "e_score_correction_bias": 0.5, "norm": 0.2}
GAIN = {"q_b_proj": 2, "o_proj": 2, "lm_head": 2, "shared_head.head": 2}


@torch.no_grad()
def randomize(model, seed):
    """Linear maps keep a vector's size up to a gain; norms are around 1, everything else around 0."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, p in model.parameters():
        std = next((s for key, s in STD.items() if key in name), None)
        if std is None:
            std = next((g for key, g in GAIN.items() if key in name), 1) * p.shape[-1] ** -0.5
        if p.dim() == 3:  # experts: a fp32 copy of all of them would be large
            for e in p:
                e.copy_(torch.randn(e.shape, generator=generator, device=model.device) * std)
        else:
            mean = 1 if "norm" in name else 0
            p.copy_(mean + torch.randn(p.shape, generator=generator, device=model.device) * std)


def sequences(vocab, max_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = [max_tokens, max_tokens - 1] + EDGES
    lengths += torch.randint(MIN_TOKENS, max_tokens, (N_SEQUENCES - len(lengths),), generator=generator).tolist()
    return [torch.randint(0, vocab, (n,), generator=generator) for n in lengths]


class Rows:
    """Collects one kind of row."""

    def __init__(self, top_k, columns):
        self.top_k, self.columns, self.parts = top_k, columns, []

    def add(self, logits, choices, path=None):
        """choices: of every sparse layer. path: what an earlier call returned whose rows these depend on."""
        logits, choices = logits.float(), torch.stack(choices, 1)  # [n, layers, E]
        best, order = logits.topk(2), choices.topk(self.top_k + 1).values
        lead = order[..., -2] - order[..., -1]
        if path is not None:
            lead = torch.minimum(lead, path)
        row = {"logits": logits[:, self.columns], "best": best.indices[:, 0].float(),
               "gap": best.values[:, 0] - best.values[:, 1], "lse": logits.logsumexp(-1),
               "lead": lead, "choices": choices}
        self.parts.append({k: v.cpu() for k, v in row.items()})
        return lead

    def add_empty(self):
        self.parts.append({k: torch.zeros_like(v[:1]) for k, v in self.parts[-1].items()})

    def done(self):
        return {k: torch.cat([p[k] for p in self.parts]).contiguous() for k in self.parts[0]}


def watch_routers(model):
    """The list gets what each router's choice goes by, [n, E], in the order of the calls."""
    seen = []
    for router in model.routers():
        router.register_forward_hook(
            lambda m, args, out: seen.append(out[0].float().sigmoid() + m.e_score_correction_bias))
    return seen


@torch.no_grad()
def compute(model, seqs, slots, columns):
    seen, top_k = watch_routers(model), model.fields["num_experts_per_tok"]
    main, mtp, recycled = (Rows(top_k, columns) for _ in range(3))
    for s, seq in enumerate(seqs):
        ids = seq.to(model.device)
        h = model.hidden(ids)
        main_choices = seen[:]
        main.add(model.logits(h), main_choices)
        seen.clear()
        shifted = ids[1:]
        u = model.mtp(shifted, h[:-1])
        first = mtp.add(model.mtp_logits(u), [c[:-1] for c in main_choices] + seen)
        mtp.add_empty()
        seen.clear()
        for slot in (slot for q, slot in slots if q == s):
            states, path = torch.cat([h[:slot + 1], u[slot:slot + 1]]), first[slot:slot + 1]
            for step in range(1, STEPS + 1):
                last = model.mtp(shifted[:slot + step + 1], states)[-1:]
                choices = [c[slot:slot + 1] for c in main_choices] + [seen.pop()[-1:]]
                path = recycled.add(model.mtp_logits(last), choices, path)
                states = torch.cat([states, last])
    return {"main": main.done(), "mtp": mtp.done(), "recycled": recycled.done()}


def route_noise(exact, rounded):
    """[layers]: four standard deviations of what bf16 does to the figures that decide the routing. (By the
    median: rerouted rows have far larger ones.)"""
    d = (exact["choices"] - rounded["choices"]).abs()
    return 4 * 1.4826 * d.transpose(1, 2).flatten(0, 1).median(0).values


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("checkpoint")
    ap.add_argument("reference")
    ap.add_argument("--small", action="store_true")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = ap.parse_args()
    torch.set_float32_matmul_precision("highest")

    sizes, max_tokens, n_columns = (SMALL, 200, 512) if a.small else (SIZES, 700, 1024)
    vocab = sizes["vocab_size"]
    fields = glm.config_json(vocab - 60, **sizes)
    model = glm.Model(fields, torch.bfloat16, a.device, own_tables=True)
    randomize(model, a.seed)
    model.save(a.checkpoint)
    print(f"{a.checkpoint}: {sum(p.numel() for _, p in model.parameters()) / 1e9:.2f} G parameters", flush=True)
    del model

    seqs = sequences(vocab, max_tokens, a.seed)
    slots = [(s, len(seqs[s]) * part // 4 - STEPS - 2) for s in range(0, 32) for part in (2, 4)]
    inner = torch.randperm(vocab - 128, generator=torch.Generator().manual_seed(a.seed))[:n_columns - 128] + 64
    columns = torch.cat([torch.arange(64), inner.sort().values, torch.arange(vocab - 64, vocab)])

    results = []
    for dtype in torch.float32, torch.bfloat16:
        model = glm.load(a.checkpoint, dtype, a.device)
        results.append(compute(model, seqs, slots, columns.to(a.device)))
        print(f"{dtype}: done", flush=True)
        del model
    exact, rounded = results

    os.makedirs(a.reference, exist_ok=True)
    tensors = {}
    for kind, rows in exact.items():
        noise = route_noise(rows, rounded[kind])
        rows["margin"] = (rows["lead"] / noise).min(-1).values
        for name in "logits", "best", "gap", "lse", "margin":
            tensors[f"{kind}.{name}"] = rows[name]
        tensors[f"{kind}.bf16"] = rounded[kind]["logits"]
        firm = rows["margin"] > 1
        want, got = rows["logits"][firm], rounded[kind]["logits"][firm]
        print(f"{kind}: {len(firm)} rows, {firm.float().mean():.0%} with firm routing; transformers in bf16: "
              f"relative error {(got - want).norm() / want.norm():.2e}, of half the rows below "
              f"{((got - want).norm(dim=1) / want.norm(dim=1)).median():.2e}, largest {(got - want).abs().max():.3f}")
    glm.save_file(tensors, os.path.join(a.reference, "model.safetensors"))
    glm.write_json(os.path.join(a.reference, "cases.json"),
                   {"columns": columns.tolist(), "steps": STEPS,
                    "sequences": [s.tolist() for s in seqs], "slots": slots}, indent=None)


if __name__ == "__main__":
    main()
