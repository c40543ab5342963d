"""The card of VisionDrop."""

from regard.cards import Card, Paper

CARD = Card(
    slug="visiondrop",
    name="VisionDrop",
    verb="shrink",
    does="drop and merge image tokens, judged by how image tokens see each other",
    paper=Paper(
        "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment",
        "Xu et al.",
        2025,
        "2506.22283",
    ),
    families=("vision-language",),
    method="VisionDrop",
    takes="picture",
    model="shapes-vlm",
)
