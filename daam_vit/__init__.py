"""The machinery behind `daam_core`. A module imports only modules above it, and never `daam_core`.

text         names of files and classes, made safe to show
pixels       any picture to RGB
arguments    checks of types, numbers, pictures and paths that callers pass in
inputs       checks of models, images and tensors that callers pass in
state        hooks and flags that are set on a model and restored
libraries    differences between timm, torchvision and transformers
plan         which attention layers are decomposed, and where their keys lie in the picture
rules        backward rules that propagate relevance
attention    records the attention of a running model
shortcuts    computes less, with the same result
relevance    the relevance of the tokens that enter every block
checks       checks of a run and of what it explains
families     one function per model family, and the tables of families
unknown      models of no known family
lens         the logit lens
fonts        fonts that have the characters of a text
drawing      maps to pictures
plots        the evolution of a decision
locks        one process at a time in a folder
ranks        the processes of torchrun, which share the work of a command
files        atomic writes, GIFs, the folder of a flow
"""
