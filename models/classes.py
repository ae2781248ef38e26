"""Find a class by its name or its index."""

from __future__ import annotations

import difflib
import re
import unicodedata
from numbers import Integral

from daam_vit.text import printable

MAX_SHOWN = 80
"""Largest number of characters of a name in an error; similar names are not searched for a longer one."""
MAX_DIGITS = 18
"""Largest number of digits of an index."""


def find_class(name: str | int, class_names: list[str] | None, num_classes: int) -> int:
    """Return the index of a class.

    A text is a name, or else an index: with the classes 1, 10 and 2, "10" is the second. An integer is always an index.

    Args:
        name: a name or synonym of the class, in which case, "_", "-", the zeros in front of a number and the Unicode
            form do not matter, or its index.
        class_names: one name per class, synonyms separated by ", "; None if they are unknown.
        num_classes: number of classes.

    Raises:
        TypeError: if `name` is neither a text nor an integer.
        ValueError: if no class or more than one class has this name; the error lists similar names, or the indices.
            Also if the index is out of range, or the text is a name of one class and the index of another.
    """
    if not isinstance(name, str):
        return _check_index(name, num_classes)
    if not name.strip():
        raise ValueError("target: the name of the class is empty; pass its name or its index")
    shown, named = _quoted(name), classes_called(name, class_names)
    if len(named) > 1:
        raise ValueError(f"target: {shown} is the name of the classes {_listed(named)}; pass the index")
    if named and is_whole_name(name, class_names):
        return named[0]
    index = _index(name)
    if index is None and class_names is None:
        raise ValueError(f"target: the class names of this model are not known; pass the index of {shown}")
    if index is None and not named:
        raise ValueError(f"target: no class is called {shown}; {_hint(name, class_names)}")
    if not named or (index is not None and index < 0):  # "-1" is no spelling of "1"
        return _check_index(index, num_classes)
    if index not in (None, named[0]) and index < num_classes:
        one, other = (f"class {i} ({_quoted(class_names[i])})" for i in (named[0], index))
        raise ValueError(f"target: {shown} is a name of {one} and the index of {other}; pass the whole name of one")
    return named[0]


def classes_called(name: str, class_names: list[str] | None) -> list[int]:
    """Return the indices of the classes with this name or synonym: those spelled exactly like it, or else all."""
    plain, exact = _plain(name), _exact(name)
    alike = []
    for index, names in enumerate(class_names or ()):
        synonyms = [names, *names.split(", ")]
        same = exact in map(_exact, synonyms)
        if plain and (same or plain in map(_plain, synonyms)):
            alike.append((index, same))
    return [index for index, same in alike if same] or [index for index, _ in alike]


def is_whole_name(name: str, class_names: list[str] | None) -> bool:
    """Return whether a class has exactly this name, not only as a synonym or in another spelling."""
    return _exact(name) in map(_exact, class_names or ())


def _quoted(name: str) -> str:
    return f"'{printable(name, MAX_SHOWN)}'"


def _composed(text: str) -> str:
    """Return the composed form (NFC) of a text: file systems and keyboards write the same letter in several ways."""
    return unicodedata.normalize("NFC", text.strip())


def _exact(text: str) -> str:
    """Return the form in which whole names are compared: as printed, because users copy what they see."""
    return printable(_composed(text))


def _plain(text: str) -> str:
    """Return the form that all spellings of a name share; a name of "_" and "-" alone keeps them."""
    text = _composed(_composed(text).casefold())
    words = text.replace("_", " ").replace("-", " ").split()
    return " ".join(word.lstrip("0") or "0" if word.isdecimal() else word for word in words) or text


def _index(text: str) -> int | None:
    """Return a text as an index, or None if it is not an integer."""
    text = text.strip()
    if not re.fullmatch(r"-?[0-9]+", text):
        return None
    return int(text) if len(text) <= MAX_DIGITS else 10**MAX_DIGITS


def _check_index(index: int, num_classes: int) -> int:
    if not isinstance(index, Integral) or isinstance(index, bool):
        raise TypeError(f"target: expected the name or the index of a class, got {printable(repr(index), MAX_SHOWN)}")
    if not 0 <= index < num_classes:
        shown = index if abs(index) < 10**MAX_DIGITS else "of so many digits"
        raise ValueError(f"target: class {shown} is out of range; there are {num_classes} classes, from 0 on")
    return int(index)


def _hint(name: str, class_names: list[str]) -> str:
    """Return what to pass instead of a name that no class has."""
    plain = _plain(name)
    near: list[str] = []
    if len(plain) <= MAX_SHOWN:  # the search takes long for long names
        synonyms = dict.fromkeys(_plain(synonym) for names in class_names for synonym in [names, *names.split(", ")])
        near = difflib.get_close_matches(plain, synonyms, n=5, cutoff=0.6)
        near += [s for s in synonyms if set(plain.split()) <= set(s.split()) and s not in near]
    shown = ", ".join(printable(s, MAX_SHOWN) for s in near[:5])
    return f"near names: {shown}" if near else "pass an index, or another name"


def _listed(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:10])) + ", …" * (len(indices) > 10)
