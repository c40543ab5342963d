"""The card of Cross-attention explanation."""

from regard.cards import Card, Paper

CARD = Card(
    slug="cross-attention-explanation",
    name="Cross-attention explanation",
    verb="see",
    does="measure how much of a speech model's behaviour its cross-attention explains",
    paper=Paper(
        "Cross-Attention is Half Explanation in Speech-to-Text Models",
        "Papi et al.",
        2025,
        "2509.18010",
    ),
    families=(
        "speech",
        "encoder-decoder",
    ),
    method="explain",
    exports=("Explanation",),
)
