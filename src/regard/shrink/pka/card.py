"""The card of PKA."""

from regard.cards import Card, Paper

CARD = Card(
    slug="pka",
    name="PKA",
    verb="shrink",
    does="many image conditions in a diffusion transformer at near-linear cost",
    paper=Paper(
        "Rethinking Multi-Condition DiTs: Eliminating Redundant Attention via Position-Alignment and Keyword-Scoping",
        "Zhou et al.",
        2026,
        "2602.06850",
    ),
    families=("DiT diffusion",),
)
