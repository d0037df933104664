"""The families of models: a small file for each, ``base`` for what they have in common, ``registry`` to find one."""
