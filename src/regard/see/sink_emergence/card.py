"""The card of Sink emergence."""

from regard.cards import Card, Paper

CARD = Card(
    slug="sink-emergence",
    name="Sink emergence",
    verb="see",
    does="measure attention sinks, and see where they appear, move or vanish",
    paper=Paper(
        "When Attention Sink Emerges in Language Models: An Empirical View",
        "Gu et al.",
        2024,
        "2410.10781",
    ),
    families=(
        "causal LM",
        "any attention",
    ),
    method="sinks",
    exports=("Sinks",),
)
