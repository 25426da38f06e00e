"""A node for ComfyUI: attention by `lumina_kernels.gqa_attention`.

Copy this folder to `ComfyUI/custom_nodes/lumina_attention/`, in the environment that has
lumina-kernels, and put the node "Lumina attention" between the loader and the sampler. It assumes
of ComfyUI that its attention functions look for
`transformer_options["optimized_attention_override"]` and call it as `override(func, q, k, v, heads,
mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs)`, where
`func` is the attention that it takes the place of.
"""

from functools import partial

from comfy.ldm.modules import attention as comfy_attention

from lumina_kernels import gqa_attention
from lumina_kernels.attention_masks import key_mask_and_bias
from lumina_kernels.ops.gqa_attention import MAX_HEAD_DIM

OVERRIDE = "optimized_attention_override"
# Keywords that do not change the result, or are read below. Any other is left to `func`.
KNOWN = {"transformer_options", "_inside_attn_wrapper", "low_precision_attention"}
KNOWN |= {"scale", "enable_gqa"}


def override(
    func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
    skip_output_reshape=False, **kwargs,
):  # fmt: skip
    """Attention of q (B, L, H K) and k, v (B, L_kv, G K) or, with skip_reshape, of (B, H, L, K).

    A mask is bool (True is attended to) or added to the scores, and (L, L_kv), (B, L, L_kv) or
    broadcasts to (B, H, L, L_kv). Returns (B, L, H K) or, with skip_output_reshape, (B, H, L, K).
    The arithmetic is float32, whatever attn_precision.
    """
    K = q.shape[-1] if skip_reshape else q.shape[-1] // heads
    if skip_reshape:
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    else:
        queries, keys, values = (x.unflatten(-1, (-1, K)) for x in (q, k, v))
    if (
        kwargs.keys() - KNOWN
        or K > MAX_HEAD_DIM
        or keys.shape != values.shape
        or not q.dtype == k.dtype == v.dtype
        # ComfyUI's functions differ in whether this is (L, L_kv) or (B, L_kv).
        or (mask is not None and mask.ndim == 2 and not mask.is_floating_point())
    ):
        return func(
            q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
            skip_output_reshape=skip_output_reshape, **kwargs,
        )  # fmt: skip
    key_mask = bias = None
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        key_mask, bias = key_mask_and_bias(mask[:, None] if mask.ndim == 3 else mask, q)
    out = gqa_attention(queries, keys, values, key_mask, kwargs.get("scale"), bias=bias)
    return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)


class LuminaAttention:
    """A clone of a model whose attention is `override`."""

    CATEGORY, FUNCTION = "lumina-kernels", "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        model = model.clone()
        options = dict(model.model_options.get("transformer_options", {}))
        other = options.get(OVERRIDE)

        def within_other(func, *args, **kwargs):
            return other(partial(override, func), *args, **kwargs)

        options[OVERRIDE] = override if other is None else within_other
        model.model_options["transformer_options"] = options
        return (model,)


NODE_CLASS_MAPPINGS = {"LuminaAttention": LuminaAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"LuminaAttention": "Lumina attention"}

if hasattr(comfy_attention, "register_attention_function"):  # for nodes that choose one by name
    attention = comfy_attention.wrap_attn(partial(override, comfy_attention.attention_pytorch))
    comfy_attention.register_attention_function("lumina", attention)
