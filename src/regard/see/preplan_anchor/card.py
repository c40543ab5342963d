"""The card of Preplan and anchor."""

from regard.cards import Card, Paper

CARD = Card(
    slug="preplan-anchor",
    name="Preplan and anchor",
    verb="see",
    does="read the rhythm of an answer from attention, and credit the tokens that carry it",
    paper=Paper(
        "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization",
        "Li et al.",
        2025,
        "2510.13554",
    ),
    families=("causal LM",),
    method="rhythm",
    exports=(
        "Rhythm",
        "couplings",
    ),
)
