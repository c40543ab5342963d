"""The card of RefAM."""

from regard.cards import Card, Paper

CARD = Card(
    slug="refam",
    name="RefAM",
    verb="see",
    does="point at what a phrase refers to, from a diffusion transformer's attention",
    paper=Paper(
        "RefAM: Attention Magnets for Zero-Shot Referral Segmentation",
        "Kukleva et al.",
        2025,
        "2509.22650",
    ),
    families=("DiT diffusion",),
    method="RefAM",
    model="shapes-dit",
)
