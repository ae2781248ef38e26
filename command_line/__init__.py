"""What the scripts and commands share.

options.py     options and their defaults, and what they name: device, model, classes
photos.py      the loop over the photos: read them in batches, report errors
neighbours.py  neighbours of the photos in a memory bank
results.py     results of a photo: name of the folder, manifest, evolution of the decision, files
"""
