"""Which heads ACT should change: each head alone on labelled prompts, and the ones that help kept.

A head of layer l changes nothing below layer l. So the hidden states that enter layer l are kept
for all prompts, and only the layers from l upward run again, which halves the work; where the edit
finds no sink in a batch of prompts nothing runs again at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError
from regard.files import write_text
from regard.parts.labels import batches, check_model, label_tokens, margins, truth_of
from regard.progress import bar
from regard.reach import Session, Site

from .method import ACT

Score = dict[str, float]
BY = ("margin", "accuracy")


class HeadFilter:
    """Head calibration of ACT in the manner of scikit-learn: `fit`, then `heads_` and `scores_`.

    Args:
        model, tokenizer: a causal language model of transformers.
        beta, alpha, threshold, keep_first, skip_layers: as for `ACT`.
        by: what a head must raise: "margin" (mean log-likelihood margin of the right label, finer)
            or "accuracy" (the paper).
        least: keep a head whose change is greater than this.
        top_k: keep at most so many heads, the best ones.
        batch_size: prompts run at once.
        records: a file of JSON lines, one a head; an interrupted fit goes on from it.
        progress: a bar on stderr, where that is a terminal.

    After `fit`: `heads_` layer -> heads that are kept; `scores_` one record a head with its change
    in accuracy and margin; `baseline_` those of the untouched model; `changes_` (layer, head) ->
    change in margin of every prompt.

    The paper keeps heads whose accuracy rises (reconstructed: its released lists came without the
    rule); 900 prompts a data set there.

    Raises:
        InputError: settings out of range, a model that writes no text; in `fit`, no prompts, labels
            that do not fit, or no layer left to try.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        beta: float = 0.4,
        alpha: float = 5.0,
        threshold: float | None = None,
        keep_first: int = 1,
        skip_layers: tuple[int, int] = (2, 1),
        by: str = "margin",
        least: float = 0.0,
        top_k: int | None = None,
        batch_size: int = 16,
        records: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        if by not in BY:
            raise InputError(f"by is one of {', '.join(BY)}, not {by!r}")
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k is at least 1, not {top_k}")
        if batch_size < 1:
            raise InputError(f"batch_size is at least 1, not {batch_size}")
        self.model, self.tokenizer = model, tokenizer
        self.settings: dict[str, Any] = {
            "beta": beta,
            "alpha": alpha,
            "threshold": threshold,
            "keep_first": keep_first,
            "skip_layers": tuple(skip_layers),
        }
        ACT(**self.settings)  # settings out of range are refused here
        check_model(model, tokenizer)
        self.by, self.least, self.top_k = by, least, top_k
        self.batch_size, self.progress = batch_size, progress
        self.records = Path(records) if records is not None else None

    def fit(
        self,
        prompts: Sequence[str],
        labels: Sequence[str],
        choices: Sequence[Sequence[str]] | None = None,
    ) -> HeadFilter:
        """Try every head alone.

        Args:
            prompts: whole prompts, each ending where its label begins.
            labels: the right label of each.
            choices: the labels to choose from, for each prompt; all labels for all when None. So
                several data sets can be pooled, as in the paper.
        """
        if len(prompts) != len(labels):
            raise InputError(f"{len(prompts)} prompts but {len(labels)} labels: give one each")
        if not prompts:
            raise InputError("the calibration set is empty: give prompts with their labels")
        names = sorted({c for own in choices for c in own} if choices else set(labels))
        tokens = label_tokens(self.tokenizer, names)
        truth = torch.tensor(truth_of(labels, names))
        closed = torch.zeros(len(prompts), len(names))
        for row, options in zip(closed, choices or []):
            row[[n not in options for n in names]] = -torch.inf
        if bool(closed.gather(-1, truth[:, None]).isinf().any()):
            raise InputError("the right label of a prompt is not among its choices")
        made = list(batches(self.tokenizer, prompts, self.batch_size, self.model.device))

        def score(logits: list[Tensor]) -> Tensor:
            found = torch.empty(len(prompts))
            for (places, _), own in zip(made, logits):
                found[places] = margins(own[:, tokens].cpu() + closed[places], truth[places])
            return found

        shape, sites = shape_of(self.model)
        first, last = self.settings["skip_layers"]
        layers = [s.layer for s in sites][first : max(len(sites) - last, 0)]
        if not layers:
            raise InputError(
                f"skip_layers={first, last} leaves none of the {len(sites)} layers: skip fewer"
            )
        with torch.no_grad(), Session(self.model):
            stack = _stack(self.model, sites[0])
            states = [_Suffix(self.model, inputs, stack) for _, inputs in made]
            plain = [s.logits for s in states]
            base = score(plain)
            self.baseline_ = _summary(base)
            done = self._records(prompts, labels, shape)
            self.changes_: dict[tuple[int, int], list[float]] = {}
            with bar(len(layers) * shape["heads"], "heads", self.progress) as step:
                for layer in layers:
                    todo = [h for h in range(shape["heads"]) if (layer, h) not in done]
                    for state in states if todo else []:
                        state.enter(layer)
                    for head in range(shape["heads"]):
                        if head in todo:
                            change = (score(self._try(states, layer, head)) - base).tolist()
                            now = _summary(base + torch.tensor(change))
                            record = {n: now[n] - self.baseline_[n] for n in now}
                            done[layer, head] = {
                                "layer": layer,
                                "head": head,
                                **record,
                                "changes": [round(c, 6) for c in change],
                            }
                            self._append(done[layer, head])
                        self.changes_[layer, head] = done[layer, head]["changes"]
                        step()
        self.model_ = {"name": _name(self.model), **shape}
        self.samples_ = len(prompts)
        found = [done[at] for at in sorted(done)]
        self.scores_ = [{n: v for n, v in r.items() if n != "changes"} for r in found]
        self.heads_ = choose(self.scores_, by=self.by, least=self.least, top_k=self.top_k)
        return self

    def save(self, path: str | Path) -> Path:
        """Write `heads_`, what they were chosen from, and the shape of the model as JSON, whole or
        not at all; `ACT(heads=path)` reads it. The file of records is removed.
        """
        path = Path(path)
        data = {
            "method": "act",
            "model": self.model_,
            "settings": {
                **self.settings,
                "by": self.by,
                "least": self.least,
                "top_k": self.top_k,
                "prompts": self.samples_,
            },
            "baseline": self.baseline_,
            "heads": {str(layer): heads for layer, heads in self.heads_.items()},
            "scores": self.scores_,
        }
        write_text(path, json.dumps(data, indent=1) + "\n")
        if self.records is not None:
            self.records.unlink(missing_ok=True)
        return path

    def _try(self, states: list[_Suffix], layer: int, head: int) -> list[Tensor]:
        """Logits of every batch with one head changed."""
        method = ACT(heads={layer: [head]}, **self.settings)
        with Session(self.model, [method]):
            return [s.logits_from(layer) for s in states]

    def _records(
        self, prompts: Sequence[str], labels: Sequence[str], shape: dict[str, int]
    ) -> dict[tuple[int, int], Any]:
        """What an earlier fit of the same settings and prompts has left."""
        mark = {"settings": self.settings, "model": shape, "name": _name(self.model)}
        mark = json.loads(json.dumps({**mark, "prompts": list(zip(prompts, labels))}))
        if self.records is None:
            return {}
        done: dict[tuple[int, int], Any] = {}
        if self.records.is_file():
            lines = self.records.read_text(encoding="utf-8").splitlines()
            try:
                same = bool(lines) and json.loads(lines[0]) == mark
                for line in lines[1:] if same else []:
                    record = json.loads(line)
                    done[record["layer"], record["head"]] = record
            except (ValueError, KeyError, TypeError):
                pass  # the last line was cut off: that head is tried again
        kept = [mark, *done.values()]
        write_text(self.records, "".join(json.dumps(x) + "\n" for x in kept))
        return done

    def _append(self, record: dict[str, Any]) -> None:
        if self.records is not None:
            with self.records.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def choose(
    scores: Sequence[dict[str, Any]],
    *,
    by: str = "margin",
    least: float = 0.0,
    top_k: int | None = None,
) -> dict[int, list[int]]:
    """The heads whose change is greater than `least`, the best `top_k` of them, by layer.

    >>> scores = [{"layer": 2, "head": h, "margin": m} for h, m in enumerate([0.1, -0.2, 0.3])]
    >>> choose(scores), choose(scores, top_k=1)
    ({2: [0, 2]}, {2: [2]})
    """
    good = sorted((r for r in scores if r[by] > least), key=lambda r: -r[by])[:top_k]
    heads: dict[int, list[int]] = {}
    for record in sorted(good, key=lambda r: (r["layer"], r["head"])):
        heads.setdefault(record["layer"], []).append(record["head"])
    return heads


def shape_of(model: Any) -> tuple[dict[str, int], list[Site]]:
    """Numbers of layers and of heads, and the self-attention sites of the language model."""
    sites = ACT(skip_layers=(0, 0)).sites(Session(model).sites)
    config = model.config.get_text_config()
    return {"layers": len(sites), "heads": config.num_attention_heads}, sites


@dataclass
class _Step:
    """How the model called one of its layers: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Suffix:
    """One batch of prompts in a model that can be run again from any of its layers upward.

    The layers are called as the model called them, then its last norm and its head; where that does
    not give the model's own logits (a family that does more in between) the whole model runs.
    Use under an open session, so that the masks are those that regard's attention reads.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], stack: tuple[Any, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.layers, self.norm = stack
        self.steps: dict[int, _Step] = {}
        self.hidden: Tensor | None = None
        hooks = [
            layer.register_forward_pre_hook(self._record(n), with_kwargs=True)
            for n, layer in enumerate(self.layers)
        ]
        try:
            self.logits = self._whole()
        finally:
            for hook in hooks:
                hook.remove()
        self.entered, self.after = 0, torch.empty(0)
        self.direct = self._matches()

    def _record(self, n: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not args:
                args, kwargs = (kwargs["hidden_states"],), dict(kwargs)
                del kwargs["hidden_states"]
            if n == 0:
                self.hidden = args[0]
            self.steps[n] = _Step(args[1:], kwargs)

        return hook

    def _whole(self) -> Tensor:
        out = self.model(**self.inputs, use_cache=False, logits_to_keep=1)
        return out.logits[:, -1].float()

    def _matches(self) -> bool:
        if self.hidden is None or self.norm is None or len(self.steps) < len(self.layers):
            return False
        return torch.allclose(self._tail(self._run(self.hidden, 0)), self.logits, atol=1e-4)

    def enter(self, layer: int) -> None:
        """Keep the hidden states that enter a layer, and those that leave it, of the plain model.

        Layers come in ascending order.
        """
        if self.direct and self.hidden is not None:
            self.hidden = self._run(self.hidden, self.entered, layer)
            self.entered = layer
            self.after = self._run(self.hidden, layer, layer + 1)

    def logits_from(self, layer: int) -> Tensor:
        """Logits at the last position; only layers from the entered one run again."""
        if not self.direct or self.hidden is None:
            return self._whole()
        if layer != self.entered:
            raise ValueError(f"layer {self.entered} was entered, not {layer}")
        changed = self._run(self.hidden, layer, layer + 1)
        if torch.equal(changed, self.after):  # no sink in this batch
            return self.logits
        return self._tail(self._run(changed, layer + 1))

    def _run(self, hidden: Tensor, start: int, stop: int | None = None) -> Tensor:
        for n in range(start, len(self.layers) if stop is None else stop):
            step = self.steps[n]
            out = self.layers[n](hidden, *step.args, **step.kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def _tail(self, hidden: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(self.norm(hidden[:, -1:]))[:, -1].float()
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _stack(model: Any, first: Site) -> tuple[Any, Any]:
    """The list of decoder layers, of which `first` is the first attention, and the norm after them
    (None where it is not found).
    """
    name = re.sub(r"\.\d+(\..*)?$", "", first.name)
    parent = model.get_submodule(name.rpartition(".")[0])
    norms = [m for n, m in parent.named_children() if n in ("norm", "final_layernorm", "ln_f")]
    return model.get_submodule(name), norms[0] if norms else None


def _summary(found: Tensor) -> Score:
    return {"accuracy": float((found > 0).double().mean()), "margin": float(found.double().mean())}


def _name(model: Any) -> str:
    return Path(str(model.config._name_or_path)).name or type(model).__name__
