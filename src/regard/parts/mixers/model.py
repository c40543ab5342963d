"""The language model whose layers name their mixers, registered with transformers' Auto classes
when this module is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from regard.core import Mask
from regard.errors import InputError
from regard.reach.dispatch import unseen

from . import caches, positions
from .config import MixerConfig
from .kinds import simple
from .layers import Attention, Mixer, Operation, Pair, Step, mixer
from .operations import Distances


class MixerLayer(GradientCheckpointingLayer):
    """Norm, mixer, norm, MLP, as in Llama; `skipped` leaves the whole block out."""

    def __init__(self, config: MixerConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = mixer(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.skipped = False

    def forward(self, hidden_states: Tensor, step: Step) -> Tensor:
        if self.skipped:
            return hidden_states
        normed = self.input_layernorm(hidden_states)
        if self.self_attn.kind.source == "embedding" and self.self_attn.config.static_norm:
            step = _with_embeds(step, self.input_layernorm(step.embeds))
        hidden_states = hidden_states + self.self_attn(normed, step=step)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MixerPreTrainedModel(LlamaPreTrainedModel):
    """What body and head share: the config, and how weights begin."""

    config: MixerConfig
    config_class = MixerConfig
    _no_split_modules = ["MixerLayer"]  # noqa: RUF012
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": MixerLayer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Attention):
            for name in ("key_bias", "value_bias"):
                if hasattr(module, name):
                    init.normal_(getattr(module, name), 0.0, std)
        elif isinstance(module, MixerModel):
            for name in ("sink", "noise"):
                if hasattr(module, name):
                    init.normal_(getattr(module, name), 0.0, std)
        elif hasattr(module, "start"):  # of the graph mixers
            module.start(init, std)


class MixerModel(MixerPreTrainedModel):
    """The body: embeddings, layers, norm; and the streams that run beside the tokens."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        width, longest = config.hidden_size, config.max_position_embeddings
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.layers = nn.ModuleList(
            [MixerLayer(config, n) for n in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        if config.positions == "rope":
            self.rotary_emb = LlamaRotaryEmbedding(config)
        self.places = positions.module(config)
        sources = {kind.source for kind in config.kinds}
        if "noise" in sources:
            self.register_buffer("noise", torch.zeros(longest, width))
        if "text" in sources:
            self.register_buffer("fixed_ids", torch.zeros(longest, dtype=torch.long))
        if any(kind.bias == "token" for kind in config.kinds):
            self.sink = nn.Parameter(torch.empty(width))
        self.gradient_checkpointing = False
        self._streams: tuple[Any, dict[int, Pair]] | None = None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give input_ids or inputs_embeds, one of them")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        cache = past_key_values
        if use_cache and cache is None:
            cache = DynamicCache()
        if cache is not None:
            caches.prepare(cache, list(self.config.mixers or []), self.config.taylor)
        step = self._step(inputs_embeds, attention_mask, position_ids, cache)
        hidden = self._placed(inputs_embeds, step.positions)
        for layer in self.layers:
            hidden = layer(hidden, step=step)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=cache)

    def _placed(self, embeds: Tensor, position_ids: Tensor) -> Tensor:
        added = self.places.added(position_ids) if self.places is not None else None
        return embeds if added is None else embeds + added.to(embeds.dtype)

    def _step(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        streams: bool = True,
    ) -> Step:
        """Masks, positions and streams of a forward pass."""
        config, (_batch, queries) = self.config, embeds.shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        if attention_mask is not None and attention_mask.dim() != 2:
            raise InputError("these mixers take a padding mask [batch, tokens], not one of pairs")
        keys = past + queries
        live = None
        if attention_mask is not None:
            live = attention_mask[:, :keys].bool()
            if live.shape[1] != keys:
                raise InputError(
                    f"the attention mask counts {live.shape[1]} tokens, and there are {keys}"
                )
        if position_ids is None:
            if live is None:
                position_ids = torch.arange(past, keys, device=embeds.device)[None]
            else:
                position_ids = (live.long().cumsum(-1) - 1).clamp_min(0)[:, -queries:]
        elif live is None and not torch.compiler.is_compiling() and _packed(position_ids):
            raise InputError(
                "these position_ids pack several samples into a row: give one sample a row"
            )
        rules = positions.rules(config, live)
        mask = create_causal_mask(
            config=config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            past_key_values=cache,
            **rules,
        )
        pairs = positions.pairs(config, live)
        table = self.places.table(keys + 1) if self.places is not None else None
        if table is not None:
            bias = Distances(table, queries, keys).dense()
            seen = pairs.cells(queries, keys, device=embeds.device)
            mask = bias.masked_fill(~seen, torch.finfo(bias.dtype).min).to(embeds.dtype)
        rotary = None
        if config.positions == "rope":
            rotary = self.rotary_emb(embeds, position_ids)
        step = Step(mask, pairs, live, position_ids, rotary, table, embeds, cache)
        if streams:
            step.streams = self._maps(position_ids, keys)
            step.tokens = self._first_token(embeds)
        return step

    # -- the second streams --------------------------------------------------------------------
    def _maps(self, position_ids: Tensor, keys: int) -> dict[int, Pair]:
        """Queries and keys of the layers whose maps come from noise or from a fixed text.

        With gradients they are computed for the positions at hand; without, once for all positions,
        and again when a weight has changed.
        """
        known = [n for n, kind in enumerate(self.config.kinds) if kind.source in ("noise", "text")]
        if not known:
            return {}
        longest = int(self.config.max_position_embeddings)
        if keys > longest:
            last = int(position_ids.max())
            if last >= longest:
                raise InputError(
                    f"position {last} lies beyond the fixed maps of this model, which end at "
                    f"{longest - 1}: give a shorter text, or train with a larger "
                    "max_position_embeddings"
                )
            keys = last + 1
        if torch.is_grad_enabled():
            return self._run_streams(known, keys)
        key = tuple((id(p), p._version, p.dtype) for p in (*self.parameters(), *self.buffers()))
        if self._streams is None or self._streams[0] != key or torch.compiler.is_compiling():
            self._streams = (key, self._run_streams(known, longest))
        return self._streams[1]

    def _run_streams(self, known: Sequence[int], length: int) -> dict[int, Pair]:
        maps: dict[int, Pair] = {}
        for source in ("noise", "text"):
            mine = [n for n in known if self.config.kinds[n].source == source]
            if not mine:
                continue
            held: Any = self.noise if source == "noise" else self.fixed_ids
            x = held[None, :length]
            maps.update(self._run_stream(x if source == "noise" else self.embed_tokens(x), mine))
        return maps

    def _run_stream(self, x: Tensor, mine: Sequence[int]) -> dict[int, Pair]:
        """One stream through the layers, up to the last that reads its queries and keys off it."""
        step = self._step(x, None, None, None, streams=False)
        step.tokens = self._first_token(x)
        hidden, maps = self._placed(x, step.positions), {}
        layers: Any = self.layers
        with unseen():
            for n, layer in enumerate(layers[: max(mine) + 1]):
                if n in mine:
                    maps[n] = layer.self_attn.queries_keys(layer.input_layernorm(hidden), step)
                if n < max(mine):
                    hidden = layer(hidden, step=step)
        return maps

    def _first_token(self, like: Tensor) -> dict[int, Pair]:
        """Key and value, in every layer, of the learned token before the sequence: it sees only
        itself, so that it is the same for every sequence.
        """
        known = [n for n, kind in enumerate(self.config.kinds) if kind.bias == "token"]
        if not known:
            return {}
        x = self.sink[None, None].to(like.dtype)
        place = torch.zeros(1, 1, dtype=torch.long, device=x.device)
        rotary = self.rotary_emb(x, place - 1) if self.config.positions == "rope" else None
        table = self.places.table(1) if self.places is not None else None
        step = Step(None, Mask.causal(), None, place, rotary, table, x)
        if any(kind.source in ("noise", "text") for kind in self.config.kinds):
            raise InputError("a learned first token has no place in a fixed map: use one of them")
        hidden, pairs = x, {}
        layers: Any = self.layers
        with unseen():
            for n, layer in enumerate(layers[: max(known) + 1]):
                if n in known:
                    normed, mixing = layer.input_layernorm(hidden), layer.self_attn
                    _, k = mixing.queries_keys(normed, step)
                    pairs[n] = (k, mixing.split(mixing.v_proj(normed)))
                if n < max(known):
                    hidden = layer(hidden, step=step)
        return pairs


class MixerForCausalLM(LlamaForCausalLM, MixerPreTrainedModel):
    """A causal language model with a token mixer of choice in every layer.

    Importing `regard.parts.mixers` registers it, so that `AutoModelForCausalLM.from_pretrained`
    loads its checkpoints.

    >>> config = MixerConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...     num_attention_heads=2, mixers=["non_approximate", "standard"])
    >>> MixerForCausalLM(config)(torch.ones(1, 5, dtype=torch.long)).logits.shape
    torch.Size([1, 5, 64])
    """

    config: MixerConfig
    config_class = MixerConfig

    def __init__(self, config: MixerConfig) -> None:
        MixerPreTrainedModel.__init__(self, config)
        self.model = MixerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As in Llama; tokens of a visible prefix carry no loss."""
        if labels is not None and self.config.prefix:
            live = kwargs.get("attention_mask")
            place = torch.ones_like(labels) if live is None else live.long()
            labels = labels.masked_fill(place.cumsum(-1) <= self.config.prefix, -100)
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)

    @contextmanager
    def skipping(self, layers: Sequence[int] | None = None) -> Iterator[MixerForCausalLM]:
        """Without these whole blocks, by default those of the simple mixers: the skip test. Without
        a cache only.
        """
        chosen = simple(self.config.mixers or []) if layers is None else list(layers)
        blocks = [self.model.layers[n] for n in chosen]
        before = [block.skipped for block in blocks]
        try:
            for block in blocks:
                block.skipped = True
            yield self
        finally:
            for block, was in zip(blocks, before):
                block.skipped = was

    def set_fixed_text(self, ids: Tensor) -> None:
        """The token ids of the fixed text, as many as there are positions."""
        held = self.model.fixed_ids
        if ids.shape != held.shape:
            raise InputError(
                f"the fixed text has {len(held)} tokens, one for every position, not {len(ids)}"
            )
        held.copy_(ids)


def counts(model: Any) -> dict[str, int]:
    """Parameters of a model by part: mixers, everything else."""
    mixers = sum(p.numel() for m in model.modules() if isinstance(m, Mixer) for p in m.parameters())
    total = sum(p.numel() for p in model.parameters())
    return {"mixers": mixers, "rest": total - mixers, "total": total}


def _packed(position_ids: Tensor) -> bool:
    return bool((position_ids.diff(dim=-1) != 1).any())


def _with_embeds(step: Step, embeds: Tensor) -> Step:
    from dataclasses import replace

    return replace(step, embeds=embeds)


def register() -> None:
    """Make the Auto classes know `MixerConfig`; more than once does nothing."""
    AutoConfig.register(MixerConfig.model_type, MixerConfig, exist_ok=True)
    AutoModel.register(MixerConfig, MixerModel, exist_ok=True)
    AutoModelForCausalLM.register(MixerConfig, MixerForCausalLM, exist_ok=True)


register()

__all__ = ["MixerConfig", "MixerForCausalLM", "MixerModel", "Operation", "counts", "register"]
