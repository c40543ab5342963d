"""The card of Modality-mutual attention."""

from regard.cards import Card, Paper

CARD = Card(
    slug="mma",
    name="Modality-mutual attention",
    verb="shape",
    does="let image tokens look at the question",
    paper=Paper(
        "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs",
        "Wang et al.",
        2025,
        "2503.02597",
    ),
    families=("vision-language",),
    method="MMA",
    takes="picture",
    model="shapes-vlm",
)
