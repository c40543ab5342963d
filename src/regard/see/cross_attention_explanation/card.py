"""The card of Cross-attention explanation."""

from __future__ import annotations

from dataclasses import dataclass

from regard.cards import Card, Checked, Paper, setting, whole_numbers, whole_or_all

CARD = Card(
    slug="cross-attention-explanation",
    name="Cross-attention explanation",
    verb="see",
    does="measure how much of a speech model's behaviour its cross-attention explains",
    paper=Paper(
        "Cross-Attention is Half Explanation in Speech-to-Text Models",
        "Papi et al.",
        2025,
        "2509.18010",
    ),
    families=(
        "speech",
        "encoder-decoder",
    ),
    method="explain",
    exports=("Explanation",),
    model="whisper-tiny.en",
    command="explain",
)
MARGIN = 100  # frames of padding kept behind the sound when the window is cut: a second


@dataclass(eq=False)
class Settings(Checked):
    """What a person can set."""

    masks: int = setting(2000, "masks on the sound; the paper: 20000", least=2)
    state_masks: int | None = setting(
        None, "masks on the encoder's output; as many when left out", least=2, whole=True
    )
    segments: tuple[int, ...] = setting(
        (2000, 2500, 3000),
        "segments per 5 s of sound, one number a granularity",
        kind=whole_numbers,
    )
    width: int = setting(1, "encoder steps taken out together; more need fewer masks", least=1)
    frames: str = setting(
        "all",
        "the model's whole window, or cut to the sound, which is far faster",
        among=("all", "real"),
    )
    margin: int | None = setting(
        None, "frames kept behind the sound, in place of frames", least=0, whole=True, option=""
    )
    baseline: str = setting(
        "mean", "what stands in: the mean of a mel bin, or zero", among=("mean", "zero")
    )
    antithetic: bool = setting(False, "draw each mask with its complement")
    step: int | None = setting(
        5, "percent between two points of the deletion curves; 0: none", least=1, kind=whole_or_all
    )
    seed: int = setting(0, "seed of the masks", least=0)
    batch: int = setting(16, "masks run at once", least=1)

    @property
    def cut(self) -> int | None:
        """Frames kept behind the sound; None leaves the window whole."""
        return MARGIN if self.margin is None and self.frames == "real" else self.margin
