"""What the scripts and commands share.

options.py     options and their defaults, and what they name: device, model, classes, folder of the results
photos.py      the loop over the photos: read them in batches, report errors
neighbours.py  neighbours of the photos in a memory bank
results.py     results of a photo: manifest, evolution of the decision, files
names.py       names of results: classes in words, the folder, and whose folder it is
terminal.py    printed lines, closed streams and signals
"""
