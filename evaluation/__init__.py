"""Is the explanation right? Compare explanation methods on the same photos.

    python -m evaluation --model embedded --images photos/ --methods all --out evaluated

    command.py       options, and the loop over the photos
    photos.py        find the photos of a folder or of a list; their names
    decision.py      what is explained: the class of a photo, its probability, its gradient
    explained.py     a batch of photos with the attention behind its score
    methods.py       the methods: maps `(B, h, w)`
    ablation.py      the relevance flow without one of its rules or choices
    metrics.py       how good a map is: removed patches, known regions
    sanity.py        what a map depends on: weights, class, orientation
    mosaics.py       the grid pointing game: does the map of a class lie on its photo?
    annotations.py   regions of the objects, from boxes and masks
    records.py       one line per photo, written at once
    comparison.py    means, intervals and paired tests
    tables.py, figures.py, sheet.py, report.py    what a reader sees

See docs/evaluation.md.
"""
