"""The card of CrossTune."""

from regard.cards import Card, Paper

CARD = Card(
    slug="cross-tune",
    name="CrossTune",
    verb="shape",
    does="few-shot classification by attending from a text to label descriptions",
    paper=Paper(
        "CrossTune: Black-Box Few-Shot Classification with Label Enhancement",
        "Luo et al.",
        2024,
        "2403.12468",
    ),
    families=(
        "text encoder",
        "causal LM",
    ),
)
