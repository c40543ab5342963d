"""The card of Deconstructed attention."""

from regard.cards import Card, Paper

CARD = Card(
    slug="deconstructed-attention",
    name="Deconstructed attention",
    verb="shape",
    does="swap attention for simpler mixers, layer by layer, and see what is needed",
    paper=Paper(
        "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
        "Xue et al.",
        2025,
        "2510.11602",
    ),
    families=("causal LM",),
)
