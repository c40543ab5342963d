"""The card of Agent Attention."""

from regard.cards import Card, Paper

CARD = Card(
    slug="agent-attention",
    name="Agent Attention",
    verb="shrink",
    does="two small attentions through a few agent tokens instead of one large one",
    paper=Paper(
        "Agent Attention: On the Integration of Softmax and Linear Attention",
        "Han et al.",
        2023,
        "2312.08874",
    ),
    families=(
        "ViT",
        "UNet diffusion",
    ),
)
