"""The card of Dynamic Prompt Learning."""

from regard.cards import Card, Paper

CARD = Card(
    slug="dynamic-prompt-learning",
    name="Dynamic Prompt Learning",
    verb="steer",
    does="relearn the nouns at every step so that attention maps stop leaking, then edit",
    paper=Paper(
        "Dynamic Prompt Learning: Addressing Cross-Attention Leakage for Text-Based Image Editing",
        "Wang et al.",
        2023,
        "2309.15664",
    ),
    families=("UNet diffusion",),
    method="DynamicPromptLearning",
    model="shapes-sd",
)
