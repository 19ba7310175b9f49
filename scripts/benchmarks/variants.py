"""The models that `benchmark.py` compares, all of one width, depth and vocabulary, and what each should cost.

The variants are causal language models with tied embeddings and without dropout, and encoders: bidirectional stacks
without positions and without a head, so that one layer of them is little else than that layer. FLOPs count 2 per
multiply-add of the matrix products and convolutions; softmax, norms, activations and gates are left out, as they are in
`model.flops`. Fused causal attention is counted as the N(N+1)/2 pairs that it computes, unfused attention as all N*N.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

import ordnung
from ordnung.modeling.registration import REGISTERED

SLIDING_WINDOW = 256  # tokens that a token of a sparse model sees, itself included; half of it to each side in encoders
PROJECTED_SIZE = 128  # rows k of every LinformerLM of which nothing else is said
PROJECTED_SIZES = (128, 256, 512, 1024, 2048)  # of the encoders for the paper's grid
FEED_FORWARD_CHUNK = 512  # tokens, where the feed-forward is computed in parts


def attend_by_head(module, query, key, value, attention_mask, **kwargs):
    """Unfused attention, one head after the other: what stores all scores of all heads does not fit in memory."""
    heads = zip(*(x.split(1, dim=1) for x in (query, key, value)))
    return torch.cat([eager_attention_forward(module, *head, attention_mask, **kwargs)[0] for head in heads], 2), None


AttentionInterface.register("eager_by_head", attend_by_head)
AttentionMaskInterface.register("eager_by_head", eager_mask)


@dataclass(frozen=True)
class Shape:
    """Sizes that all variants share; `kernel_size` is ConvLM's.

    `max_length` sizes the tables of learned positions. It is set for each case to what that case needs: a longer table
    would burden a short training step with parameters to update.
    """

    hidden_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    vocab_size: int = 4096
    kernel_size: int = 64
    max_length: int = 1024

    def common(self) -> dict:
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }


def pairs(new: int, past: int, causal: bool) -> int:
    """Query-key pairs computed when `new` tokens follow `past` cached ones: the needed ones if `causal`, else all."""
    return new * past + (new * (new + 1) // 2 if causal else new * new)


def unfused_extra(width: int, new: int) -> int:
    """What unfused attention of one layer of width `width` computes beyond the causal pairs of `new` tokens."""
    return 4 * width * (pairs(new, 0, causal=False) - pairs(new, 0, causal=True))


def gpt2_flops(config: GPT2Config, new: int, past: int, logits: int) -> int:
    """4 D*D of attention projections, 2 D*4D of MLP, scores and their product with the values."""
    width, inner = config.hidden_size, config.n_inner or 4 * config.hidden_size
    causal = config._attn_implementation != "eager"
    per_layer = 2 * new * (4 * width * width + 2 * width * inner) + 4 * width * pairs(new, past, causal)
    return config.num_hidden_layers * per_layer + 2 * logits * width * config.vocab_size


def lfm2_flops(config: Lfm2Config, new: int, past: int, logits: int) -> int:
    """3 D*D into the gates and the value, D*D out, a depthwise convolution, three matrices of gated MLP."""
    width = config.hidden_size
    per_token = 4 * width * width + config.conv_L_cache * width + 3 * width * config.intermediate_size
    return 2 * new * config.num_hidden_layers * per_token + 2 * logits * width * config.vocab_size


def mamba_matmul_flops(config: MambaConfig, new: int, past: int, logits: int) -> int:
    """Projections, depthwise convolution and the read-out of the state; the scan itself is in `mamba_flops`."""
    width, inner, state, rank = config.hidden_size, config.intermediate_size, config.state_size, config.time_step_rank
    projections = width * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * width
    per_token = projections + config.conv_kernel * inner + inner * state
    return 2 * new * config.num_hidden_layers * per_token + 2 * logits * width * config.vocab_size


def mamba_flops(config: MambaConfig, new: int, past: int, logits: int) -> int:
    """Per state entry the scan discretises A (product, exponential) and B (two products) and does one multiply-add."""
    scan = 6 * new * config.num_hidden_layers * config.intermediate_size * config.state_size
    return mamba_matmul_flops(config, new, past, logits) + scan


def mistral_flops(config: MistralConfig, new: int, past: int, logits: int) -> int:
    """4 D*D of attention projections, three matrices of gated MLP; a window is a dense mask over fused attention."""
    width = config.hidden_size
    seen = pairs(new, past, causal=False) if new > 1 else min(config.sliding_window, past + 1)
    per_layer = 2 * new * (4 * width * width + 3 * width * config.intermediate_size) + 4 * width * seen
    return config.num_hidden_layers * per_layer + 2 * logits * width * config.vocab_size


def cubic_flops(config: PreTrainedConfig, new: int, past: int, logits: int) -> int:
    """Passes over the prefixes of the last `logits` tokens; a single new one starts from the state, with stride 1."""
    with torch.device("meta"):
        model = ordnung.CubicPrefixLMForCausalLM(config)
    tokens, width = past + new, config.hidden_size
    read = torch.arange(tokens)[None] >= tokens - logits
    flops = model.model.prefix_flops(tokens, read) + 2 * logits * width * config.vocab_size
    if past:  # the first layer's projections and sums over the past are there; new query, and scores of the new key
        flops += 4 * width * tokens + 2 * width * past - 4 * width * tokens**2 - 6 * width**2 * past
    return flops


def quadratic_flops(config: PreTrainedConfig, new: int, past: int, logits: int) -> int:
    """The model's own; a single token after others reads the state and adds to it, at whatever place of a chunk."""
    with torch.device("meta"):
        flops = ordnung.QuadraticKernelLMForCausalLM(config).flops(new)
    if past:
        flops += 4 * config.num_hidden_layers * config.state_size(config.head_dim)
    return flops - 2 * (new - logits) * config.hidden_size * config.vocab_size


@dataclass(frozen=True)
class Variant:
    """One model of the comparison.

    `config` makes its configuration from the shared sizes. `flops(config, new, past, logits)` is the cost of `new`
    tokens after `past` cached ones with `logits` positions put through the head; None asks the model's own `flops`.
    What is not run `by_default` grows too fast for the lengths of the others. One with a `static_form` keeps keys and
    values that grow, which transformers' `DynamicCache` copies at every token: it decodes in a `StaticCache` as well.
    """

    description: str
    model_class: type[PreTrainedModel]
    config: Callable[[Shape], PreTrainedConfig]
    flops: Callable[[PreTrainedConfig, int, int, int], int] | None = None
    attn_implementation: str | None = None
    cache_argument: str = "past_key_values"
    encoder: bool = False  # has no loss and no generation state: takes part in the forward task only
    by_default: bool = True
    static_form: bool = False

    def build(self, shape: Shape, seed: int = 0) -> PreTrainedModel:
        """A randomly initialised model in evaluation mode, float32, on the CPU."""
        torch.manual_seed(seed)
        config = self.config(shape)
        # Set on the configuration, as from_pretrained does: the plain constructor reads it from there.
        config._attn_implementation = self.attn_implementation
        return self.model_class(config).eval()

    def count_flops(self, model: PreTrainedModel, task: str, length: int) -> int:
        """FLOPs of one sequence: `length` tokens in forward, train and prefill, one token after `length` in decode.

        A training step is counted as three forward passes. Prefill makes logits for the last position only.
        """
        new, past = (1, length) if task == "decode" else (length, 0)
        logits = 1 if task == "prefill" else new
        if self.flops is not None:
            forward = self.flops(model.config, new, past, logits)
        else:
            forward = model.flops(past + new) - (model.flops(past) if past else 0)
            forward -= 2 * (new - logits) * model.config.hidden_size * model.config.vocab_size
            if self.attn_implementation == "eager" and not self.encoder:
                forward += model.config.num_hidden_layers * unfused_extra(model.config.hidden_size, new)
        return 3 * forward if task == "train" else forward

    def run(self, model: PreTrainedModel, input_ids: torch.Tensor, cache=None, past: int = 0, **kwargs):
        """Forward `input_ids` (batch, new), continuing `cache` (which holds `past` tokens) where one is given."""
        if self.encoder:
            return model(input_ids, **kwargs)
        if cache is not None:
            kwargs[self.cache_argument] = cache
        if self.model_class is Lfm2ForCausalLM:
            # A stack of convolution layers alone has no attention layer to ask for positions and mask sizes.
            kwargs["position_ids"] = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
            kwargs["attention_mask"] = {"full_attention": None, "conv": None}
        return model(input_ids, use_cache=cache is not None, **kwargs)


def _gpt2(description: str, attn_implementation: str = "sdpa", activation: str = "gelu_new") -> Variant:
    def config(shape: Shape) -> GPT2Config:
        return GPT2Config(
            **shape.common(),
            num_attention_heads=shape.num_attention_heads,
            n_positions=shape.max_length,
            activation_function=activation,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )

    return Variant(description, GPT2LMHeadModel, config, gpt2_flops, attn_implementation, static_form=True)


def _lfm2(shape: Shape) -> Lfm2Config:
    # Three gated matrices of 8/3 D have the parameters and FLOPs of the others' two matrices of 4 D.
    return Lfm2Config(
        **shape.common(),
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_attention_heads,
        layer_types=["conv"] * shape.num_hidden_layers,
        intermediate_size=8 * round(shape.hidden_size / 3),
        block_auto_adjust_ff_dim=False,
        max_position_embeddings=shape.max_length,
    )


def _mistral(shape: Shape) -> MistralConfig:
    return MistralConfig(
        **shape.common(),
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_attention_heads,
        intermediate_size=8 * round(shape.hidden_size / 3),  # as LFM2's
        max_position_embeddings=shape.max_length,
        sliding_window=SLIDING_WINDOW,
    )


def _ours(model_type: str, description: str, head: str = "ForCausalLM", flops=None, **own) -> Variant:
    """A family of ours.

    Args:
        own: fields of the variant, and config fields beyond those that all have.
    """
    prefix = REGISTERED[model_type].prefix
    of_variant = {"attn_implementation": "sdpa", "encoder": head == "Model"}
    of_variant |= {field: own.pop(field) for field in Variant.__dataclass_fields__ if field in own}

    def config(shape: Shape) -> PreTrainedConfig:
        positions, sizes = shape.max_length, {}
        if model_type == "conv_lm":
            sizes = {"kernel_size": shape.kernel_size}
        elif model_type == "linformer_lm":
            size = own.get("projected_size", PROJECTED_SIZE)
            sizes = {"projected_size": size}
            positions = -(-positions // size) * size  # whole blocks
        return getattr(ordnung, f"{prefix}Config")(
            **shape.common(),
            num_attention_heads=shape.num_attention_heads,
            hidden_dropout=0.0,
            max_position_embeddings=positions,
            **{**sizes, **own},
        )

    return Variant(description, getattr(ordnung, prefix + head), config, flops, **of_variant)


def _sparse(besides: str, **own) -> Variant:
    description = f"SparseAttentionLM, causal: a window of {SLIDING_WINDOW}{besides}"
    return _ours("sparse_attention_lm", description, sliding_window=SLIDING_WINDOW, by_default=False, **own)


def _encoder(model_type: str, description: str, **own) -> Variant:
    return _ours(model_type, f"encoder with {description}", "Model", position_embedding_type="none", **own)


SOFTMAX = "SoftmaxLM with learned positions, SDPA: ConvLM's backbone with attention"
GELU = "GPT-2, SDPA, with the activation of our families (torch's own GELU) instead of its composed `gelu_new`"
SIDES = f"sparse attention, {SLIDING_WINDOW // 2} tokens to each side and 16 global ones"
LINFORMER = f"Linformer attention, k={PROJECTED_SIZE}"
VARIANTS: dict[str, Variant] = {
    "conv_lm": _ours("conv_lm", "ConvLM, default configuration", attn_implementation=None),
    "softmax_lm": _ours(
        "softmax_lm", SOFTMAX, static_form=True, position_embedding_type="learned", attention_dropout=0.0
    ),
    "linformer_lm": _ours(
        "linformer_lm", f"LinformerLM, causal: blocks of 64 and k={PROJECTED_SIZE} slots", is_decoder=True
    ),
    "cubic_prefix_lm": _ours(
        "cubic_prefix_lm",
        "CubicPrefixLM, default configuration: for short lengths",
        flops=cubic_flops,
        by_default=False,
        prefix_group_tokens=1 << 16,
    ),
    "quadratic_kernel_lm": _ours(
        "quadratic_kernel_lm", "QuadraticKernelLM, default configuration: queries and keys of 16", flops=quadratic_flops
    ),
    "sparse_local": _sparse("", num_global_tokens=0),
    "sparse_global": _sparse(" and 16 global tokens", num_global_tokens=16),
    "sparse_strided": _sparse(" and every 64th token", num_global_tokens=0, global_stride=64),
    "sparse_all": _sparse(
        ", 16 global tokens, every 64th token and 4 random blocks",
        num_global_tokens=16,
        global_stride=64,
        num_random_blocks=4,
    ),
    "mistral_window": Variant(
        f"Mistral with a sliding window of {SLIDING_WINDOW}, SDPA",
        MistralForCausalLM,
        _mistral,
        mistral_flops,
        "sdpa",
        by_default=False,
    ),
    "gpt2_sdpa": _gpt2("GPT-2, SDPA"),
    "gpt2_sdpa_gelu": _gpt2(GELU, activation="gelu"),
    "gpt2_eager": _gpt2("GPT-2, eager (unfused) attention", "eager"),
    "lfm2_conv": Variant("LFM2, all layers convolutions of 3 taps", Lfm2ForCausalLM, _lfm2, lfm2_flops),
    # A Mamba block (expand 2) has half the parameters of a mixer with its MLP; the depth is kept the same.
    "mamba": Variant(
        "Mamba without its CUDA kernels (the slow path)",
        MambaForCausalLM,
        lambda shape: MambaConfig(**shape.common()),
        mamba_flops,
        cache_argument="cache_params",
    ),
    **{
        f"softmax_encoder_{kind}": _encoder(
            "softmax_lm", f"softmax attention, {kind.replace('_', ' ')}", attn_implementation=kind, is_decoder=False
        )
        for kind in ("sdpa", "eager", "eager_by_head")
    },
    "sparse_encoder": _encoder(
        "sparse_attention_lm", SIDES, is_decoder=False, sliding_window=SLIDING_WINDOW // 2, num_global_tokens=16
    ),
    "linformer_encoder": _encoder("linformer_lm", LINFORMER),
    **{
        f"linformer_encoder_{size}": _encoder("linformer_lm", f"Linformer attention, k={size}", projected_size=size)
        for size in PROJECTED_SIZES[1:]
    },
    "linformer_encoder_chunked": _encoder(
        "linformer_lm",
        f"{LINFORMER}, feed-forward in chunks of {FEED_FORWARD_CHUNK} tokens",
        chunk_size_feed_forward=FEED_FORWARD_CHUNK,
    ),
}
for model_type, family in REGISTERED.items():  # of which nothing is said here: as they come, run where they are named
    if model_type not in VARIANTS:
        about = f"{family.prefix}, default configuration"
        VARIANTS[model_type] = _ours(model_type, about, by_default=False, attn_implementation=None, is_decoder=True)
CAUSAL = [name for name, variant in VARIANTS.items() if not variant.encoder]
STATIC = "_static"  # ends the names of what decodes in a static cache


def with_static_forms(names: list[str]) -> list[str]:
    """The names of what decodes: each variant, and behind it its form in a static cache where it has one."""
    return [form for name in names for form in ([name, name + STATIC] if VARIANTS[name].static_form else [name])]


def copies_its_cache(names: Iterable[str]) -> bool:
    """Whether attention among these decoded rows was given no static cache: its times are then mostly copies."""
    names = set(names)
    return any(name + STATIC not in names for name in names if name in VARIANTS and VARIANTS[name].static_form)


def split_form(name: str) -> tuple[Variant, bool]:
    """The variant of such a name, and whether its cache is static."""
    if name in VARIANTS:
        return VARIANTS[name], False
    return VARIANTS[name.removesuffix(STATIC)], True


def state_bytes(cache) -> int:
    """Bytes of memory that the tensors of a cache keep alive (whole storages, so that a view cannot hide its base)."""
    storages: dict[int, int] = {}
    pending = [vars(layer) for layer in cache.layers]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
    return sum(storages.values())
