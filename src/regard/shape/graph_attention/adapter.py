"""Sparse-GIN: a graph network beside the attention of a frozen language model.

The model's own attention, summed over heads and cut, is the graph of its tokens; a small GIN sends
messages along it, and its result is added before the MLP of each layer.

Deviation: messages go from key to query. The released code lists the edges the other way and then
keeps only those that point forward, so that a token hears of itself alone; `compat="reference"`
does that, for weights that were trained so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard import files
from regard.core import Mask
from regard.core.kernels.tiled import Size, Tiles
from regard.core.precision import as_given
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler, Site

SIZE = Size(64, 64, 64, 2**24)  # a tile holds all heads


@dataclass(frozen=True)
class Graph:
    """How attention becomes edges: `sigmoid(alpha * (a - threshold))`, 0 unless above `cut`, with
    a the attention summed over heads, at most 1, or its mean.
    """

    threshold: float = 0.1
    alpha: float = 10.0
    cut: float = 0.6
    heads: str = "sum"
    compat: str = ""

    def __post_init__(self) -> None:
        if self.heads not in ("sum", "mean"):
            raise InputError(f"heads is sum or mean, not {self.heads!r}")
        if self.compat not in ("", "reference"):
            raise InputError(f"compat is empty or reference, not {self.compat!r}")
        none = 1 / (1 + math.exp(self.alpha * self.threshold))
        if not none < self.cut < 1:
            raise InputError(
                f"cut lies above {none:.3f}, where tokens without attention would be neighbours, "
                f"and below 1, not {self.cut}"
            )


def messages(
    q: Tensor, k: Tensor, lse: Tensor, x: Tensor, mask: Mask, scale: float, graph: Graph
) -> Tensor:
    """`sum_j w_ij x_j` over the edges, `[batch, queries, width]`, with gradients to q, k, lse and
    x; tile by tile, and again in backward.

    Args:
        x: the projected nodes of all keys, `[batch, keys, width]`.
    """
    if graph.compat == "reference":
        mask = mask & Mask.band(0, 0)
    with as_given(q):
        out: Tensor = _Messages.apply(q, k, lse, x, mask, scale, graph)
    return out.to(x.dtype)


class _Messages(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        x: Tensor,
        mask: Mask,
        scale: float,
        graph: Graph,
    ) -> Tensor:
        tiles = Tiles(q, k, mask, scale, lse=lse, size=SIZE)
        nodes = x.to(tiles.work)
        out = nodes.new_zeros(q.shape[0], q.shape[2], x.shape[-1])
        for tile in tiles:
            w, *_ = _edges(tile, graph)
            out[tile.batch, tile.rows] += w @ nodes[tile.batch, tile.cols]
        ctx.save_for_backward(q, k, lse, x)
        ctx.settings = (mask, scale, graph)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, lse, x = ctx.saved_tensors
        mask, scale, graph = ctx.settings
        with as_given(q):
            tiles = Tiles(q, k, mask, scale, lse=lse, size=SIZE)
            groups = (tiles.kv_heads, tiles.groups)
            q5, nodes, grad = (
                q.to(tiles.work).unflatten(1, groups),
                x.to(tiles.work),
                grad.to(tiles.work),
            )
            dq, dk, dx = torch.zeros_like(q5), torch.zeros_like(tiles.k), torch.zeros_like(nodes)
            dlse = q5.new_zeros(q5.shape[:-1])
            for tile in tiles:
                b, rows, cols = tile.batch, tile.rows, tile.cols
                w, p, slope = _edges(tile, graph)
                dx[b, cols] += w.mT @ grad[b, rows]
                ds = p * (slope * (grad[b, rows] @ nodes[b, cols].mT))[:, None, None]
                dlse[b, :, :, rows] -= ds.sum(-1)
                dq[b, :, :, rows] += ds @ tiles.k[b, :, None, cols]
                dk[b, :, cols] += torch.einsum("bhgrc,bhgrd->bhcd", ds, q5[b, :, :, rows])
        return (
            (dq * scale).flatten(1, 2).to(q.dtype),
            (dk * scale).to(k.dtype),
            dlse.flatten(1, 2).to(lse.dtype),
            dx.to(x.dtype),
            None,
            None,
            None,
        )


def _edges(tile: Any, graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
    """Weights `[batch, rows, cols]`, the probabilities of all heads, and how a weight changes with
    each of them.
    """
    p = tile.scores.exp()
    if tile.allowed is not None:
        p = p * tile.allowed
    total = p.sum((1, 2))
    share = 1.0
    if graph.heads == "mean":
        share = 1 / (p.shape[1] * p.shape[2])
        total = total * share
    w = torch.sigmoid(graph.alpha * (total.clamp_max(1.0) - graph.threshold))
    kept = w > graph.cut
    w = w * kept
    slope = graph.alpha * w * (1 - w) * (total < 1) * share
    return w, p, slope


class Gin(nn.Module):
    """The network of one layer: nodes in, one step of messages, an MLP, back to the width."""

    def __init__(self, width: int, hidden: int, scale: float, dropout: float = 0.1) -> None:
        super().__init__()
        self.enter = nn.Linear(width, hidden)
        self.eps = nn.Parameter(torch.zeros(()))
        self.inner, self.outer = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.act = nn.PReLU()
        self.dropout = nn.Dropout(dropout)
        self.leave = nn.Linear(hidden, width)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, nodes: Tensor, heard: Tensor) -> Tensor:
        """What is added to the states of the tokens: their own nodes and the messages they got."""
        u = self.eps * nodes + heard
        y = self.outer(self.act(self.inner(u))) + u
        added: Tensor = self.scale * self.norm(self.leave(self.dropout(self.act(y))))
        return added


class SparseGIN(nn.Module, Handler):
    """A Sparse-GIN adapter for a frozen decoder of the Llama layout.

    Args:
        model: the language model it is for; its weights are not changed.
        hidden: width of the graph network.
        last: scale of the last layer; scales begin at 0 and grow linearly over the layers.
        detach_graph: let no gradient flow through the edges; cheaper, another result.

    >>> import regard
    >>> from regard.zoo.tiny import inputs, tiny
    >>> model = tiny("llama")
    >>> with torch.no_grad(), regard.apply(model, SparseGIN(model, hidden=8)):
    ...     model(**inputs("llama", model)).logits.shape[-1]
    128
    """

    def __init__(
        self,
        model: Any,
        hidden: int = 16,
        *,
        graph: Graph | None = None,
        last: float = 0.5,
        dropout: float = 0.1,
        detach_graph: bool = False,
    ) -> None:
        super().__init__()
        if hidden < 1:
            raise InputError(f"hidden is at least 1, not {hidden}")
        layers, width = _layers(model), int(model.config.get_text_config().hidden_size)
        self.settings = {"hidden": hidden, "last": last, "dropout": dropout}
        self.settings["detach_graph"] = detach_graph
        self.graph, self.detach_graph = graph or Graph(), detach_graph
        scales = [last * n / max(len(layers) - 1, 1) for n in range(len(layers))]
        self.gins = nn.ModuleList(Gin(width, hidden, s, dropout) for s in scales)
        like = next(model.parameters())
        self.to(device=like.device, dtype=like.dtype)
        self._calls: dict[int, tuple[Call, Tensor]] = {}
        self._added: dict[int, Tensor] = {}
        self._nodes: dict[int, Tensor] = {}
        self._of: dict[int, int] = {}

    # -- one call ----------------------------------------------------------------------------------
    def sites(self, sites: list[Site]) -> list[Site]:
        own = [s for s in sites if s.kind == "self"]
        if len(own) != len(self.gins):
            raise InputError(
                f"this adapter has {len(self.gins)} layers, and the model {len(own)}: load the "
                "model that it was made for"
            )
        self._of = {s.index: n for n, s in enumerate(own)}
        return own

    def generation(self, config: Any) -> None:
        if (getattr(config, "num_beams", None) or 1) > 1:
            raise ReachError("the nodes of earlier tokens have no beams: use num_beams=1")

    def after(self, call: Call, state: Any) -> None:
        self._calls[self._of[call.site.index]] = (call, state.lse)

    def attach(self, model: Any) -> Sequence[Callable[[], None]]:
        undo: list[Callable[[], None]] = []
        for n, layer in enumerate(_layers(model)):
            norm = layer.post_attention_layernorm

            def before(module: Any, args: tuple[Any, ...], n: int = n) -> Any:
                return (args[0] + self._heard(n, args[0]), *args[1:])

            def leaving(module: Any, args: Any, out: Any, n: int = n) -> Any:
                added = self._added.pop(n)
                return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

            undo.append(norm.register_forward_pre_hook(before).remove)
            undo.append(layer.register_forward_hook(leaving).remove)
        return [*undo, self._nodes.clear, self._calls.clear]

    def _heard(self, n: int, states: Tensor) -> Tensor:
        """What layer `n` adds to the states after attention."""
        call, lse = self._calls.pop(n)
        if call.softcap is not None or call.bias is not None:
            raise ReachError("Sparse-GIN takes models without soft cap and without score biases")
        gin = self.gins[n]
        nodes = gin.enter(states)  # type: ignore[operator]
        known = nodes
        if call.query_offset > call.key_offset:
            known = torch.cat([self._nodes[n], nodes], 1)
        if not torch.is_grad_enabled():
            self._nodes[n] = known
        q, k = call.q, call.k
        if self.detach_graph:
            q, k, lse = q.detach(), k.detach(), lse.detach()
        heard = messages(q, k, lse, known, call.mask, call.scale, self.graph)
        self._added[n] = added = gin(nodes, heard)
        return added

    # -- files -------------------------------------------------------------------------------------
    def save(self, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into a folder."""
        from safetensors.torch import save_file

        folder = files.check_folder(Path(folder))
        folder.mkdir(parents=True, exist_ok=True)
        config = {"peft_type": "SPARSE_GIN", **self.settings, "graph": asdict(self.graph)}
        files.write_text(folder / "adapter_config.json", json.dumps(config, indent=1) + "\n")
        save_file(
            {n: x.detach().cpu().contiguous() for n, x in self.state_dict().items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )

    @classmethod
    def load(cls, model: Any, folder: Path) -> SparseGIN:
        """An adapter that `save` wrote.

        Raises:
            InputError: none is there, or it is of another model.
        """
        from safetensors.torch import load_file

        try:
            config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
            if config.pop("peft_type") != "SPARSE_GIN":
                raise ValueError
            graph = Graph(**config.pop("graph"))
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{folder} holds no Sparse-GIN adapter: name its folder") from None
        adapter = cls(model, graph=graph, **config)
        try:
            adapter.load_state_dict(load_file(Path(folder) / "adapter_model.safetensors"))
        except (RuntimeError, OSError):
            raise InputError(f"the adapter in {folder} is of another model") from None
        return adapter.eval()


def _layers(model: Any) -> Sequence[Any]:
    """The decoder layers, each with the norm before its MLP."""
    try:
        layers = model.get_decoder().layers
    except AttributeError:
        layers = []
    fits = [
        hasattr(layer, "post_attention_layernorm")
        and not hasattr(layer, "pre_feedforward_layernorm")
        for layer in layers
    ]
    if not fits or not all(fits):
        raise ReachError(
            f"{type(model).__name__} has no layers with a norm between attention and MLP: "
            "Sparse-GIN takes the Llama layout"
        )
    chosen: Sequence[Any] = layers
    return chosen
