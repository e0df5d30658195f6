"""GLM-4.7-Flash's architecture by transformers, MTP layer included: what the oracles compute with.

transformers has no MTP layer, but its block is a decoder layer like any other: a model is built with one
layer more than its config.json says, the main forward stops before it, and Model.mtp puts the layer's own
parts (two norms, one projection, the head's norm) around it.
"""
import json, os

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import Glm4MoeLiteRMSNorm as Norm
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import Glm4MoeLiteTopkRouter as Router

HEAD_GEOMETRY = {"kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256}


def config_json(base_id, **sizes):
    """config.json's fields as the official checkpoint has them; base_id is <|endoftext|>'s."""
    fixed = {"architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
             "pad_token_id": base_id, "eos_token_id": [base_id, base_id + 7, base_id + 9], "hidden_act": "silu",
             "model_type": "glm4_moe_lite", "topk_method": "noaux_tc", "norm_topk_prob": True, "n_group": 1,
             "topk_group": 1, "n_shared_experts": 1, "routed_scaling_factor": 1.8, "first_k_dense_replace": 1,
             "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-5,
             "rope_scaling": None, "rope_theta": 1000000, "tie_word_embeddings": False, "dtype": "bfloat16"}
    return fixed | HEAD_GEOMETRY | {"num_key_value_heads": sizes["num_attention_heads"]} | sizes


class MtpParts(nn.Module):
    """What the MTP layer has besides a decoder layer. Its own embedding and head only if own_tables."""

    def __init__(self, config, own_tables):
        super().__init__()
        H, V, eps = config.hidden_size, config.vocab_size, config.rms_norm_eps
        self.enorm, self.hnorm = Norm(H, eps), Norm(H, eps)
        self.eh_proj = nn.Linear(2 * H, H, bias=False)
        self.shared_head = nn.ModuleDict({"norm": Norm(H, eps)})
        if own_tables:
            self.embed_tokens = nn.Embedding(V, H)
            self.shared_head["head"] = nn.Linear(H, V, bias=False)


class Model:
    """config: the dictionary of config.json. Sequences go through one at a time: ids and states have no
    batch dimension."""

    def __init__(self, fields, dtype, device, own_tables=False, experts="eager", attention="eager"):
        self.fields, self.device, self.n_layers = fields, device, fields["num_hidden_layers"]
        c = Glm4MoeLiteConfig(**fields | {"num_hidden_layers": self.n_layers + 1})
        c._attn_implementation, c._experts_implementation = attention, experts
        with torch.device(device):
            self.hf = Glm4MoeLiteForCausalLM._from_config(c, dtype=dtype).eval()
            self.parts = MtpParts(c, own_tables).to(dtype).eval()
        self.hf.config.num_hidden_layers = self.n_layers  # the forward runs so many
        self.block = self.hf.model.layers[self.n_layers]
        for name, module in self.hf.named_modules():  # transformers leaves these two at 1e-6
            if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
                module.variance_epsilon = c.rms_norm_eps

    def routers(self):
        return [m for m in self.hf.modules() if isinstance(m, Router)]

    def parameters(self):
        """(name in the checkpoint, tensor) of everything, experts fused as transformers has them."""
        yield from self.hf.named_parameters()
        yield from self.mtp_parts()
        for name, b in self.hf.named_buffers():
            if name.endswith("e_score_correction_bias"):
                yield name, b

    def mtp_parts(self):
        for name, p in self.parts.named_parameters():
            yield f"model.layers.{self.n_layers}.{name}", p

    def hidden(self, ids):
        """[n] -> [n, H] after the final norm: what the head reads and the MTP layer is given."""
        return self.hf.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]

    def logits(self, hidden):
        return self.hf.lm_head(hidden)

    def mtp(self, ids, hidden):
        """Slot i takes the token of position i + 1 (ids[i]) and the hidden state of position i; -> [n, H]
        after shared_head.norm: what the head reads and the next draft is given."""
        return self.mtp_batch(ids[None], hidden[None])[0]

    def mtp_batch(self, ids, hidden, first_slot=0):
        """The same for a batch, [B, n] and [B, n, H]."""
        parts, n = self.parts, ids.shape[1]
        embed = parts.embed_tokens if hasattr(parts, "embed_tokens") else self.hf.model.embed_tokens
        z = parts.eh_proj(torch.cat([parts.enorm(embed(ids)), parts.hnorm(hidden)], -1))
        position = torch.arange(first_slot, first_slot + n, device=ids.device)[None]
        mask = torch.full((n, n), torch.finfo(z.dtype).min, dtype=z.dtype, device=z.device).triu(1)
        z = self.block(z, attention_mask=mask[None, None], position_ids=position,
                       position_embeddings=self.hf.model.rotary_emb(z, position))
        return parts.shared_head["norm"](z)

    def mtp_logits(self, u):
        head = self.parts.shared_head
        return head["head"](u) if "head" in head else self.hf.lm_head(u)

    def save(self, directory):
        """The checkpoint as published ones are: experts one by one, router bias in fp32, MTP layer last."""
        os.makedirs(directory, exist_ok=True)
        self.hf.save_pretrained(directory, max_shard_size="100GB")
        name, extra = "model.safetensors", "mtp.safetensors"
        index = {key: name for key in safetensors_names(os.path.join(directory, name))}
        parts = {key: p.detach().cpu().contiguous() for key, p in self.mtp_parts()}
        save_file(parts, os.path.join(directory, extra))
        index |= {key: extra for key in parts}
        first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
        os.rename(os.path.join(directory, name), os.path.join(directory, first))
        os.rename(os.path.join(directory, extra), os.path.join(directory, second))
        shards = {name: first, extra: second}
        write_json(os.path.join(directory, "model.safetensors.index.json"),
                   {"metadata": {"total_size": sum(p.numel() for _, p in self.parameters())},
                    "weight_map": {key: shards[index[key]] for key in sorted(index)}})
        write_json(os.path.join(directory, "config.json"), self.fields)
        eos = self.fields["eos_token_id"]
        write_json(os.path.join(directory, "generation_config.json"),
                   {"eos_token_id": eos, "pad_token_id": eos[0], "temperature": 1.0})


def load(directory, dtype, device, **how):
    """A checkpoint in dtype (bf16 values are exact in fp32). Every tensor must find its place."""
    fields = json.load(open(os.path.join(directory, "config.json")))
    shards = sorted({os.path.join(directory, f) for f in json.load(
        open(os.path.join(directory, "model.safetensors.index.json")))["weight_map"].values()})
    left = {}
    for shard in shards:
        left |= load_file(shard, device=device)
    prefix = f"model.layers.{fields['num_hidden_layers']}."
    m = Model(fields, dtype, device, own_tables=prefix + "embed_tokens.weight" in left, **how)
    F = fields["moe_intermediate_size"]
    with torch.no_grad():
        for name, p in m.parameters():
            if name.endswith("experts.gate_up_proj"):
                for e in range(len(p)):
                    at = name.replace("gate_up_proj", str(e))
                    p[e, :F], p[e, F:] = left.pop(at + ".gate_proj.weight"), left.pop(at + ".up_proj.weight")
            elif name.endswith("experts.down_proj"):
                for e in range(len(p)):
                    p[e] = left.pop(name.replace("down_proj", f"{e}.down_proj.weight"))
            else:
                p.copy_(left.pop(name))
    if left:
        raise SystemExit(f"{directory}: {sorted(left)[:5]} do not belong to the model")
    return m


def safetensors_names(path):
    with open(path, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return [key for key in header if key != "__metadata__"]


def write_json(path, value, indent=2):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=False, indent=indent)
        f.write("\n")
