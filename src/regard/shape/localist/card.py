"""The card of Localist LLMs."""

from regard.cards import Card, Paper

CARD = Card(
    slug="localist",
    name="Localist LLMs",
    verb="shape",
    does="a dial from opaque to rule-readable attention",
    paper=Paper("Localist LLMs with Recruitment Learning", "Diederich", 2025, "2510.17358"),
    families=(
        "causal LM",
        "text encoder",
        "ViT",
    ),
)
