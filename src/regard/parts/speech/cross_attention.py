"""Which frames of the sound each word looks at: exact facts of cross attention in speech models.

For the other half of the method, how much of the model's behaviour these facts explain, see Papi,
Fucci, Gaido, Negri, Bentivogli (2025), "Cross-Attention is Half Explanation in Speech-to-Text
Models", arXiv 2509.18010.

In use:

    seen = cross_attention(model, processor, samples)           # transcribes, then looks
    seen = cross_attention(model, processor, samples, tokens)   # looks under a given transcript
    seen.mean                   # [tokens, frames], mean over all heads and layers
    seen.layers[3]              # [tokens, frames], mean over the heads of layer 3
    seen.maps[3]                # [heads, tokens, frames], only with maps=True
    seen.words, seen.word_map() # words with their times, [words, frames]

Row i is the decoder step that *predicts* token i: its input is token i - 1. The prompt (start,
language, task, no time stamps) and the end of the text have no row. Columns are encoder steps that
hear sound; what falls on the padding behind it is reported in `dropped`, not shown, and rows are
not scaled up to make up for it, so that rows plus `dropped` sum to one.

No matrix of all heads is kept. Rows are made a few queries at a time from the queries and keys of
the call, averaged over the heads, and only that mean stays, with the rows of the few heads that
word times need, and one number a head and token for each fact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core import State
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler, Session, Site

from .words import Word, group, pieces, spearman, starts

BLOCK = 64  # queries whose rows over all heads are in memory at once
PIECES = 32  # tensors of single tokens before they are joined


@dataclass
class CrossAttention:
    """What one transcript looks at in one clip. Shares are float32, on the CPU.

    Attributes:
        tokens: ids of the transcript, without prompt and end; pieces: the text of each.
        prompt: ids that the decoder started with.
        words: the words with their tokens and times; without times where `seconds_per_frame` is
            not known or the alignment is empty.
        frames: encoder steps that hear sound; all_frames: with the padding.
        seconds_per_frame: the length of an encoder step, 0.02 in Whisper; None if not known.
        layers: {layer: `[tokens, frames]`}, the mean over the heads.
        aligned: `[heads, tokens + 1, frames]`, rows of the heads of `alignment_heads`; the last
            row is of the step that predicts the end, where the decoder took it.
        entropy: `[layers, heads, tokens]`, of the whole row, padding included, in nats.
        dropped: `[layers, heads, tokens]`, the share of the row that lies on padding.
        centre: `[layers, heads, tokens]`, the mean frame of the row among those with sound.
        received: `[layers, heads, frames]`, the sum of the rows over the tokens.
        maps: {layer: `[heads, tokens, frames]`} if asked for, else None.
        fit: mean log-probability of a given transcript's tokens; None where the model made it.
        alignment_heads: (layer, head) of the heads that follow the sound, from the model's
            generation config; all heads of the later half of the layers where it names none.
    """

    tokens: list[int]
    pieces: list[str]
    prompt: list[int]
    frames: int
    all_frames: int
    seconds_per_frame: float | None
    layers: dict[int, Tensor]
    aligned: Tensor
    entropy: Tensor
    dropped: Tensor
    centre: Tensor
    received: Tensor
    alignment_heads: list[tuple[int, int]]
    maps: dict[int, Tensor] | None = None
    fit: float | None = None
    words: list[Word] = field(default_factory=list)
    token_starts: list[float] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The transcript."""
        return "".join(self.pieces).strip()

    @property
    def mean(self) -> Tensor:
        """`[tokens, frames]`, the mean over all heads and layers."""
        if not self.layers:
            raise InputError("no rows were kept: look again with rows=True")
        return torch.stack(list(self.layers.values())).mean(0)

    @property
    def monotone(self) -> Tensor:
        """`[layers, heads]`: rank correlation of the tokens' order with where they look.

        1 is a head that moves on with every token, 0 one that does not follow the sound.
        """
        return spearman(self.centre)

    @property
    def kept_bytes(self) -> int:
        """Bytes of all that is kept."""
        kept = [*self.layers.values(), *(self.maps or {}).values(), self.aligned]
        kept += [self.entropy, self.dropped, self.centre, self.received]
        return sum(t.numel() * t.element_size() for t in kept)

    def word_map(self, rows: Tensor | None = None) -> Tensor:
        """The mean of each word's token rows, `[..., words, frames]`; of `mean` when None."""
        rows = self.mean if rows is None else rows
        if not self.words:
            return rows[..., :0, :]
        return torch.stack([rows[..., w.first : w.last, :].mean(-2) for w in self.words], -2)


class CrossRows(Handler):
    """Collects cross-attention rows while a decoder runs, prefill or step by step.

    A decoder call that starts at position 0 begins anew, so that of several runs (a detected
    language, a second try at another temperature) the last one counts.

    Args:
        frames: keep so many columns, the rest is padding; all when None.
        aligned: (layer, head) pairs whose rows are kept.
        maps: keep the rows of every head.
        rows: keep the mean row of each layer and the rows of the aligned heads; without them what
            is kept is three numbers a head and token, and does not depend on the clip's length.
        prompt: tokens of the first call that belong to the prompt; all of them when None, as they
            do under `generate`.
    """

    def __init__(
        self,
        frames: int | None = None,
        aligned: Sequence[tuple[int, int]] = (),
        *,
        maps: bool = False,
        rows: bool = True,
        prompt: int | None = None,
    ) -> None:
        self.frames, self.keep_maps, self.keep_rows = frames, maps, rows
        self.aligned = list(aligned) if rows else []
        self.prompt = prompt
        self._self_site: int | None = None
        self._clear()

    def _clear(self) -> None:
        self.position = 0
        self.skip = 0
        self.all_frames = 0
        self.rows: dict[int, list[Tensor]] = {}
        self.of_head: dict[tuple[int, int], list[Tensor]] = {}
        self.maps: dict[int, list[Tensor]] = {}
        self.scalars: dict[int, list[Tensor]] = {}
        self.received: dict[int, Tensor] = {}
        self._last: dict[int, Tensor] = {}

    def sites(self, sites: list[Site]) -> list[Site]:
        cross = [s for s in sites if s.kind == "cross"]
        if not cross:
            raise ReachError(
                "this model has no cross attention that regard can reach: name an encoder-decoder "
                "speech model, such as whisper-tiny.en"
            )
        part = cross[0].part.removesuffix(" cross")
        self_sites = [s for s in sites if s.kind == "self" and s.part == part]
        # The first self-attention of the decoder tells at which position a call begins.
        self._self_site = self_sites[0].index if self_sites else None
        return [*cross, *self_sites[:1]]

    def after(self, call: Call, state: State) -> None:
        if call.site.index == self._self_site:
            if call.query_offset == 0:
                self._clear()
                length = call.q.shape[2]
                self.skip = (length if self.prompt is None else self.prompt) - 1
            self.position = call.query_offset
            return
        if call.q.shape[0] != 1:
            raise InputError(
                "cross attention is collected for one clip at a time: no beams, batch 1"
            )
        self._collect(call)

    @torch.no_grad()
    def _collect(self, call: Call) -> None:
        """Take the rows of one call, a block of queries at a time."""
        layer, length = call.site.layer, call.q.shape[2]
        self.all_frames = call.k.shape[2]
        frames = self.all_frames if self.frames is None else min(self.frames, self.all_frames)
        first = max(0, self.skip - self.position)  # rows of the prompt predict no word
        heads = call.q.shape[1]
        if layer not in self.received:
            self.received[layer] = torch.zeros(heads, frames, device=call.q.device)
            self._last[layer] = torch.zeros_like(self.received[layer])
        places = torch.arange(frames, device=call.q.device, dtype=torch.float32)
        for start in range(first, length, BLOCK):
            queries = slice(start, min(start + BLOCK, length))
            whole, logs = _rows(call, queries)
            real = whole[..., :frames]
            held = real.sum(-1)
            if self.keep_rows:
                self.rows.setdefault(layer, []).append(real.mean(0))
            for at, head in self.aligned:
                if at == layer:
                    self.of_head.setdefault((at, head), []).append(real[head].clone())
            if self.keep_maps:
                self.maps.setdefault(layer, []).append(real.clone())
            entropy = -(whole * logs).sum(-1)
            centre = real @ places / held.clamp_min(1e-12)
            dropped = whole[..., frames:].sum(-1)
            self._add(layer, torch.stack([entropy, dropped, centre]))
            # The last row is held back: it is the end of the text, unless another row comes.
            self.received[layer] += self._last[layer] + real[:, :-1].sum(1)
            self._last[layer] = real[:, -1].clone()

    def _add(self, layer: int, values: Tensor) -> None:
        """Keep some numbers of a few tokens; many small tensors would take more than they hold."""
        kept = self.scalars.setdefault(layer, [])
        kept.append(values)
        if len(kept) == PIECES:
            kept[:] = [torch.cat(kept, 2)]

    def result(self, tokens: int) -> dict[str, Any]:
        """Everything about the first `tokens` rows after the prompt, on the CPU."""
        layers = sorted(self.scalars)
        if not layers:
            raise InputError("the decoder did not run: there is no cross attention to show")
        rows = {n: torch.cat(self.rows[n]).cpu() for n in layers if self.keep_rows}
        have = sum(s.shape[2] for s in self.scalars[layers[0]])
        if have < tokens:
            raise InputError(
                f"the transcript has {tokens} tokens, but the decoder made {have} steps: look "
                "under forced decoding, with a transcript"
            )
        facts = torch.stack([torch.cat(self.scalars[n], 2) for n in layers]).cpu()
        received = torch.stack([self.received[n] for n in layers]).cpu()
        if have == tokens:
            received = received + torch.stack([self._last[n] for n in layers]).cpu()
        pairs = [pair for pair in self.aligned if pair in self.of_head]
        kept = [torch.cat(self.of_head[pair]).cpu()[: tokens + 1] for pair in pairs]
        maps = {n: torch.cat(self.maps[n], 1).cpu()[:, :tokens] for n in layers if self.keep_maps}
        return {
            "layers": {n: held[:tokens] for n, held in rows.items()},
            "aligned": torch.stack(kept) if kept else torch.zeros(0, tokens, received.shape[2]),
            "entropy": facts[:, 0, :, :tokens],
            "dropped": facts[:, 1, :, :tokens],
            "centre": facts[:, 2, :, :tokens],
            "received": received,
            "maps": maps or None,
            "all_frames": self.all_frames,
            "alignment_heads": pairs,
        }


def _rows(call: Call, queries: slice) -> tuple[Tensor, Tensor]:
    """Rows `[heads, queries, keys]` of a call in float32, and their logarithms (0 where masked).

    The scale is the call's own: Whisper scales its queries beforehand and passes 1.
    """
    q = call.q[0, :, queries].float()
    k = call.k[0].float()
    if len(k) != len(q):
        k = k.repeat_interleave(len(q) // len(k), 0)
    scores = q @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        scores = scores + call.bias[0, :, queries].float()
    length, keys = call.q.shape[2], call.k.shape[2]
    if not call.mask.is_full(length, keys):
        allowed = call.mask.cells(length, keys, queries, slice(0, keys))[0].to(q.device)
        scores = scores.masked_fill(~allowed, -torch.inf)
    logs = scores.log_softmax(-1)
    whole = logs.exp()
    return whole, torch.where(whole > 0, logs, 0.0)


def cross_attention(
    model: Any,
    processor: Any,
    audio: Any,
    tokens: Sequence[int] | None = None,
    *,
    prompt: Sequence[int] | None = None,
    language: str | None = None,
    task: str | None = None,
    maps: bool = False,
    rows: bool = True,
    live: bool = False,
    frames: int | None = None,
    **generate: Any,
) -> CrossAttention:
    """Transcribe a clip, or take a given transcript, and return what every token looks at.

    Args:
        model: an encoder-decoder speech model of transformers, such as Whisper or Speech2Text.
        processor: its processor; None when `audio` holds ready inputs.
        audio: mono samples `[samples]` at the processor's sampling rate, or the model's own inputs
            as a mapping (with `frames`, if part of them is padding).
        tokens: the transcript to force, without prompt and end; transcribed when None.
        prompt: ids the decoder starts with; as `generate` chooses them when None.
        language, task: for Whisper sizes of many languages; the language is detected when None.
        maps: also keep the rows of every head (heads x tokens x frames numbers a layer).
        rows: False keeps no rows at all, so no `layers`, `mean`, `aligned` and no times: the other
            facts alone, in memory that hardly grows with the transcript.
        live: collect while `generate` runs, rather than in one forced pass afterwards. The rows
            are the same; the forced pass costs less and also serves beams and sampling.
        frames: encoder steps that hear sound, where it cannot be told from `audio`.
        generate: further settings of `generate`.

    Raises:
        InputError: not a speech model with cross attention, an empty transcript, one that does not
            fit, beams or a batch with `live`.
        ReachError: attention that regard cannot reach.

    >>> import regard
    >>> model = regard.zoo.tiny("whisper")
    >>> given = regard.zoo.inputs("whisper", model, batch=1)
    >>> seen = cross_attention(model, None, {"input_features": given["input_features"]}, [5, 9, 7])
    >>> seen.mean.shape, bool((seen.mean.sum(-1) - 1).abs().max() < 1e-5)
    (torch.Size([3, 16]), True)
    """
    _check_model(model)
    inputs, seconds = prepare(model, processor, audio)
    choices = {"language": language, "task": task}
    settings = {**generate, **{k: v for k, v in choices.items() if v is not None}}
    heads = _alignment_heads(model)
    states: Any = None
    collected: CrossRows | None = None
    given, fit = tokens is not None, None
    if tokens is None:
        live_rows = CrossRows(frames, heads, maps=maps, rows=rows) if live else None
        if live_rows is not None and frames is None and seconds is not None:
            live_rows.frames = _real_frames(model, inputs, seconds)
        heard, start, states = _transcribe(model, inputs, settings, live_rows)
        tokens, prompt = heard, list(start) if prompt is None else list(prompt)
        collected = live_rows
    elif prompt is None:
        prompt = default_prompt(model, processor, language, task)
    tokens = _checked(model, tokens, prompt)
    if collected is None:
        if states is None:
            states = _encode(model, inputs)
        if frames is None and seconds is not None:
            frames = _share(states[0].shape[1], inputs, seconds)
        collected = CrossRows(frames, heads, maps=maps, rows=rows, prompt=len(prompt))
        ids = torch.tensor([[*prompt, *tokens]], device=model.device)
        with torch.no_grad(), Session(model, [collected]):
            hidden = model.get_decoder()(
                input_ids=ids,
                encoder_hidden_states=states[0],
                **_encoder_mask(model, inputs, states[0]),
                use_cache=False,
            )[0]
        if given:
            fit = _fit(model, hidden[0, len(prompt) - 1 : -1], tokens)
    facts = collected.result(len(tokens))
    total = facts.pop("all_frames")
    step = None if seconds is None else seconds[1] / total
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = pieces(tokenizer, tokens) if tokenizer is not None else [f" {n}" for n in tokens]
    real = facts["received"].shape[2]
    seen = CrossAttention(tokens, texts, list(prompt), real, total, step, **facts)
    seen.fit = fit
    _time(seen)
    return seen


def _check_model(model: Any) -> None:
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        raise InputError(
            f"{type(model).__name__} has no cross attention: name an encoder-decoder speech model, "
            "such as whisper-tiny.en"
        )
    if getattr(model, "main_input_name", "input_ids") == "input_ids":
        raise InputError(
            f"{type(model).__name__} reads text, not sound: name a speech model, such as "
            "whisper-tiny.en"
        )


def prepare(model: Any, processor: Any, audio: Any) -> tuple[dict[str, Any], Any]:
    """The model's inputs for a clip, and (seconds of sound, seconds the inputs cover) or None."""
    if isinstance(audio, Mapping):
        return {k: v.to(model.device) for k, v in audio.items() if torch.is_tensor(v)}, None
    extractor = getattr(processor, "feature_extractor", None)
    if extractor is None or not hasattr(extractor, "sampling_rate"):
        raise InputError(
            f"{type(model).__name__} came without a feature extractor, so it cannot read sound"
        )
    import numpy as np

    samples = np.asarray(getattr(audio, "samples", audio), dtype=np.float32)
    rate = extractor.sampling_rate
    given = getattr(audio, "rate", rate)
    if given != rate:
        raise InputError(f"the clip has {given:,} samples a second, the model wants {rate:,}")
    if samples.ndim != 1 or not len(samples):
        raise InputError("a clip is a row of mono samples, and not empty")
    if not np.isfinite(samples).all() or not np.abs(samples).max() > 1e-5:
        raise InputError("the clip is silent or holds samples that are not numbers")
    longest = getattr(extractor, "n_samples", None)
    if longest is not None and len(samples) > longest:
        raise InputError(
            f"the clip lasts {len(samples) / rate:.1f} s, and the model hears "
            f"{longest / rate:.0f} s at once: cut it"
        )
    features = extractor(
        samples, sampling_rate=rate, return_tensors="pt", return_attention_mask=True
    )
    inputs = {k: v.to(model.device) for k, v in features.items() if torch.is_tensor(v)}
    name = model.main_input_name
    if inputs[name].is_floating_point():
        inputs[name] = inputs[name].to(model.dtype)
    covered = max(len(samples), longest or 0)
    return inputs, (len(samples) / rate, covered / rate)


def _share(total: int, inputs: dict[str, Any], seconds: Any) -> int:
    """Encoder steps that hear sound, out of `total`."""
    return min(total, max(1, -int(-total * seconds[0] // seconds[1])))


def _real_frames(model: Any, inputs: dict[str, Any], seconds: Any) -> int | None:
    """Encoder steps with sound before the encoder ran, where their number is fixed."""
    total = getattr(model.config, "max_source_positions", None)
    if total is None or not hasattr(model.config, "num_mel_bins"):
        return None
    return _share(total, inputs, seconds)


def _alignment_heads(model: Any) -> list[tuple[int, int]]:
    """(layer, head) of the heads that follow the sound; where none is named, the later half."""
    named = getattr(getattr(model, "generation_config", None), "alignment_heads", None)
    if named:
        return [(int(layer), int(head)) for layer, head in named]
    config = model.config
    layers = getattr(config, "decoder_layers", None) or config.num_hidden_layers
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    return [(layer, head) for layer in range(layers // 2, layers) for head in range(heads)]


@contextmanager
def _listening(model: Any) -> Iterator[dict[str, Any]]:
    """Keep what the encoder gave last, and the ids that the decoder last started with."""
    heard: dict[str, Any] = {}

    def encoded(module: Any, args: Any, output: Any) -> None:
        heard["states"] = output

    def decoding(module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if ids is not None and (cache is None or cache.get_seq_length() == 0):
            heard["prompt"] = ids[0].tolist()

    hooks = [
        model.get_encoder().register_forward_hook(encoded),
        model.get_decoder().register_forward_pre_hook(decoding, with_kwargs=True),
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _transcribe(
    model: Any, inputs: dict[str, Any], settings: dict[str, Any], rows: CrossRows | None
) -> tuple[list[int], list[int], Any]:
    """The tokens that `generate` gives, without prompt and end, its prompt, and the encoder's
    output, so that the encoder need not run again."""
    if not hasattr(model, "generate") or not model.can_generate():
        raise InputError(f"{type(model).__name__} cannot transcribe: give a transcript")
    session = Session(model, [rows] if rows is not None else [])
    with torch.no_grad(), _listening(model) as heard:
        if rows is None:
            generated = model.generate(**inputs, **settings)
        else:
            with session:
                generated = model.generate(**inputs, **settings)
    ids = (generated if torch.is_tensor(generated) else generated["sequences"])[0].tolist()
    prompt = heard["prompt"]
    if ids[: len(prompt)] == prompt:
        ids = ids[len(prompt) :]
    return _words_only(model, ids), prompt, heard["states"]


def _words_only(model: Any, ids: list[int]) -> list[int]:
    """The ids up to the end token, without time stamps and other marks of Whisper."""
    settings = model.generation_config
    ends = settings.eos_token_id if settings.eos_token_id is not None else model.config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [ends]) | {settings.pad_token_id}
    kept = []
    for number in ids:
        if number in stop:
            break
        kept.append(number)
    return kept


def _encode(model: Any, inputs: dict[str, Any]) -> Any:
    names = ("input_features", "input_values", "attention_mask")
    given = {k: v for k, v in inputs.items() if k in names}
    with torch.no_grad():
        return model.get_encoder()(**given)


def _encoder_mask(model: Any, inputs: dict[str, Any], states: Tensor) -> dict[str, Any]:
    """The mask over encoder steps, for models that shorten the one of their input."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return {}
    steps = states.shape[1]
    shorten = getattr(model.get_encoder(), "_get_feature_vector_attention_mask", None)
    if shorten is not None:  # Speech2Text
        return {"encoder_attention_mask": shorten(steps, mask)}
    lengths = getattr(model, "_compute_sub_sample_lengths_from_attention_mask", None)
    if lengths is not None:  # SeamlessM4T
        kept = torch.arange(steps, device=mask.device) < lengths(mask)[:, None]
        return {"encoder_attention_mask": kept.to(mask.dtype)}
    return {}


def default_prompt(
    model: Any, processor: Any, language: str | None = None, task: str | None = None
) -> list[int]:
    """The ids that a decoder starts with: for Whisper also language, task and no time stamps.

    Sizes of many languages are taken to hear English when no language is named.
    """
    settings = model.generation_config
    start = settings.decoder_start_token_id
    ids = [int(model.config.decoder_start_token_id if start is None else start)]
    if getattr(settings, "is_multilingual", False):
        known = settings.lang_to_id
        code = (language or "en").lower()
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        code = f"<|{TO_LANGUAGE_CODE.get(code, code)}|>"
        if code not in known:
            raise InputError(f"the model knows no language {language!r}: write it as en, it or de")
        tasks = settings.task_to_id
        chosen = task or "transcribe"
        if chosen not in tasks:
            raise InputError(f"the task is transcribe or translate, not {task!r}")
        ids += [known[code], tasks[chosen]]
    last = getattr(settings, "no_timestamps_token_id", None)
    return ids if last is None else [*ids, int(last)]


def _checked(model: Any, tokens: Sequence[int], prompt: Sequence[int]) -> list[int]:
    """The transcript as a list, after checking that the decoder can take it."""
    ids = [int(n) for n in tokens]
    if not ids:
        raise InputError("the transcript is empty: no words were heard, or none were given")
    wrong = [n for n in ids if not 0 <= n < model.config.vocab_size]
    if wrong:
        raise InputError(f"the transcript does not fit: the model has no token {wrong[0]}")
    room = getattr(model.config, "max_target_positions", None)
    if room is not None and len(prompt) + len(ids) > room:
        raise InputError(
            f"the transcript has {len(ids)} tokens, and the decoder has room for "
            f"{room - len(prompt)}: cut the clip and the transcript"
        )
    return ids


def _fit(model: Any, hidden: Tensor, tokens: Sequence[int]) -> float | None:
    """Mean log-probability of the tokens, from the decoder's output `[tokens, width]`."""
    project = model.get_output_embeddings()
    if project is None:
        return None
    with torch.no_grad():
        logs = project(hidden).float().log_softmax(-1)
    at = torch.tensor(list(tokens), device=logs.device)
    return float(logs.gather(1, at[:, None]).mean())


def _time(seen: CrossAttention) -> None:
    """Set the words, with times where an encoder step has a length."""
    step, tokens = seen.seconds_per_frame, len(seen.tokens)
    spans = group(seen.pieces)
    if step is None or seen.aligned.shape[0] == 0:
        seen.words = [Word(text, a, b, float("nan"), float("nan")) for text, a, b in spans]
        return
    first = (starts(seen.aligned) * step).tolist()
    if len(first) == tokens:  # no step predicted the end
        first.append(seen.frames * step)
    seen.token_starts = first[:tokens]
    seen.words = [Word(text, a, b, first[a], first[b]) for text, a, b in spans]
