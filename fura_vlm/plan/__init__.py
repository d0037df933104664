"""Memory and time of a recipe, from shapes alone: ``shapes`` counts, ``costs`` adds up, ``page`` prints."""
