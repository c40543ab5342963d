"""A speech model that reads one clip under forced decoding: the ground that explanations stand on.

The clip's spectrogram, or the encoder's output, goes in, possibly with parts taken out; the
distribution of every word piece of a fixed transcript comes out. Only frames that carry sound are
ever changed: what a model pads behind them stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError

SILENT = "the clip is silent: there is nothing to explain; give one with speech"


class Clip:
    """One clip in front of one encoder-decoder speech model.

    Args:
        model: a transformers speech model with an encoder and a decoder.
        features: its input for this clip, `[bins, frames]` (`[frames, bins]` where the model wants
            it so, as Speech2Text does), padding included.
        frames: how many frames carry sound; all when None.
        prompt: token ids that the decoder starts with.
        margin: None reads the model's full window. A number cuts Whisper's window of 30 s to the
            sound and so many frames of padding: far cheaper, but another model, since the encoder
            then attends to less padding. Its transcripts have to be checked.

    Attributes:
        field: `[bins, frames]`, the frames with sound, float32.
        stride: frames per encoder step; steps: encoder steps that hear the sound.

    Raises:
        InputError: no encoder-decoder, features of the wrong size, a silent clip, a margin for a
            model whose window has no fixed length.
    """

    def __init__(
        self,
        model: Any,
        features: Tensor,
        frames: int | None = None,
        prompt: Sequence[int] = (),
        margin: int | None = None,
    ) -> None:
        config = model.config
        if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
            raise InputError(
                f"{type(model).__name__} has no cross attention to explain: name an "
                "encoder-decoder speech model, such as whisper-tiny.en"
            )
        if getattr(model, "main_input_name", "") != "input_features":
            raise InputError(
                f"{type(model).__name__} reads {model.main_input_name}, not a spectrogram: name a "
                "speech model, such as whisper-tiny.en"
            )
        self.model, self.margin = model, margin
        self.encoder = model.get_encoder()
        self._turned = not hasattr(config, "num_mel_bins")  # Speech2Text has time first
        whole = features.detach().float().reshape(features.shape[-2:])
        whole = whole.T if self._turned else whole
        self._given = features, frames, prompt
        total = whole.shape[1]
        frames = total if frames is None else frames
        if not 0 < frames <= total:
            raise InputError(f"the clip has {total} frames, of which {frames} cannot carry sound")
        self._step = 1
        for conv in (m for m in self.encoder.modules() if isinstance(m, torch.nn.Conv1d)):
            self._step *= conv.stride[0]
        if margin is not None:
            if not hasattr(self.encoder, "embed_positions") or self._turned:
                raise InputError(
                    f"the window of {type(model).__name__} has no fixed length: leave the margin "
                    "out"
                )
            kept = min(total, -(-(frames + margin) // self._step) * self._step)
            whole = whole[:, :kept]
            self.encoder = shortened(self.encoder, kept // self._step)
        self.whole = whole.to(model.device)
        self.frames = frames
        self.field = self.whole[:, :frames]
        if not bool(torch.isfinite(self.field).all()):
            raise InputError("the spectrogram is not finite: the clip holds NaN or inf")
        if float(self.field.max() - self.field.min()) < 1e-6:
            raise InputError(SILENT)
        start = [config.decoder_start_token_id] if not prompt else list(prompt)
        self.prompt = [int(n) for n in start]
        self._states: Tensor | None = None

    @property
    def uncut(self) -> Clip:
        """The same clip with the model's whole window."""
        return self if self.margin is None else Clip(self.model, *self._given)

    @property
    def states(self) -> Tensor:
        """The encoder's output for the clip as it is, `[all steps, width]`."""
        if self._states is None:
            with torch.inference_mode():
                self._states = self.encode(self.field[None])[0].clone()
        return self._states

    @property
    def stride(self) -> int:
        """Frames per encoder step, from the lengths that this model made of them."""
        return max(1, round(self.whole.shape[1] / self.states.shape[0]))

    @property
    def steps(self) -> int:
        return min(-(-self.frames // self.stride), self.states.shape[0])

    def encode(self, fields: Tensor) -> Tensor:
        """Fields `[batch, bins, frames]` in place of the sound -> `[batch, all steps, width]`."""
        tail = self.whole[:, self.frames :].expand(len(fields), -1, -1)
        x = torch.cat([fields.to(tail.dtype), tail], 2).to(self.model.dtype)
        if self._turned:
            return self.encoder(x.transpose(1, 2)).last_hidden_state
        return self.encoder(x).last_hidden_state

    def decode(self, states: Tensor, ids: Tensor, **more: Any) -> Any:
        """One pass of the decoder over encoder outputs `[batch, steps, width]`."""
        from transformers.modeling_outputs import BaseModelOutput

        given = BaseModelOutput(last_hidden_state=states)
        return self.model(encoder_outputs=given, decoder_input_ids=ids, **more)

    def transcribe(self, states: Tensor | None = None, limit: int = 128) -> list[list[int]]:
        """The greedy transcripts of encoder outputs `[batch, steps, width]`, without prompt and
        end; of the clip itself when None. Tokens that the model's generation settings suppress are
        never chosen.
        """
        model, settings = self.model, self.model.generation_config
        states = self.states[None] if states is None else states
        room = getattr(model.config, "max_target_positions", 448) - len(self.prompt)
        ends = settings.eos_token_id
        ends = model.config.eos_token_id if ends is None else ends
        stop = torch.tensor(ends if isinstance(ends, list) else [ends], device=states.device)
        banned = list(getattr(settings, "suppress_tokens", None) or [])
        first = list(getattr(settings, "begin_suppress_tokens", None) or [])
        ids = torch.tensor([self.prompt] * len(states), device=states.device)
        made, open_, cache = [], torch.ones(len(states), dtype=torch.bool), None
        open_ = open_.to(states.device)
        with torch.inference_mode():
            for step in range(max(1, min(limit, room))):
                out = self.decode(states, ids, past_key_values=cache, use_cache=True)
                cache, logits = out.past_key_values, out.logits[:, -1].float()
                logits[:, banned + (first if step == 0 else [])] = -torch.inf
                chosen = logits.argmax(-1)
                chosen = torch.where(open_, chosen, stop[0])
                open_ = open_ & ~torch.isin(chosen, stop)
                made.append(chosen)
                if not bool(open_.any()):
                    break
                ids = chosen[:, None]
        rows = torch.stack(made, 1).tolist()
        known = set(stop.tolist())
        return [row[: next((n for n, i in enumerate(row) if i in known), len(row))] for row in rows]


class Forced:
    """A clip with the transcript that the model is made to say.

    Row i of everything below belongs to the decoder step that predicts piece i; prompt and end of
    text have no row.

    Args:
        clip: the clip; text: token ids of the transcript, without prompt and end.

    Raises:
        InputError: an empty transcript, one too long for the decoder, ids that the model does not
            have, one that is less likely than words drawn at random.
    """

    def __init__(self, clip: Clip, text: Sequence[int]) -> None:
        self.clip, self.text = clip, [int(n) for n in text]
        model, words = clip.model, len(self.text)
        if not words:
            raise InputError(
                "the transcript is empty: the model heard no words, or none were given"
            )
        room = getattr(model.config, "max_target_positions", None)
        if room is not None and len(clip.prompt) + words > room:
            raise InputError(
                f"the transcript has {words} word pieces, but the decoder has room for "
                f"{room - len(clip.prompt)}: cut the audio and the transcript"
            )
        if not all(0 <= n < model.config.vocab_size for n in self.text):
            raise InputError("the transcript does not fit: it holds token ids this model lacks")
        ids = [*clip.prompt, *self.text]
        self._ids = torch.tensor(ids[:-1], device=model.device)
        self._first = len(clip.prompt) - 1
        with torch.inference_mode():
            self.plain = self.log_probs(clip.states[None])[0].clone()
        at = torch.arange(words, device=self.plain.device)
        chosen = self.plain[at, torch.tensor(self.text, device=self.plain.device)]
        self.fit = float(chosen.mean())
        if self.fit < float(-torch.tensor(self.plain.shape[-1]).double().log()) - 4:
            raise InputError(
                f"the transcript does not fit the audio (mean log-probability {self.fit:.1f} a "
                "word piece, far less than words drawn at random): leave it out, or give the right "
                "one"
            )

    @property
    def rows(self) -> slice:
        """The decoder steps that predict the transcript."""
        return slice(self._first, self._first + len(self.text))

    def log_probs(self, states: Tensor) -> Tensor:
        """Encoder outputs `[batch, steps, width]` -> `[batch, pieces, vocabulary]`, float32."""
        ids = self._ids.expand(len(states), -1)
        logits = self.clip.decode(states, ids, use_cache=False).logits[:, self.rows]
        return logits.float().log_softmax(-1).clamp_min(torch.finfo(torch.float32).min)

    def of_input(self, fields: Tensor) -> Tensor:
        """The same from spectrograms `[batch, bins, frames]`."""
        return self.log_probs(self.clip.encode(fields))


def shortened(encoder: Any, positions: int) -> Any:
    """Whisper's encoder with only its first positions; weights are shared, the given one is not
    changed.
    """
    have = encoder.embed_positions.weight
    if positions >= len(have):
        return encoder
    made = copy.copy(encoder)
    made._modules = dict(encoder._modules)
    made.config = copy.copy(encoder.config)
    made.config.max_source_positions = made.max_source_positions = positions
    made.embed_positions = torch.nn.Embedding.from_pretrained(have.detach()[:positions])
    return made


def features(model: Any, processor: Any, audio: Any) -> tuple[Tensor, int]:
    """The model's input for mono audio at the processor's sampling rate, and its frames of sound.

    Args:
        audio: float samples `[samples]`.

    Raises:
        InputError: no feature extractor, an empty clip, one longer than the model's window.
    """
    import numpy

    extractor = getattr(processor, "feature_extractor", processor)
    if extractor is None or not hasattr(extractor, "sampling_rate"):
        raise InputError(
            f"{type(model).__name__} came without a feature extractor, so it cannot read audio: "
            "name a speech model, such as whisper-tiny.en"
        )
    sound = numpy.asarray(audio, dtype=numpy.float32).reshape(-1)
    if not len(sound):
        raise InputError("the clip is empty: give one with speech")
    if not numpy.abs(sound).max() > 1e-5:
        raise InputError(SILENT)
    longest = getattr(extractor, "n_samples", None)
    if longest is not None and len(sound) > longest:
        raise InputError(
            f"the clip lasts {len(sound) / extractor.sampling_rate:.1f} s, but the model hears "
            f"{longest / extractor.sampling_rate:.0f} s at once: cut it"
        )
    made = extractor(
        sound,
        sampling_rate=extractor.sampling_rate,
        return_tensors="pt",
        return_attention_mask=True,
    )
    mask = made.get("attention_mask")
    found = made["input_features"][0]
    total = found.shape[1] if hasattr(model.config, "num_mel_bins") else found.shape[0]
    return found, int(mask.sum()) if mask is not None else total


def prompt(model: Any, processor: Any, language: str = "en", task: str = "transcribe") -> list[int]:
    """The ids that the decoder starts with: Whisper's language, task and no-time-stamps marks."""
    start = [model.config.decoder_start_token_id]
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or not hasattr(tokenizer, "convert_tokens_to_ids"):
        return start
    known = tokenizer.get_vocab()
    several = bool(getattr(model.generation_config, "is_multilingual", False))
    several = several or model.config.vocab_size >= 51865
    if several and f"<|{language}|>" not in known and "<|notimestamps|>" in known:
        raise InputError(f"the model knows no language {language!r}: write it as in en, it, de")
    if several and task not in ("transcribe", "translate"):
        raise InputError(f"the task is transcribe or translate, not {task!r}")
    names = [f"<|{language}|>", f"<|{task}|>"] if several else []
    return start + [known[n] for n in [*names, "<|notimestamps|>"] if n in known]
