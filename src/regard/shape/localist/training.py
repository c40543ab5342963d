"""Training with locality: a group penalty by proximal steps, a loss on fidelity, a sampled dial.

    loss = cross entropy + locality * (rho * penalty of groups + mu * mean of -ln fidelity)

Groups are the slices of input features of each head of W_Q, and of each key head of W_K. The
penalty acts by a proximal step after each optimizer step, which makes exact zeros. Fidelity is that
of the scores before the dial, because the dial alone makes that after it high.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import State
from regard.errors import InputError
from regard.parts.decoding.picks import over
from regard.reach import Call, Session, Site

from .calibrate import read_dial
from .method import LocalityDial, regrouped
from .topics import Topics

LOCALITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class TrainingDial(LocalityDial):
    """The dial while a model trains: it also sums up -ln fidelity, with gradients."""

    def sites(self, sites: list[Site]) -> list[Site]:
        self._watch = True  # acts at 0 too: the loss is wanted there
        try:
            return super().sites(sites)
        finally:
            self._watch = False

    def begin(self, locality: float) -> None:
        """A new batch."""
        self.locality, self.losses = locality, list[Tensor]()

    def after(self, call: Call, state: State) -> State | None:
        roles = self.roles(call)
        rows = roles.live[:, None]
        inside = [
            over(call, roles.keys == b).lse.masked_fill(~roles.relevant[:, None, :, b], -1e30)
            for b in range(roles.relevant.shape[-1])
        ]
        lse = torch.stack([x.clamp_min(-1e30) for x in inside]).logsumexp(0)
        some = rows & (lse > -1e29)
        self.losses.append((state.lse - lse)[some.expand_as(lse)].mean())
        shift = self.shift(call.site.layer, roles.weight)
        return regrouped(call, roles, shift) if self.locality else None

    def loss(self) -> Tensor:
        """Mean of -ln fidelity over rows, heads and layers."""
        return torch.stack(self.losses).mean()


# -- groups ------------------------------------------------------------------------------------
def groups_of(model: Any, count: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(name, weights `[heads, head_dim, groups, features]`, their gradient or None) of every W_Q
    and W_K.
    """
    found = False
    for name, module in model.named_modules():
        for part in ("q_proj", "k_proj"):
            weight = getattr(getattr(module, part, None), "weight", None)
            if weight is None or not hasattr(module, "head_dim"):
                continue
            if weight.shape[1] % count:
                raise InputError(
                    f"{weight.shape[1]} features cannot be cut into {count} groups: take a divisor"
                )
            shape = (-1, module.head_dim, count, weight.shape[1] // count)
            grad = None if weight.grad is None else weight.grad.view(shape)
            found = True
            yield f"{name}.{part}", weight.data.view(shape), grad
    if not found:
        raise InputError("the group penalty needs q_proj and k_proj: this model has none")


@torch.no_grad()
def proximal_step(model: Any, count: int, strength: float) -> int:
    """Shrink every group by `strength * sqrt(size)`, down to exactly 0; how many groups are 0.

    >>> import regard
    >>> model = __import__("copy").deepcopy(regard.zoo.tiny("llama"))
    >>> proximal_step(model, 4, 0.0), proximal_step(model, 4, 100.0) > 0
    (0, True)
    """
    zeros = 0
    for _, weight, _ in groups_of(model, count):
        norm = weight.square().sum((1, 3), keepdim=True).sqrt()
        size = weight.shape[1] * weight.shape[3]
        factor = (1 - strength * math.sqrt(size) / norm.clamp_min(1e-30)).clamp_min(0.0)
        weight.mul_(factor)
        zeros += int((factor == 0).sum())
    return zeros


def certificate(model: Any, count: int, threshold: float) -> dict[str, Any]:
    """D1, from the gradients that the model holds: at a stationary point a zero group has a
    gradient below its threshold, and a live one a gradient of exactly that.

    Args:
        threshold: locality * rho; a group's is that times the root of its size.
    """
    zero, live = [], []
    for name, weight, grad in groups_of(model, count):
        if grad is None:
            raise InputError(f"{name} holds no gradient: call backward before the certificate")
        level = threshold * math.sqrt(weight.shape[1] * weight.shape[3])
        ratio = grad.square().sum((1, 3)).sqrt() / level
        dead = weight.square().sum((1, 3)) == 0
        zero += ratio[dead].tolist()
        live += (ratio[~dead] - 1).abs().tolist()
    return {
        "zero groups": len(zero),
        "live groups": len(live),
        "largest gradient over threshold, zero groups": max(zero, default=None),
        "largest equality residual, live groups": max(live, default=None),
        "mean equality residual, live groups": sum(live) / len(live) if live else None,
        "holds for zero groups": all(r <= 1 for r in zero),
    }


# -- the run -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """Settings of a training on topics."""

    steps: int = 400
    batch: int = 32
    length: int = 64
    layers: int = 2
    width: int = 64
    heads: int = 4
    rate: float = 3e-3
    rho: float = 1e-3
    mu: float = 0.1
    beta: float = 8.0
    seed: int = 0
    texts: int = 64


def topic_model(topics: Topics, plan: Plan) -> Any:
    """A Llama of random weights for such texts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=topics.vocabulary, hidden_size=plan.width, intermediate_size=2 * plan.width,
        num_hidden_layers=plan.layers, num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads, max_position_embeddings=4 * plan.length,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return LlamaForCausalLM(config)


def train_topics(
    topics: Topics, plan: Plan, *, localist: bool = True, among: tuple[int, ...] | None = None,
    device: str = "cpu", report: Callable[[int, float], None] | None = None, **texts: Any,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """Train one model; localist with penalty, fidelity loss and the dial drawn anew for each batch,
    or plain. Model and facts of the training.
    """
    model = topic_model(topics, plan).to(device).train()
    dial = TrainingDial(blocks=topics, locality=1.0, beta=plan.beta, check=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, weight_decay=0.0)
    groups = topics.count
    make = torch.Generator().manual_seed(plan.seed)
    losses, zeros = [], 0
    for step in range(plan.steps):
        ids = topics.draw(plan.batch, plan.length, 7919 * (plan.seed + 1) + step, among, **texts)
        ids = ids.to(device)
        optimizer.zero_grad()
        locality = float(torch.rand((), generator=make)) if localist else 0.0
        rate = plan.rate * min(1.0, (step + 1) / 20) * (1 - 0.95 * step / plan.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _loss(model, dial if localist else None, ids, locality, plan.mu)
        loss.backward()
        optimizer.step()
        if localist:
            zeros = proximal_step(model, groups, rate * locality * plan.rho)
        losses.append(float(loss.detach()))
        if report is not None:
            report(step, losses[-1])
    facts: dict[str, Any] = {"loss": losses[:: max(1, plan.steps // 20)], "zero groups": zeros}
    if localist and plan.rho:  # without a penalty there is no threshold
        optimizer.zero_grad()
        for n in range(4):
            ids = topics.draw(plan.batch, plan.length, 31 + n, among, **texts).to(device)
            (_loss(model, dial, ids, (n + 0.5) / 4, plan.mu) / 4).backward()
        facts["certificate"] = certificate(model, groups, 0.5 * plan.rho)
        optimizer.zero_grad()
    return model.eval(), facts


def _loss(model: Any, dial: TrainingDial | None, ids: Tensor, locality: float, mu: float) -> Tensor:
    if dial is None:
        plain: Tensor = model(ids, labels=ids).loss
        return plain
    dial.begin(locality)
    with Session(model, [dial]):
        loss: Tensor = model(ids, labels=ids).loss
    return loss + locality * mu * dial.loss()


@torch.no_grad()
def dial_table(
    model: Any, topics: Topics, plan: Plan, localities: Sequence[float] = LOCALITIES
) -> list[dict[str, Any]]:
    """Perplexity, accuracy, entropy, fidelity and leakage over the dial, on new texts."""
    rows = []
    ids = topics.draw(plan.texts, plan.length, 999_983 + plan.seed).to(model.device)
    for locality in localities:
        dial = LocalityDial(blocks=topics, locality=locality, beta=plan.beta, check=False)
        with Session(model, [dial]):
            logits = model(ids).logits[:, :-1]
        counted = topics(ids[:, 1:]) > 0
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        right = (logits.argmax(-1) == ids[:, 1:])[counted].double().mean()
        read = read_dial(
            model, LocalityDial(blocks=topics, locality=locality, beta=plan.beta), input_ids=ids
        )["inside"]
        rows.append(
            {
                "locality": locality,
                "perplexity": math.exp(float(loss)),
                "accuracy": float(right),
                **{n: read[n] for n in ("entropy_bits", "fidelity", "leakage", "violations")},
            }
        )
    return rows
