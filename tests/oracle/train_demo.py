#!/usr/bin/env python3
"""Trains the demo checkpoint: glm4_moe_lite with 11 M parameters, MTP layer included, on one GPU.

    train_demo.py OUT_DIR [--seconds 300] [--seed 1]
    train_demo.py OUT_DIR --steps 3 --documents 2000 --device cpu     # does it run?

The head geometry is the real model's (192 + 64 / 256, latent 512), so that kernels made for that run this
one too. Losses: the next token, and two drafts of the MTP layer (the second from the first one's state).
Router biases follow the load, as in the auxiliary-loss-free scheme: up for experts that get too little.
Another run gives another model: goldens.py has to follow.
"""
import argparse
import math
import multiprocessing
import os
import random
import time
from functools import partial

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import corpus
import glm

N_LEARNT, VOCAB = 3000, 3072  # ids from text; special tokens follow, the rest is padding as in the real model
SIZES = dict(hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=3,
             num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=2, q_lora_rank=128, vocab_size=VOCAB,
             max_position_embeddings=4096)
SPECIAL = ("<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> "
           "<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> <|begin_of_audio|> "
           "<|end_of_audio|> <|begin_of_transcription|> <|end_of_transcription|>").split()
NOT_SPECIAL = ("<|code_prefix|> <|code_middle|> <|code_suffix|> <think> </think> <tool_call> </tool_call> "
               "<tool_response> </tool_response> <arg_key> </arg_key> <arg_value> </arg_value> /nothink "
               "<|begin_of_box|> <|end_of_box|> <|image|> <|video|>").split()  # in the order of the real ids
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")
LENGTHS = [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024]  # documents are padded to one of these
LR, WARMUP, LAST_LR, BIAS_STEP = 2.5e-3, 200, 0.02, 1e-3
DRAFT_LOSS = 0.3, 0.15


# ---- text ---------------------------------------------------------------------------------------------------


def make_tokenizer(n_documents):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()

    def texts():
        r = random.Random(7)
        for document in corpus.documents(r, n_documents):
            text = "".join(piece for piece, _ in document)
            for token in SPECIAL + NOT_SPECIAL:
                text = text.replace(token, "\n")
            rare = r.random() < 0.2  # the same head in every text would fill the vocabulary
            yield text if rare else text.replace(corpus.TOOLS_HEAD[len("<|system|>"):], "")

    t.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=N_LEARNT, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if t.get_vocab_size() != N_LEARNT:
        raise SystemExit(f"{t.get_vocab_size()} ids learnt instead of {N_LEARNT}: more --documents are needed")
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    t.add_tokens([AddedToken(s, special=False, normalized=False) for s in NOT_SPECIAL])
    return t


def encode(path, n_documents, seed):
    """[(ids, weights)] of n_documents."""
    t, encoded = Tokenizer.from_file(path), []
    for document in corpus.documents(random.Random(seed), n_documents):
        ids, weights = [], []
        for text, weight in document:
            piece = t.encode(text, add_special_tokens=False).ids
            ids += piece
            weights += [weight] * len(piece)
        encoded.append((ids, weights))
    return encoded


def encode_all(path, n_documents, n_parts=64):
    with multiprocessing.get_context("spawn").Pool() as pool:
        parts = pool.map(partial(encode, path, n_documents // n_parts), range(1000, 1000 + n_parts))
    return [d for part in parts for d in part]


def pad(documents, device):
    """{length: (ids [n, length], weights [n, length])}; the longest documents are left out."""
    groups = {}
    for ids, weights in documents:
        length = next((n for n in LENGTHS if len(ids) <= n), None)
        if length:
            groups.setdefault(length, []).append((ids, weights))
    padded = {}
    for length, group in groups.items():
        ids, weights = torch.zeros(len(group), length, dtype=torch.short), torch.zeros(len(group), length)
        for i, (x, w) in enumerate(group):
            ids[i, :len(x)], weights[i, :len(x)] = torch.tensor(x, dtype=torch.short), torch.tensor(w)
        padded[length] = ids.to(device), weights.to(device)
    return padded


def batches(padded, n_tokens, device):
    """Endless (ids, weights): every length as often as it has tokens."""
    lengths = list(padded)
    share = torch.tensor([padded[n][0].numel() for n in lengths], dtype=torch.float)
    while True:
        for i in share.multinomial(256, replacement=True).tolist():
            ids, weights = padded[lengths[i]]
            rows = torch.randint(0, len(ids), (max(1, n_tokens // lengths[i]),), device=device)
            yield ids[rows].long(), weights[rows]


# ---- model --------------------------------------------------------------------------------------------------


def dense_experts(self, x, top_k_index, top_k_weights):
    """All experts on all tokens: with eight small ones faster than sorting tokens by expert."""
    weight = torch.zeros(len(x), self.num_experts, device=x.device, dtype=x.dtype)
    weight = weight.scatter(1, top_k_index, top_k_weights.to(x.dtype))
    gate, up = torch.einsum("td,efd->tef", x, self.gate_up_proj).chunk(2, -1)
    return torch.einsum("tef,edf->td", self.act_fn(gate) * up * weight[..., None], self.down_proj)


def initialize(model):
    deep = 0.02 / math.sqrt(2 * SIZES["num_hidden_layers"])
    with torch.no_grad():
        for name, p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, deep if "o_proj" in name or "down_proj" in name else 0.02)


def watch_load(model):
    """{router: share of the tokens that each expert got in the last pass}"""
    load = {}

    def note(router, args, out):
        load[router] = out[2].flatten().bincount(minlength=router.num_experts) / len(out[2])

    for router in model.routers():
        router.register_forward_hook(note)
    return load


def forward(model, ids):
    """States after the final norm, of the first draft and of the second, [B, n, H], [B, n-1, H], [B, n-2, H]."""
    h = model.hf.model(input_ids=ids, use_cache=False).last_hidden_state
    first = model.mtp_batch(ids[:, 1:], h[:, :-1])
    second = model.mtp_batch(ids[:, 2:], first[:, :-1], 1)
    return h, first, second


def loss_of(model, ids, weights):
    losses = []
    for ahead, h in enumerate(forward(model, ids), start=1):
        w, target = weights[:, ahead:].flatten(), ids[:, ahead:].flatten()
        logits = model.logits(h[:, :target.numel() // len(ids)]).float().flatten(0, 1)
        losses.append((F.cross_entropy(logits, target, reduction="none") * w).sum() / (w.sum() + 1e-6))
    return losses


def train(model, padded, a):
    load, device = watch_load(model), a.device
    parameters = [p for _, p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
         {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}], lr=LR, betas=(0.9, 0.95),
        fused=torch.device(device).type == "cuda")
    begin, step = time.time(), 0
    for ids, weights in batches(padded, a.batch_tokens, device):
        done = step / a.steps if a.steps else (time.time() - begin) / a.seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            decay = LAST_LR + (1 - LAST_LR) * 0.5 * (1 + math.cos(math.pi * done))
            group["lr"] = LR * min(1, (step + 1) / WARMUP) * decay
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            losses = loss_of(model, ids, weights)
        optimizer.zero_grad(set_to_none=True)
        (losses[0] + DRAFT_LOSS[0] * losses[1] + DRAFT_LOSS[1] * losses[2]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for router, share in load.items():
                router.e_score_correction_bias += BIAS_STEP * torch.sign(share.mean() - share)
        step += 1
        if step % 500 == 0 or step == a.steps:
            print(f"step {step}, {time.time() - begin:.0f} s: loss " + " ".join(f"{x.item():.3f}" for x in losses),
                  flush=True)


@torch.no_grad()
def exact_tool_calls(model, tokenizer, n):
    """How many of n single tool calls come out exactly as they should, greedily."""
    r, good = random.Random(12345), 0
    for _ in range(n):
        calls = [corpus.call(r) for _ in range(r.randint(1, 3))]
        tools = [c.tool for c in calls]
        r.shuffle(tools)
        prompt = f"{corpus.head(tools)}<|user|>{calls[0].query}<|assistant|></think>"
        want = tokenizer.encode(corpus.calls_text(calls[:1]) + "<|observation|>", add_special_tokens=False).ids
        seq = tokenizer.encode(prompt, add_special_tokens=False).ids + want
        logits = model.logits(model.hidden(torch.tensor(seq, device=model.device)))
        good += logits[-len(want) - 1:-1].argmax(-1).tolist() == want  # greedy keeps to want or leaves it
    return good


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out")
    ap.add_argument("--seconds", type=float, default=300)
    ap.add_argument("--steps", type=int, default=0, help="instead of --seconds")
    ap.add_argument("--documents", type=int, default=490000)
    ap.add_argument("--batch-tokens", type=int, default=16384)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = ap.parse_args()
    torch.manual_seed(a.seed)
    os.makedirs(a.out, exist_ok=True)
    path = os.path.join(a.out, "tokenizer.json")
    tokenizer = make_tokenizer(30000)
    tokenizer.save(path)
    padded = pad(encode_all(path, a.documents), a.device)
    print({n: len(ids) for n, (ids, _) in sorted(padded.items())}, flush=True)

    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    fields = glm.config_json(N_LEARNT, **SIZES)
    model = glm.Model(fields, torch.float32, a.device, experts="dense", attention="sdpa")
    initialize(model)
    train(model, padded, a)

    half = glm.Model(fields, torch.bfloat16, a.device)
    with torch.no_grad():
        for (_, to), (_, p) in zip(half.parameters(), model.parameters()):
            to.copy_(p)
    half.save(a.out)
    glm.write_json(os.path.join(a.out, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "pad_token": SPECIAL[0],
        "model_max_length": SIZES["max_position_embeddings"], "padding_side": "left"})
    exact = glm.load(a.out, torch.float32, a.device)
    print(f"tool calls exact: {exact_tool_calls(exact, tokenizer, 60)} of 60")


if __name__ == "__main__":
    main()
