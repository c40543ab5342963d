"""The claims of deconstructed_attention and graph_attention follow from their stated rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from regard.errors import InputError
from regard.lab import reproduce
from regard.parts.training import lm
from regard.parts.training.settings import Training, Variant
from regard.shape.deconstructed_attention import claims as deconstructed
from regard.shape.graph_attention import claims as graphs
from regard.shape.graph_attention.method import head_graph, picture
from regard.zoo.tiny import tiny


@pytest.mark.slow  # it trains thirteen nano models
def test_deconstructed_attention_from_end_to_end(tmp_path: Path) -> None:
    result = reproduce.run("deconstructed-attention", quick=True, out=tmp_path, progress=False)
    assert [c.key for c in result.claims] == [c.key for c in deconstructed.CLAIMS]
    for settled, stated in zip(result.claims, deconstructed.CLAIMS):
        if stated.judge is None:
            assert settled.verdict == "needs scale" and settled.command
        else:
            assert settled.verdict == stated.judge(settled.values)
            assert settled.here and settled.control
    maps = next(c for c in result.claims if c.key == "fixed-maps")
    assert maps.values["fixed"] == 0


def judged(module: Any, key: str, /, **values: float) -> str:
    claim = next(c for c in module.CLAIMS if c.key == key)
    return claim.settle(values, here="", control="").verdict


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("mixing", {"recall": 0.04, "next": 0.5, "fall": 0.01, "standard fall": 0.3}, "reproduced"),
        ("mixing", {"recall": 0.04, "next": 0.5, "fall": 0.1, "standard fall": 0.3}, "partly"),
        (
            "mixing",
            {"recall": 0.04, "next": 0.03, "fall": 0.01, "standard fall": 0.3},
            "not reproduced",
        ),
        ("hybrids", {"hold": 6}, "reproduced"),
        ("hybrids", {"hold": 4}, "partly"),
        ("hybrids", {"hold": 3}, "not reproduced"),
        ("interleaved", {"least": 0.1, "recall": 0.2, "loss": 0.1}, "reproduced"),
        ("interleaved", {"least": 0.0, "recall": 0.2, "loss": 0.1}, "partly"),
        ("interleaved", {"least": 0.2, "recall": 0.2, "loss": -0.1}, "not reproduced"),
        ("skip", {"least": 1.1, "mean": 2.0}, "reproduced"),
        ("skip", {"least": 0.9, "mean": 2.0}, "partly"),
        ("skip", {"least": 0.1, "mean": 0.9}, "not reproduced"),
        ("fixed-maps", {"fixed": 0.0, "free": 0.1}, "reproduced"),
        ("fixed-maps", {"fixed": 0.01, "free": 0.1}, "not reproduced"),
        ("bounded-logits", {"ratio": 11.0, "least": 5.0}, "reproduced"),
        ("bounded-logits", {"ratio": 2.0, "least": 1.1}, "partly"),
        ("bounded-logits", {"ratio": 2.0, "least": 0.9}, "not reproduced"),
    ],
)
def test_rules_of_the_deconstruction(key: str, values: dict[str, float], said: str) -> None:
    assert judged(deconstructed, key, **values) == said


def run(mixer: str, seed: int, loss: float, train_loss: float) -> dict[str, Any]:
    final = {"loss": loss, "train_loss": train_loss, "parameters": {"total": 10}}
    return {"variant": {"mixer": mixer}, "final": final, "steps": 1, "settings": {"data": "x"}}


@pytest.mark.parametrize(
    ("gin", "train", "pna", "verdicts"),
    [
        ((1.9, 1.8), 1.85, 2.1, ["reproduced", "reproduced"]),
        ((1.9, 1.8), 1.6, 1.7, ["not reproduced", "partly"]),
        ((2.2, 2.1), 2.1, 2.0, ["partly", "not reproduced"]),
    ],
)
def test_rules_of_graph_attention(
    gin: tuple[float, float], train: float, pna: float, verdicts: list[str]
) -> None:
    """The gap and the loss of GIN against standard attention, 2.0 less 1.8."""
    runs = {
        **{f"s{n}": run("standard", n, 2.0, 1.8) for n in range(2)},
        **{f"g{n}": run("gin", n, gin[n], train) for n in range(2)},
        **{f"p{n}": run("pna", n, pna, 1.8) for n in range(2)},
    }
    assert [c.verdict for c in graphs.settled(runs).claims] == [*verdicts, "needs scale"]
    with pytest.raises(InputError, match="lack gin"):
        graphs.settled({n: r for n, r in runs.items() if n[0] != "g"})


@pytest.mark.parametrize("mixer", ["gin", "pna"])
def test_widths_are_matched_to_the_parameters_of_standard_attention(mixer: str) -> None:
    from regard.parts.mixers import MixerForCausalLM, counts

    settings = Training(size="tiny")
    chosen = lm.matched(settings, Variant(mixer))
    sizes = [
        counts(MixerForCausalLM(lm.configured(settings, v, 300)))["total"]
        for v in (chosen, Variant("standard"))
    ]
    if mixer == "gin":
        assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[1]
    else:  # values and output projection stay: the least MLP is on top of them
        assert sizes[0] >= sizes[1]
    assert lm.matched(settings, Variant("mlp")) == Variant("mlp")


# -- a head as a graph -----------------------------------------------------------------------------
def test_the_graph_of_a_head_has_the_edges_of_its_map() -> None:
    pytest.importorskip("networkx")
    model = tiny("llama")
    ids = torch.randint(3, 100, (1, 30), generator=torch.manual_seed(0))
    graph = head_graph(model, ids, layer=1, head=2, threshold=0.05)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        p = model(ids, output_attentions=True).attentions[1][0, 2]
    truth = {(j, i) for i, j in (p > 0.05).nonzero().tolist()}
    assert set(graph.edges) == truth and truth
    for j, i, weight in graph.edges(data="weight"):
        assert weight == pytest.approx(float(p[i, j]), abs=1e-5)
    assert max(d for _, d in graph.in_degree()) <= 20
    svg = picture(graph, most=7)
    assert svg.count("<path") + svg.count("<circle") == 7 and svg.count("<text") == 30


def test_graphs_that_cannot_be() -> None:
    pytest.importorskip("networkx")
    model, ids = tiny("llama"), torch.ones(1, 5, dtype=torch.long)
    for changes, message in (
        ({"layer": 9}, "no layer 9"),
        ({"head": 9}, "out of range"),
        ({"threshold": 1.0}, "between 0 and 1"),
    ):
        with pytest.raises(InputError, match=message):
            head_graph(model, ids, **({"layer": 0, "head": 0} | changes))
    with pytest.raises(InputError, match="one text"):
        head_graph(model, ids.expand(2, -1), 0, 0)
