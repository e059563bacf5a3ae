"""Tiny random models of seventeen architectures, built from config, with the features that break naive code:

grouped key-value heads, head sizes that are not d_model / n_heads, sliding windows shorter than the prompts,
multipliers, softcaps. Weights are scaled up, so that interventions have effects well above float error.
"""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

D_VOCAB = 64
IDS = {"vocab_size": D_VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64, **IDS}
LLAMA = {**SIZE, "intermediate_size": 48, "num_key_value_heads": 2}
GEMMA = {**LLAMA, "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 8}

CONFIGS = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **IDS},
    "gpt_neo": {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 64, "window_size": 4,
                "attention_types": [[["global", "local", "global"], 1]], **IDS},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "tie_word_embeddings": False, **IDS},
    "gpt_neox": {**SIZE, "intermediate_size": 48},
    "opt": {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, **IDS},
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 4},
    "ministral": {**LLAMA, "head_dim": 8, "sliding_window": 2,
                  "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "mixtral": {**LLAMA, "num_local_experts": 4, "sliding_window": 4},
    "qwen2": {**LLAMA, "use_sliding_window": True, "sliding_window": 4,
              "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "qwen3": {**LLAMA, "head_dim": 16},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {**LLAMA, "sliding_window": 4},
    "olmo2": LLAMA,
    "granite": {**LLAMA, "residual_multiplier": 0.7, "attention_multiplier": 0.5, "embedding_multiplier": 3.0,
                "logits_scaling": 2.0},
}  # fmt: skip
ROUTED = {**LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES = {  # each with its own way of choosing; a shared expert or a layer without any in some
    "mixtral": CONFIGS["mixtral"],
    "qwen2_moe": {**ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    "qwen3_moe": {**ROUTED, "num_experts": 4, "head_dim": 8},
    "olmoe": {**ROUTED, "num_experts": 4},
    "deepseek_v3": {**ROUTED, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
                    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                    "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8},
    "gpt_oss": {**ROUTED, "num_local_experts": 4, "head_dim": 8,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
}  # fmt: skip
SMALL = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **IDS}
OTHERS = {  # further families: the checks of `tests/model` only. What they do not offer, beside logits and experts
    **{name: (LLAMA, set()) for name in ("gemma", "starcoder2", "glm", "glm4", "olmo", "olmo3", "exaone4", "stablelm", "smollm3", "nemotron",
                                         "arcee", "apertus", "vaultgemma", "seed_oss", "ernie4_5", "ministral3")},
    **{name: (LLAMA, {"resid_mid"}) for name in ("phi", "cohere", "cohere2")},
    "llama4_text": ({**LLAMA, "num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48}, {"neuron"}),
    "granitemoe": ({**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, {"neuron"}),
    "nanochat": (LLAMA, {"ln_final"}), "gpt_bigcode": (SMALL, set()),
    "falcon": (SIZE, {"q", "k", "v", "attn_scores", "pattern", "resid_mid"}),
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Four special tokens, then the words w4 to w63, each with its number as id."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), D_VOCAB)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def build(architecture: str, seed: int = 0) -> torch.nn.Module:
    """A random model of one architecture, matrices scaled up: more where LayerNorm and its biases damp effects."""
    torch.manual_seed(seed)
    settings = CONFIGS | MIXTURES | {name: given for name, (given, _) in OTHERS.items()}
    config = AutoConfig.for_model(architecture, **settings[architecture])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.mul_(12 if architecture in ("gpt2", "gpt_neo", "gptj", "opt", "bloom", "granite") else 4)
    return model


def copying(n: int = 12, seed: int = 3) -> list[dict]:
    """Pairs for `trained`: w4 at position 2 makes w6 right, w5 makes w7 right; the other words are noise."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        words = [f"w{k}" for k in rng.integers(10, D_VOCAB, 7)]
        clean, corrupted = (" ".join([*words[:2], cause, *words[3:]]) for cause in ("w4", "w5"))
        rows.append({"clean": clean, "corrupted": corrupted, "answer": "w6", "foil": "w7", "template": "t",
                     "entity": str(i), "spans": {"cause": "w4"}})  # fmt: skip
    return rows


def trained(architecture: str = "llama") -> torch.nn.Module:
    """A tiny model taught for a few seconds to answer as `copying` says: a cause whose place is known."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **CONFIGS[architecture])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        ids, kind = torch.randint(10, D_VOCAB, (64, 7)), torch.randint(0, 2, (64,))
        ids[:, 2] = 4 + kind
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, -1], 6 + kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    return model.eval()
