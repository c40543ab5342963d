"""The card of SWAP."""

from regard.cards import Card, Paper

CARD = Card(
    slug="swap-planning",
    name="SWAP",
    verb="steer",
    does="reason in planned and checked steps: propose, predict, discriminate",
    paper=Paper(
        "Deliberate Reasoning for LLMs as Structure-aware Planning with Accurate World Model",
        "Xiong et al.",
        2024,
        "2410.03136",
    ),
    families=("causal LM",),
)
