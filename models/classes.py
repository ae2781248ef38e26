"""Find a class by its name or its index."""

from __future__ import annotations

import difflib
import re


def find_class(name: str, class_names: list[str] | None, num_classes: int) -> int:
    """Return the index of a class.

    Args:
        name: a name or synonym of the class, in which case, "_" and "-" do not matter, or its index.
        class_names: one name per class, synonyms separated by ", "; None if they are unknown.
        num_classes: number of classes.

    Raises:
        ValueError: if no class or more than one class has this name; the error lists similar names, or the indices.
            Also if the index is out of range.
    """
    if re.fullmatch(r"-?[0-9]+", name.strip()):
        if 0 <= int(name) < num_classes:
            return int(name)
        raise ValueError(f"target: class {name} is out of range; there are {num_classes} classes, from 0 on")
    if class_names is None:
        raise ValueError(f"target: the class names of this model are not known; pass the index of {name!r}")

    def plain(text: str) -> str:
        return " ".join(text.lower().replace("_", " ").replace("-", " ").split())

    synonyms: dict[str, list[int]] = {}
    for index, names in enumerate(class_names):
        for synonym in {plain(names), *map(plain, names.split(", "))}:
            synonyms.setdefault(synonym, []).append(index)
    found = synonyms.get(plain(name), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"target: {name!r} is the name of the classes {', '.join(map(str, found))}; pass the index")
    near = difflib.get_close_matches(plain(name), synonyms, n=5, cutoff=0.6)
    near += [s for s in synonyms if set(plain(name).split()) <= set(s.split()) and s not in near]
    hint = f"near names: {', '.join(near[:5])}" if near else "pass an index, or another name"
    raise ValueError(f"target: no class is called {name!r}; {hint}")
