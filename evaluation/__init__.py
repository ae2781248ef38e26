"""Is the explanation right? Methods side by side on the same photos, and what they are worth.

    python -m evaluation --model embedded --images photos/ --methods all --out evaluated

`decision`: what is explained, a class and how probable it is. `methods`: maps of it, `(B, h, w)`. `metrics`: what the
removal of patches, and regions known to hold the object, say about a map. `sanity`: what a map should and should not
depend on. `annotations`: those regions. `command`: the loop over the photos and its records. `report`: the tables and
pictures made of them.
"""
