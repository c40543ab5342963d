"""The card of Graph-aware attention."""

from regard.cards import Card, Paper

CARD = Card(
    slug="graph-attention",
    name="Graph-aware attention",
    verb="shape",
    does="read attention as a graph and aggregate it with graph networks",
    paper=Paper(
        "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers",
        "Buehler",
        2025,
        "2501.02393",
    ),
    families=("causal LM",),
    exports=("head_graph", "adapter.SparseGIN"),
    examples=("regard train adapter sparse-gin --model smollm2-135m --data novel --seeds 3",),
)
