"""What the method in `daam_core` is made of. A module imports only modules above it, and never `daam_core`.

state        hooks and flags that are set on a model and put back
libraries    what timm, torchvision and transformers call things
plan         which attention layers are decomposed, and where their keys lie in the picture
attention    records the attention of a running model
shortcuts    computes less, with the same result
checks       what inputs and runs are held against
families     one function a model family, and the tables of families
unknown      models of no known family
lens         the logit lens
drawing      maps to pictures
plots        the evolution of a decision
files        atomic writes, GIFs, the folder of a flow
"""
