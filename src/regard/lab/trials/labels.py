"""Label scoring: does a causal language model put the right label after a text?

The label whose token has the highest logit after the prompt is the prediction; the margin is the
log-likelihood of the right label over the best wrong one, which tells small changes apart that
leave every prediction as it was.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regard.errors import InputError, nearest
from regard.lab.intervals import bootstrap
from regard.parts.labels import batches, label_tokens, margins, truth_of


@dataclass(frozen=True)
class Example:
    """A text and the label that is right for it."""

    text: str
    label: str


@dataclass(frozen=True)
class Labelled:
    """What label scoring found, one value an example, in the order given."""

    labels: list[str]
    truth: list[str]
    predicted: list[str]
    margins: list[float]

    @property
    def correct(self) -> list[bool]:
        return [p == t for p, t in zip(self.predicted, self.truth)]

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.truth)

    @property
    def margin(self) -> float:
        """Mean log-likelihood margin, in nats."""
        return sum(self.margins) / len(self.margins)

    def as_dict(self) -> dict[str, Any]:
        """Everything, with 95 % bootstrap intervals, as plain JSON values."""
        return {
            "labels": self.labels,
            "examples": len(self.truth),
            "accuracy": self.accuracy,
            "accuracy_interval": bootstrap([float(c) for c in self.correct]),
            "margin": self.margin,
            "margin_interval": bootstrap(self.margins),
            "truth": self.truth,
            "predicted": self.predicted,
            "margins": self.margins,
        }


def labels(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example | tuple[str, str]],
    labels: Sequence[str] | None = None,
    *,
    template: str = "{text}\nLabel:",
    methods: Sequence[Any] = (),
    batch_size: int = 16,
    cached: bool = False,
) -> Labelled:
    """Score the labels of some examples, with methods of regard on the model or without.

    Args:
        examples: texts with their labels.
        labels: all labels; those of the examples, sorted, when None.
        template: the prompt, with `{text}` where the text goes; it ends where the label begins.
        methods: what `regard.apply` takes.
        batch_size: prompts run at once; padded on the left.
        cached: read the last token of a prompt in a step of its own, over the cache of the others;
            a method that shortens the cache shows only there. Runs prompt by prompt.

    Raises:
        InputError: no examples, an unknown label, labels that begin with the same token, a template
            without `{text}`.
    """
    from regard.watching import apply

    pairs = [(e.text, e.label) if isinstance(e, Example) else e for e in examples]
    names = sorted({label for _, label in pairs}) if labels is None else list(labels)
    truth = torch.tensor(truth_of([label for _, label in pairs], names))
    tokens = label_tokens(tokenizer, names)
    prompts = [fill(template, text) for text, _ in pairs]
    scores = torch.empty(len(pairs))
    best = torch.empty(len(pairs), dtype=torch.long)
    with torch.no_grad(), apply(model, *methods):
        for places, inputs in batches(
            tokenizer, prompts, 1 if cached else batch_size, model.device
        ):
            logits = _last(model, inputs, cached)[:, tokens.to(model.device)].cpu()
            scores[places] = margins(logits, truth[places])
            best[places] = logits.argmax(-1)
    return Labelled(
        names,
        [names[n] for n in truth.tolist()],
        [names[n] for n in best.tolist()],
        scores.tolist(),
    )


def _last(model: Any, inputs: dict[str, Any], cached: bool) -> Any:
    """Logits after the prompt, `[batch, vocabulary]`."""
    from transformers import DynamicCache

    if not cached:
        return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    ids = inputs["input_ids"]
    if ids.shape[1] < 2:
        raise InputError("a prompt of one token leaves no cache: give longer texts")
    # handed over, and not left to the model: methods put their own storage into it
    past = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=past, use_cache=True, logits_to_keep=1)
    return model(ids[:, -1:], past_key_values=past, use_cache=True).logits[:, -1]


def fill(template: str, text: str) -> str:
    """The prompt: the template with a text in its place.

    >>> fill("Review: {text}\\nThe review is", "a day {x}")
    'Review: a day {x}\\nThe review is'
    """
    if "{text}" not in template:
        raise InputError(f"the template {template!r} has no {{text}} where the text goes")
    return template.replace("{text}", text)


def read_examples(path: str | Path) -> list[Example]:
    """Examples from a file of JSON lines, each `{"text": ..., "label": ...}`.

    Raises:
        InputError: no such file, a line that is none, no line at all.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}: give JSON lines with text and label")
    examples = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: give JSON lines with text and label") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            text, label = data["text"], data["label"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = label = None
        if not isinstance(text, str) or not isinstance(label, str) or not text or not label:
            raise InputError(
                f'{path}, line {number}: {{"text": "...", "label": "..."}} is expected, both words'
            )
        examples.append(Example(text, label))
    if not examples:
        raise InputError(f"{path} holds no example")
    return examples


# -- sentences made from templates ---------------------------------------------------------------
@dataclass(frozen=True)
class Task:
    """A built-in task: its labels and the prompt that asks for them."""

    labels: tuple[str, ...]
    template: str


TASKS = {
    "sentiment": Task(
        ("negative", "positive"),
        "Decide whether the following review is positive or negative. Answer with one word.\n\n"
        "Review: {text}\n\nThe review is",
    ),
    "topic": Task(
        ("business", "food", "music", "sports"),
        "Decide which topic the following text is about: business, food, music or sports.\n\n"
        "Text: {text}\n\nThe topic is",
    ),
}
_SUBJECTS = (
    *("film", "novel", "hotel", "restaurant", "concert", "camera", "museum", "play"),
    *("phone", "lecture", "train journey", "garden tour"),
)
_TONES = {
    "positive": (
        ("moving", "charming", "well made", "a delight", "worth every minute", "superb"),
        ("I smiled all the way home", "I would go again tomorrow", "the staff were kind"),
        ("I had feared the worst, but", "In spite of the rain,", "Against all warnings,"),
    ),
    "negative": (
        ("dull", "careless", "badly made", "a waste of an evening", "far too long", "dreadful"),
        ("I wanted my money back", "I left before the end", "the staff were rude"),
        ("I had hoped for much, but", "In spite of the praise,", "Against all promises,"),
    ),
}
_REVIEWS = (
    "{turn} the {subject} was {word}, and {end}.",
    "Everyone praised the {subject}. To me it was {word}: {end}.",
    "The {subject} turned out to be {word}. Honestly, {end}.",
    "My sister disliked the {subject} and I do not know what to say; it was {word}, and {end}.",
)
_FACTS = {
    "business": (
        *("The shares of {name} fell after the report", "{name} opened a second office"),
        *("A bank lent {name} two million", "{name} sold its oldest factory"),
    ),
    "food": (
        *("{name} adds a pinch of salt to the dough", "The soup at {name} comes with fresh bread"),
        *("{name} roasts the onions slowly", "At {name} the cheese ripens for a year"),
    ),
    "music": (
        *("{name} tuned the violin before the rehearsal", "The choir of {name} sang without notes"),
        *("{name} wrote the quartet in one winter", "The drummer of {name} missed the first beat"),
    ),
    "sports": (
        *("{name} scored in the last minute", "The goalkeeper of {name} was injured"),
        *("{name} ran the last lap alone", "The coach of {name} praised the defence"),
    ),
}
_NAMES = ("Harlow", "Weston", "Marlin", "Ashby", "Calder", "Renfrew", "Selwyn", "Tarrant")
_ENDS = (
    "nobody in the town had expected it",
    "the local paper wrote about it on Monday",
    "an old friend told me the story",
    "it took most of the afternoon",
)


def sentences(task: str, count: int = 80, seed: int = 0) -> list[Example]:
    """So many different sentences of a built-in task, labels in turn; the same for the same seed.

    >>> [e.label for e in sentences("sentiment", 4)]
    ['negative', 'positive', 'negative', 'positive']

    Raises:
        InputError: an unknown task, or more sentences than the templates can make.
    """
    if task not in TASKS:
        raise InputError(f"there is no built-in task {task!r}.{nearest(task, TASKS)}")
    draw, examples = random.Random(seed), dict[str, Example]()
    make = _review if task == "sentiment" else _fact
    names = TASKS[task].labels
    for _ in range(100 * count):
        label = names[len(examples) % len(names)]
        text = make(draw, label)
        examples.setdefault(text, Example(text, label))
        if len(examples) == count:
            return list(examples.values())
    raise InputError(f"the templates make fewer than {count} different sentences: ask for fewer")


def _review(draw: random.Random, label: str) -> str:
    words, ends, turns = _TONES[label]
    text = draw.choice(_REVIEWS).format(
        turn=draw.choice(turns),
        subject=draw.choice(_SUBJECTS),
        word=draw.choice(words),
        end=draw.choice(ends),
    )
    return text[0].upper() + text[1:]


def _fact(draw: random.Random, label: str) -> str:
    text = draw.choice(_FACTS[label]).format(name=draw.choice(_NAMES))
    return f"{text}, and {draw.choice(_ENDS)}."
