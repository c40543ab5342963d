"""The card of SwapAnything."""

from regard.cards import Card, Paper

CARD = Card(
    slug="swap-anything",
    name="SwapAnything",
    verb="steer",
    does="replace a masked object with a personal one and leave all other pixels alone",
    paper=Paper(
        "SwapAnything: Enabling Arbitrary Object Swapping in Personalized Visual Editing",
        "Gu et al.",
        2024,
        "2404.05717",
    ),
    families=("UNet diffusion",),
    method="swap",
    model="shapes-sd",
)
