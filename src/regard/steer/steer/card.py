"""The card of STEER."""

from regard.cards import Card, Paper

CARD = Card(
    slug="steer",
    name="STEER",
    verb="steer",
    does="write synthetic text that stays in its domain and does not repeat itself",
    paper=Paper(
        "Steering Language Generation: Harnessing Contrastive Expert Guidance and Negative Prompting for Coherent and Diverse Synthetic Data Generation",
        "O'Neill et al.",
        2023,
        "2308.07645",
    ),
    families=("causal LM",),
    method="ContrastiveExpertGuidance",
)
