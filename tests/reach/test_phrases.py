"""Phrases stand where they are said to stand, whoever found them."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from regard.errors import InputError
from regard.parts.text.phrases import locate, noun_phrases, tree_spans

PROMPT = "A red circle on a big blue square, and two green stars."


def texts(prompt: str, parser: Any) -> list[str]:
    found = noun_phrases(prompt, parser)
    assert all(prompt[p.start : p.end] == p.text for p in found)
    return [p.text for p in found]


def test_rules() -> None:
    assert texts(PROMPT, "rules") == ["A red circle", "a big blue square", "two green stars"]
    assert texts("a cat's red ball in the box", "rules") == ["a cat's red ball", "the box"]
    assert texts("circle and square", "rules") == []
    assert texts("", "rules") == []


def test_spacy() -> None:
    pytest.importorskip("spacy", reason="spaCy is part of the extra 'diffusion'")
    try:
        assert texts(PROMPT, "spacy") == ["A red circle", "a big blue square", "two green stars"]
    except ImportError as problem:
        pytest.skip(str(problem))
    assert texts("a cat and a cat", "spacy") == ["a cat", "a cat"]


def test_trees_outer_before_inner() -> None:
    tree = (
        "(ROOT (S (NP (NP (DT A) (JJ red) (NN circle)) (PP (IN on) (NP (DT a) (JJ big) (JJ blue)"
        " (NN square)))) (, ,) (CC and) (NP (CD two) (JJ green) (NNS stars)) (. .)))"
    )
    found = [PROMPT[a:b] for a, b in tree_spans(tree, PROMPT)]
    assert found == [
        "A red circle on a big blue square",
        "A red circle",
        "a big blue square",
        "two green stars",
    ]


def test_leaves_written_otherwise() -> None:
    text = 'A red (big) cat\'s ball and a "dog"'
    tree = (
        "(S (NP (NP (DT A) (JJ red) (-LRB- -LRB-) (JJ big) (-RRB- -RRB-) (NN cat) (POS 's)) "
        "(NN ball)) (CC and) (NP (DT a) (`` ``) (NN dog) ('' '')))"
    )
    assert [text[a:b] for a, b in tree_spans(tree, text)] == [
        "A red (big) cat's ball",
        "A red (big) cat's",
        'a "dog"',
    ]
    assert tree_spans("(S (NP a zebu[!].n) (VP runs.v))", "a zebu runs") == [(0, 6)]
    with pytest.raises(InputError, match="'horse', which is not found"):
        tree_spans("(S (NP a horse))", "a cat")


def test_locating() -> None:
    text = "A cat and a  cat on a catwalk"
    assert [p.start for p in locate(["a cat", "a cat"], text)] == [0, 10]
    assert locate(["A CAT"], text)[0].text == "A cat"
    with pytest.raises(InputError, match="not found a second time in prompt"):
        locate(["catwalk", "catwalk"], text)
    with pytest.raises(InputError, match="phrase 'cats' is not found"):
        locate(["cats"], text)
    with pytest.raises(InputError, match="empty"):
        locate([" "], text)


def test_a_function_as_parser() -> None:
    assert texts("a red cat", lambda text: [(0, 9), (2, 9), (2, 9)]) == ["a red cat", "red cat"]
    with pytest.raises(InputError, match="characters 0 to 99"):
        noun_phrases("a red cat", lambda text: [(0, 99)])
    with pytest.raises(InputError, match="Did you mean 'rules'"):
        noun_phrases("a red cat", "rule")


def test_a_missing_parser_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from regard.parts.text import phrases

    plain = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("spacy", "stanza"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    phrases._spacy.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(phrases.shutil, "which", lambda name: None)
    with pytest.raises(ImportError, match=r"regard\[diffusion\]"):
        noun_phrases("a red cat")
    with pytest.raises(ImportError, match="link-parser"):
        noun_phrases("a red cat", "constituency")
    phrases._spacy.cache_clear()
