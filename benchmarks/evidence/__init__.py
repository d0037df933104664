"""The study of docs/evidence.md: is FuRA better than other ways to fine-tune, and what makes it better?

configuration.py   a study, read from a YAML file of this folder
texts.py           the records of the text study, and plain English, as tokens
pictures.py        the records of the study with pictures
data.py            what is read by every run: tokens, choices and pictures in one file
methods.py         a model as one of a study's methods trains it
training.py        one run
scoring.py         choices by likelihood, answers word for word, perplexity
changes.py         how a run changed the weights, along the singular directions of the base
runs.py            the queue: which run is next, several at a time on one GPU, one row for each
tables.py          tables and pictures of the rows
"""
