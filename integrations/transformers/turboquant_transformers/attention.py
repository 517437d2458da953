# SPDX-License-Identifier: Apache-2.0
"""
The attention function "turboquant": model.set_attn_implementation("turboquant").

Over a TurboQuantCache it hands queries and mask to the library, which attends over the codes.
Without one (no cache, or another) it computes plain attention.
"""
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .cache_layer import ATTENTION_NAME

REFUSED = ("s_aux", "position_bias")  # arguments that change the scores in ways that the library does not know


def attend_over_codes(module, query, key, value, attention_mask, scaling=None, softcap=None, dropout=0.0, **kwargs):
    """query: [batch][n_heads][n][k_dim]. Returns [batch][n][n_heads][v_dim], and no weights."""
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"layer {module.layer_idx}: attention with {name} is not supported by '{ATTENTION_NAME}'")
    if dropout:
        raise ValueError(f"'{ATTENTION_NAME}' attention has no dropout: call model.eval()")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(key, "turboquant_layer", None)
    if layer is not None:
        return layer.attend(query, key, value, _as_f16(attention_mask), scaling, softcap or 0.0), None
    return plain_attention(query, key, value, attention_mask, scaling, softcap), None


def plain_attention(query, key, value, mask, scaling, softcap=None):
    """Shapes as above; key, value: [batch][n_kv_heads][n_keys][dim]. mask: as _as_f16 takes it."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        n, n_keys = scores.shape[2:]
        hidden = torch.ones(n, n_keys, dtype=torch.bool, device=scores.device).triu(n_keys - n + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    else:
        scores = scores + _as_f16(mask)
    weights = scores.softmax(-1, dtype=torch.float32).nan_to_num(0.0)  # rows that see nothing
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous()


def _as_f16(mask):
    """Additive f16: what was bool, or f16 already; -inf for the lowest number of any wider type."""
    if mask is None or mask.dtype == torch.float16:
        return mask
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float16, device=mask.device).masked_fill_(~mask, -torch.inf)
    return mask.to(torch.float16)


def additive_mask(*args, **kwargs):
    """[batch][1][n][n_keys] f16 of 0 and -inf, made once per forward pass, or None where causal says all."""
    return _as_f16(sdpa_mask(*args, **kwargs))


AttentionInterface.register(ATTENTION_NAME, attend_over_codes)
AttentionMaskInterface.register(ATTENTION_NAME, additive_mask)
