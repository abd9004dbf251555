"""Labels as text, for models from text to text."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import PipelineError, nearest


def verbalize(target: str, names: Sequence[str], given: Mapping[str, str]) -> list[str]:
    """A text for every class: the one given, else the class's own name if that is a word.

    Args:
        target: name of the column, for messages.
        names: of its classes.
        given: texts by class name.

    Raises:
        PipelineError: a text is for no class, a class has none, or two classes share one.

    >>> verbalize("label", ["0", "1"], {"0": "no", "1": "yes"})
    ['no', 'yes']
    """
    for name in given:
        if name not in names:
            raise PipelineError(f"--verbalizer {name}=...: no class of {target!r}: {nearest(name, names)}")
    texts = [" ".join(given.get(name, "" if _is_number(name) else name).split()) for name in names]
    lacking = [name for name, text in zip(names, texts, strict=True) if not text]
    if lacking:
        raise PipelineError(
            f"target {target!r}: class {lacking[0]!r} has no verbaliser, a model from text to text answers "
            f"in words: give --verbalizer {lacking[0]}=WORD for each class"
        )
    twice = [text for text in texts if texts.count(text) > 1]
    if twice:
        raise PipelineError(f"target {target!r}: two classes are both {twice[0]!r}: give each its own text")
    return texts


def spell(tokenizer: Any, target: str, texts: Sequence[str]) -> tuple[list[tuple[int, ...]], list[str]]:
    """The tokens of each text, and the text as the tokenizer gives it back.

    Raises:
        PipelineError: two texts become the same, or one has no token.
    """
    tokens = [tuple(tokenizer(text_target=text)["input_ids"]) for text in texts]
    spelled = [" ".join(text.split()) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    for text, back in zip(texts, spelled, strict=True):
        if not back or spelled.count(back) > 1:
            what = "nothing" if not back else f"{back!r}, and so does another class"
            raise PipelineError(
                f"target {target!r}: the tokenizer makes {what} of {text!r}: give another --verbalizer"
            )
    return tokens, spelled


def _is_number(name: str) -> bool:
    return name.removeprefix("-").replace(".", "", 1).isdigit()
