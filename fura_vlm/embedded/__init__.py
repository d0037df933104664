"""The embedded world: its scenes, questions and benchmarks, and the small model that is trained on them."""
