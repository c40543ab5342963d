"""The card of ST-LINK."""

from regard.cards import Card, Paper

CARD = Card(
    slug="st-link",
    name="ST-LINK",
    verb="shape",
    does="forecast traffic with a language model that has the road graph in its attention",
    paper=Paper(
        "ST-LINK: Spatially-Aware Large Language Models for Spatio-Temporal Forecasting",
        "Jeon et al.",
        2025,
        "2509.13753",
    ),
    families=(
        "spatio-temporal",
        "causal LM",
    ),
)
