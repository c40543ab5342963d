"""check: prove, on this machine and for this model, that the door is sound."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core import (
    Distance,
    Entropy,
    Fact,
    Received,
    State,
    Thumbnail,
    WindowedDistance,
)
from regard.core.kernels.reference import probabilities
from regard.errors import InputError, RegardError
from regard.reach.call import Call, Handler, Site
from regard.reach.collect import Collector
from regard.reach.session import Session

TOKENS = 24
TOLERANCE = 1e-4  # float32 sums over a short text; scaled by the largest value compared


@dataclass
class Finding:
    """One line of the table. `status` is "ok", "failed" or "n/a"."""

    what: str
    status: str
    detail: str


@dataclass
class Report:
    """All findings about one model."""

    model: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(f.status != "failed" for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {"model": self.model, "ok": self.ok, "findings": [vars(f) for f in self.findings]}


class _Recorder(Handler):
    """Keeps the calls and their States of a short run."""

    def __init__(self) -> None:
        self.calls: list[tuple[Call, State]] = []

    def after(self, call: Call, state: State) -> None:
        self.calls.append((call, state))


def check(model: Any, *, tokens: int = TOKENS, seed: int = 0) -> Report:
    """Run every check on a short random input and report each; nothing about the model changes.

    The checks: which attention modules are reached; that the output is the model's own; which mask
        is
    truly used (change one token, see which outputs move); facts against the dense map; prefill
    against decoding with a cache; a padded batch against each row alone; that nothing is left
    behind.

    >>> import regard
    >>> regard.check(regard.zoo.tiny("llama")).ok
    True

    Raises:
        InputError: fewer than 3 tokens.
        ReachError: the model cannot be reached at all.
    """
    if tokens < 3:  # of which the padded row of a batch keeps 2
        raise InputError(f"a check takes at least 3 tokens, not {tokens}")
    report = Report(type(model).__name__)
    Session(model)  # refuses a model without a door before anything runs
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            inputs = sample_inputs(model, tokens)
            plain = _output(model(**inputs))
            recorder = _Recorder()
            with Session(model, [recorder]) as session:
                through = _output(model(**inputs))
            for what, test in (
                ("reach", lambda: _reached(session.sites, recorder)),
                ("same output", lambda: _same(plain, through)),
                ("mask", lambda: _mask(model, inputs, recorder)),
                ("facts", lambda: _facts(recorder)),
                ("prefill = decode", lambda: _decode(model, inputs)),
                ("batch = alone", lambda: _batch(model, inputs)),
                ("no trace", lambda: _trace(model, inputs, plain)),
            ):
                report.findings.append(_run(what, test))
    finally:
        model.train(was_training)
    return report


def sample_inputs(model: Any, tokens: int = TOKENS, batch: int = 1) -> dict[str, Tensor]:
    """A short random input that fits the model: token ids, pixels or audio features."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    dtype, device = model.dtype, model.device
    main = model.main_input_name
    vocab = getattr(text, "vocab_size", 2)
    limit = getattr(text, "max_position_embeddings", None) or tokens
    special = {getattr(config, n, None) for n in ("image_token_id", "image_token_index")}
    special |= {getattr(text, n, None) for n in ("pad_token_id", "eos_token_id", "bos_token_id")}
    known = [n for n in range(min(vocab, 20_000)) if n not in special]
    ids = torch.tensor(known)[torch.randint(len(known), (batch, min(tokens, limit)))].to(device)
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        shape = (batch, getattr(vision, "num_channels", 3), size, size)
        return {"pixel_values": torch.randn(shape, dtype=dtype, device=device)}
    if main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", tokens)
        bins = config.num_mel_bins
        features = torch.randn((batch, bins, frames), dtype=dtype, device=device)
        return {"input_features": features, "decoder_input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


def _run(what: str, test: Callable[[], tuple[str, str]]) -> Finding:
    try:
        return Finding(what, *test())
    except RegardError as error:
        return Finding(what, "failed", str(error))


def _reached(sites: list[Site], recorder: _Recorder) -> tuple[str, str]:
    seen = [c.site.index for c, _ in recorder.calls]
    missed = [s.name for s in sites if s.index not in seen]
    parts = ", ".join(
        f"{sum(s.part == p for s in sites)} in {p}" for p in dict.fromkeys(s.part for s in sites)
    )
    twice = len(seen) - len(set(seen))
    if not seen:
        return "failed", "not one attention call came through the door"
    if missed:
        return "ok", f"{parts}; not used by this input: {len(missed)} ({missed[0]}, ...)"
    return "ok", f"{parts}; each called once" if not twice else f"{parts}; {twice} called again"


def _same(plain: Tensor, through: Tensor) -> tuple[str, str]:
    error = _error(through, plain)
    return _verdict(error <= TOLERANCE), f"largest relative difference {error:.1e}"


def _mask(model: Any, inputs: dict[str, Tensor], recorder: _Recorder) -> tuple[str, str]:
    """Change one token and compare the outputs that move with those the masks let it reach."""
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    if name not in inputs:
        return "n/a", "no token inputs to change"
    length = inputs[name].shape[1]
    reach = torch.eye(length, dtype=torch.bool)
    own = [c.site.part for c, _ in recorder.calls if c.site.kind == "self"][-1:]
    for call, _ in recorder.calls:
        if call.site.part in own and call.q.shape[2] == length:
            cells = call.mask.cells(length, length)[0].any(0).cpu()
            reach = reach | (cells.float() @ reach.float() > 0)
    before = _output(_through(model, inputs))
    for place in sorted({0, 1, length // 2, length - 1}):
        changed = dict(inputs)
        ids = inputs[name].clone()
        ids[:, place] = torch.where(ids[:, place] == ids[:, 0], ids[:, length // 3], ids[:, 0])
        if torch.equal(ids, inputs[name]):
            ids[:, place] = (ids[:, place] + 1) % 5 + 3
        changed[name] = ids
        change = (_output(_through(model, changed)) - before).abs().flatten(2).amax(-1)[0].cpu()
        # experts work on batches of tokens, whose size may change the last digit of any of them
        moved = change > 1e-5 * float(change.max())
        wrong = (moved & ~reach[:, place]).nonzero()[:, 0].tolist()
        if wrong:
            return "failed", f"changing token {place} moved output {wrong[0]}, which may not see it"
        blind = (reach[:, place] & ~moved).nonzero()[:, 0].tolist()
        if blind:
            return "failed", f"changing token {place} left output {blind[0]} as it was"
    causal = not bool(reach.triu(1).any())
    return "ok", "causal: no token moves an earlier output" if causal else "tokens see both ways"


def _facts(recorder: _Recorder) -> tuple[str, str]:
    worst, where = 0.0, ""
    for call, state in recorder.calls:
        p = probabilities(call.q, call.k, call.mask, call.scale, call.softcap, call.bias)
        if call.sinks is not None:  # one more key without a column
            sinks = call.sinks if call.sinks.dim() == 3 else call.sinks[None, :, None]
            p = p * (1 - (sinks - state.lse).exp().double())[..., None]
        if call.live is not None:
            p = p * call.live[:, None, :, None]
        facts = _true_facts(p)
        collector = Collector(list(facts))
        collector.after(call, state)
        for fact, true in facts.items():
            found = collector.value(collector.records[call.site.index], fact)
            if found is None:  # positions mean nothing between two texts
                continue
            error = _error(found.double(), true)
            if error > worst:
                worst, where = error, f" ({fact.name}, {call.site.name})"
    return _verdict(worst <= TOLERANCE), f"largest relative error {worst:.1e}{where}"


def _true_facts(p: Tensor) -> dict[Fact, Tensor]:
    """Facts from the dense map `[batch, heads, queries, keys]`, by their definitions."""
    away = (torch.arange(p.shape[2])[:, None] - torch.arange(p.shape[3])).abs().to(p)
    waad, cells = WindowedDistance(), Thumbnail(8)
    width = cells.width(p.shape[3])
    rows, columns = (
        torch.nn.functional.one_hot(torch.arange(n) // width).to(p) for n in p.shape[2:]
    )
    looking = (p.sum(-1) > 0).to(p) @ rows  # queries of each bin that see anything
    return {
        Received(): p.sum(2),
        Entropy(): -torch.special.xlogy(p, p).sum(-1),
        Distance(): (p * away).sum(-1),
        waad: (p * away.clamp_max(waad.window)).sum(-1),
        cells: rows.T @ p @ columns / looking.clamp_min(1)[..., None],
    }


def _decode(model: Any, inputs: dict[str, Tensor]) -> tuple[str, str]:
    if not (_takes(model, "past_key_values") and set(inputs) == {"input_ids"}):
        return "n/a", "no cache to decode with"
    ids = inputs["input_ids"]
    facts = [Received(), Entropy(), Distance()]
    whole, split = Collector(facts), Collector(facts)
    with Session(model, [whole]):
        full = model(ids)
    if getattr(model(ids, use_cache=True), "past_key_values", None) is None:
        return "n/a", "the model keeps no cache"
    with Session(model, [split]):
        half = ids.shape[1] // 2
        out = model(ids[:, :half], use_cache=True)
        for place in range(half, ids.shape[1]):
            out = model(
                ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True
            )
    error = _error(_output(out)[:, -1], _output(full)[:, -1])
    worst = 0.0
    for index, record in whole.records.items():
        for fact in facts:
            pair = whole.value(record, fact), split.value(split.records[index], fact)
            if pair[0] is not None:
                worst = max(worst, _error(pair[1], pair[0]))
    detail = f"outputs differ by {error:.1e}, facts token by token by {worst:.1e}"
    return _verdict(max(error, worst) <= TOLERANCE), detail


def _batch(model: Any, inputs: dict[str, Tensor]) -> tuple[str, str]:
    if set(inputs) != {"input_ids"} or not _takes(model, "attention_mask"):
        return "n/a", "no token batch to pad"
    ids = inputs["input_ids"]
    length = ids.shape[1]
    short = length * 2 // 3
    batch = torch.cat([ids, ids.roll(1, 1)])
    kept = torch.ones_like(batch)
    kept[1, : length - short] = 0
    extra = {"attention_mask": kept}
    if _takes(model, "position_ids"):
        extra["position_ids"] = (kept.cumsum(-1) - 1).clamp_min(0)
    facts = [Received(), Entropy()]
    together, alone = Collector(facts), Collector(facts)
    with Session(model, [together]):
        both = _output(model(input_ids=batch, **extra))
    with Session(model, [alone]):
        one = _output(model(batch[1:, length - short :]))
    if not _takes(model, "position_ids") and not _relative(model):
        return "n/a", "positions cannot be given, so a left-padded row is another input"
    error = _error(both[1:, -short:], one)
    worst = max(
        _error(
            together.value(together.records[i], f)[1:, :, -short:], alone.value(alone.records[i], f)
        )
        for i in alone.records
        for f in facts
    )
    detail = f"outputs differ by {error:.1e}, facts by {worst:.1e}"
    return _verdict(max(error, worst) <= TOLERANCE), detail


def _trace(model: Any, inputs: dict[str, Tensor], plain: Tensor) -> tuple[str, str]:
    before = _fingerprint(model)
    random = torch.random.get_rng_state()
    try:
        with Session(model, [_Recorder()]), Session(model, [Collector([Received()])]):
            model(**inputs)
            raise KeyError("leave by exception")
    except KeyError:
        pass
    if _fingerprint(model) != before:
        return "failed", "the model's settings, hooks or modes changed"
    if not torch.equal(torch.random.get_rng_state(), random):
        return "failed", "the random state changed"
    if not torch.equal(_output(model(**inputs)), plain):
        return "failed", "the outputs are no longer bit-equal"
    return "ok", "bit-equal outputs, same settings, hooks and random state after an exception"


def _fingerprint(model: Any) -> Any:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    configs = [copy.copy(vars(m.config)) for m in model.modules() if hasattr(m, "config")]
    return hooks, modes, [str(sorted(c.items(), key=str)) for c in configs]


def _through(model: Any, inputs: dict[str, Tensor]) -> Any:
    with Session(model):
        return model(**inputs)


def _output(out: Any) -> Tensor:
    for name in ("logits", "last_hidden_state", "image_embeds", "text_embeds"):
        found = getattr(out, name, None)
        if torch.is_tensor(found):
            return found
    return next(_tensors(out))


def _tensors(out: Any) -> Iterator[Tensor]:
    for value in out.values() if hasattr(out, "values") else out:
        if torch.is_tensor(value):
            yield value


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _relative(model: Any) -> bool:
    return hasattr(model.config, "rope_parameters") or hasattr(model.config, "rope_theta")


def _error(found: Tensor, true: Tensor) -> float:
    size = float(true.abs().max().clamp_min(1e-6)) if true.numel() else 1.0
    return float((found - true).abs().max()) / size if true.numel() else 0.0


def _verdict(ok: bool) -> str:
    return "ok" if ok else "failed"
