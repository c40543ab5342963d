"""The card of VAR."""

from regard.cards import Card, Paper

CARD = Card(
    slug="var",
    name="VAR",
    verb="steer",
    does="give the attention that sink tokens waste back to the image",
    paper=Paper(
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        "Kang et al.",
        2025,
        "2503.03321",
    ),
    families=("vision-language",),
    method="VAR",
    exports=("find_sink_dims",),
    takes="picture",
    model="smol-vlm",
)
